"""Text that the full-precision model writes itself, to be trained on.

A training of the whole network learns from its text by heart: after eight passes over a million tokens of
WikiText-2 a 2-bit SmolLM2 predicts that text as well as full precision does and others much worse
(benchmarks/README.md). Text of the model's own is as much as one likes, of all kinds that it was trained on,
and needs no corpus, no network and no licence (LLM-QAT, arXiv 2305.17888, section 3.1).

Documents are short, because the cache of keys and values grows with their length and each step reads all of
it. Each begins with one token of text that chance picks, so that no two are alike, and is then sampled from
the model's own distribution, temperature 1 and nothing cut off: what is unlikely belongs to the language too.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from engine.data.encoding import Encoder
from engine.errors import DataError
from engine.evaluation.writing import Writer, writes
from engine.plan.own_text import DOCUMENT_TOKENS

if TYPE_CHECKING:
    from engine.models.causal_lm import CausalLM

WHERE = "the model's own text"
"""For messages."""
SEEDS = 2**63
"""Below which a seed has to be."""
_MISSES = 200
"""Tokens in a row that are no text, after which the vocabulary counts as having none."""


def own_windows(
    lm: CausalLM,
    encoder: Encoder,
    *,
    windows: int,
    length: int,
    seed: int,
    documents: int,
    reserve: int = 0,
    told: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:
    """Token windows int64 ``[windows, length]`` on the CPU, each of one or more documents of the model's own.

    ``documents`` are written at a time; where their keys and values grow with every token, a GPU is asked for
    ``reserve`` bytes in one piece. ``told`` hears every few tokens how many of how many are written, and may
    raise. What comes out depends on the seed, ``documents`` and the device.

    Raises:
        DataError: when the tokenizer knows no token that is text.
    """
    before, _ = encoder.separators()
    begin = list(encoder.begin) or before
    room = length - len(encoder.begin)
    each = min(DOCUMENT_TOKENS, room)
    count = windows * -(-room // each)
    starts = torch.tensor([[*begin, token] for token in _first_tokens(encoder, count, seed, lm.vocab_size)])
    written: list[Tensor] = []
    with lm.whole(lm.load_block) as model, _drawing(lm.device):
        recorded = _is_recorded(lm.device, model, starts.shape[1] + each - 1)
        for index, part in enumerate(starts.split(documents)):
            torch.manual_seed((1_000_003 * seed + index) % SEEDS)
            heard = _Heard(told, index * documents * each, count * each)
            if each == 1:
                found: Tensor | None = part
            elif recorded:
                found = _recorded(model, part.to(lm.device), each - 1, heard.of(len(part), len(begin)))
                recorded = found is not None
            else:
                found = None
            if found is None:
                _make_room(reserve, lm.device)
                reserve = 0  # torch owns it from now on
                found = _written(model, part, each - 1, heard)
            written.append(found.cpu())
    # Documents stand one after the other behind what a sequence begins with.
    text = torch.cat(written)[:, len(begin) if encoder.begin else 0 :]
    text = text[:, :each].reshape(windows, -1)[:, :room]
    return torch.cat([torch.tensor(encoder.begin, dtype=torch.int64).expand(windows, -1), text], 1)


def _is_recorded(device: torch.device, model: Any, tokens: int) -> bool:
    """Whether documents of so many tokens are written by recorded steps, which only a GPU has."""
    return device.type == "cuda" and writes(model, tokens)


def _recorded(model: Any, starts: Tensor, tokens: int, told: Callable[[int], None]) -> Tensor | None:
    """The same as :func:`_written`, faster; none for a model whose forward wants something else."""
    try:
        return Writer(model, starts, tokens)(told)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError):
        return None


def _written(model: Any, starts: Tensor, tokens: int, heard: _Heard) -> Tensor:
    """``starts`` ``[N, S]`` with so many sampled tokens behind each."""
    settings = GenerationConfig(
        max_new_tokens=tokens,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        pad_token_id=0,  # nothing is padded: nothing ends before the others
    )
    # What a setting leaves open is filled in from the model's own: where it ends, what it cuts off.
    own, model.generation_config = model.generation_config, settings
    device = model.get_input_embeddings().weight.device
    try:
        found: Tensor = model.generate(
            starts.to(device),
            attention_mask=torch.ones_like(starts, device=device),
            generation_config=settings,
            stopping_criteria=StoppingCriteriaList([heard]),
        )
    finally:
        model.generation_config = own
    return found


class _Heard(StoppingCriteria):  # type: ignore[misc]  # transformers is not typed
    """Ends nothing, and tells how many tokens of how many are written; ``before`` were before these."""

    def __init__(self, told: Callable[[int, int], None], before: int, total: int) -> None:
        self._told, self._done, self._total = told, before, total

    def of(self, documents: int, begin: int) -> Callable[[int], None]:
        """The same for a writer of so many documents, who tells how long they are, with the tokens that each
        has to ``begin`` with and that are not counted."""
        return lambda tokens: self._told(self._done + documents * max(0, tokens - begin), self._total)

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        self._done += input_ids.shape[0]
        self._told(self._done, self._total)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def _make_room(reserve: int, device: torch.device) -> None:
    """Have torch own so much memory of a GPU. The cache of keys and values grows with every token, and torch
    would ask the driver for each of its new sizes, which takes longer than the writing."""
    if device.type == "cuda" and reserve:
        torch.empty(reserve, dtype=torch.uint8, device=device)


@contextmanager
def _drawing(device: torch.device) -> Iterator[None]:
    """Leaves the generators of random numbers as they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


def _first_tokens(encoder: Encoder, count: int, seed: int, rows: int) -> Iterator[int]:
    """Tokens that are text with a letter in it, as the tokenizer itself would write that text."""
    tokenizer = encoder.tokenizer
    special = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}
    draw = random.Random(f"own text/{seed}")
    known: dict[int, bool] = {}
    misses = 0
    while count:
        token = draw.randrange(min(rows, len(tokenizer)))
        if token not in known:
            text = "" if token in special else tokenizer.decode([token])
            known[token] = any(map(str.isalpha, text)) and encoder.bare([text], WHERE)[0].tolist() == [token]
        if known[token]:
            misses, count = 0, count - 1
            yield token
        elif (misses := misses + 1) > _MISSES:
            raise DataError("the tokenizer knows no token that is text", where=WHERE)
