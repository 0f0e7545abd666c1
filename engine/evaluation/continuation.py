"""Text that a model writes after a prompt, greedily.

For a look at what quantization did to a model no number is as quick as its own words. The decoding is
transformers' own, with a cache of keys and values; ours is only to have the whole model in memory for once.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from engine.data.encoding import Encoder
from engine.evaluation.chat import render

if TYPE_CHECKING:
    from engine.models.causal_lm import CausalLM


@dataclass(frozen=True)
class Continuation:
    """What came after the prompt."""

    text: str
    tokens: int
    """New ones, an end-of-text token among them."""
    seconds: float
    """That the writing took, once the model was loaded."""


PROMPT = "the prompt"


def prompt_ids(encoder: Encoder, prompt: str) -> Tensor:
    """Token ids ``[1, T]``: as a user's turn where the tokenizer knows conversations, else as it is.

    A template writes the special tokens itself; what sequences of this model begin with stands there once,
    whether or not the template writes it.

    Raises:
        PreflightError: when the tokenizer's chat template cannot be used.
        DataError: for a token that the model's embedding has no row for.
    """
    if getattr(encoder.tokenizer, "chat_template", None):
        ids = encoder.sequence(render(encoder.tokenizer, prompt), PROMPT, special=False)
    else:
        ids = encoder.sequence(prompt, PROMPT, special=True)
    return torch.tensor([ids], dtype=torch.long)


def continuation(
    lm: CausalLM,
    block_for: Callable[[int], nn.Module],
    ids_1T: Tensor,
    new_tokens: int,
    *,
    should_stop: Callable[[], bool] = lambda: False,
) -> Continuation:
    """What the model whose ``i``-th block is ``block_for(i)`` writes after ``ids_1T``.

    It ends with an end-of-text token, after ``new_tokens`` tokens, or when ``should_stop()``, which is asked
    after each, says so.
    """
    tokenizer = lm.source.tokenizer()
    ends = end_tokens(lm)
    padding = tokenizer.pad_token_id
    settings = GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=ends or None,
        # A single text is never padded; left open, transformers says that it chose a token.
        pad_token_id=padding if padding is not None else (ends or [0])[0],
    )
    ids_1T = ids_1T.to(lm.device)
    with lm.whole(block_for) as model:
        begin = time.monotonic()
        all_1T = model.generate(
            ids_1T,
            attention_mask=torch.ones_like(ids_1T),
            generation_config=settings,
            stopping_criteria=StoppingCriteriaList([_Stop(should_stop)]),
        )
        new = all_1T[0, ids_1T.shape[1] :].tolist()
    seconds = time.monotonic() - begin
    return Continuation(tokenizer.decode(new, skip_special_tokens=True), len(new), seconds)


def end_tokens(lm: CausalLM) -> list[int]:
    """Tokens after which the model has nothing more to say.

    Chat models have several, and no one place names them all: the tokenizer knows one, config.json the base
    model's, generation_config.json those that end a turn.
    """
    named = [lm.source.tokenizer().eos_token_id, lm.model.generation_config.eos_token_id]
    named.append(lm.source.generation_settings().get("eos_token_id"))
    found = (token for entry in named for token in (entry if isinstance(entry, list) else [entry]))
    numbers = (token for token in found if isinstance(token, int) and not isinstance(token, bool))
    return sorted({token for token in numbers if 0 <= token < lm.vocab_size})


class _Stop(StoppingCriteria):  # type: ignore[misc]  # transformers is not typed
    """Ends the generation when somebody asks for it."""

    def __init__(self, asked: Callable[[], bool]) -> None:
        self._asked = asked

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), self._asked(), dtype=torch.bool, device=input_ids.device)
