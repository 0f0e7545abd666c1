"""A model as lm-eval asks it: likelihoods block by block, and text from the whole model.

lm-eval hands over all questions of a kind at once. Likelihoods of all of them are found while each block is
loaded once; where their hidden states would take too much room, of as many at a time as do not, and then the
blocks stay in memory if they can. What a model writes needs all of its blocks at every token, so for that the
model has to fit as a whole; the writing is that of lm-eval's own ``hf`` model.

:func:`answering` makes the model; lm-eval is imported by it alone, since not every installation has it.
"""

from __future__ import annotations

import contextlib
import copy
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from engine.data.encoding import Encoder
from engine.errors import PreflightError
from engine.evaluation.rows import memory_room, pass_rows, rows_bytes
from engine.quant.packed import unpacked

if TYPE_CHECKING:
    from engine.models.causal_lm import CausalLM

QUESTIONS = "the questions of evaluation.tasks"
LONGEST = 2048
"""Tokens of a question, where neither the model nor its tokenizer says how many it reads."""
LONGEST_SAID = 1 << 24
"""Tokenizers say more than that where they mean any number."""
DISK_ROOM = 64 << 30
"""Hidden states on the disk at a time."""


@dataclass(frozen=True)
class Means:
    """With what the questions are answered."""

    folder: Path | None = None
    """For hidden states that memory has no room for."""
    batch_size: int = 4
    """Texts that are written at a time."""
    free_for_blocks: Callable[[], tuple[int, str]] = lambda: (1 << 62, "this machine")
    """Bytes that all blocks together may take, and of what."""
    on_progress: Callable[[int, int], None] = lambda done, all: None
    on_batch: Callable[[], None] = lambda: None
    """What it raises ends the questions."""


def answering(lm: CausalLM, encoder: Encoder, block_for: Callable[[int], nn.Module], means: Means) -> Any:
    """The model whose ``i``-th block is ``block_for(i)``, as a ``TemplateLM`` of lm-eval."""
    from lm_eval.api.model import TemplateLM

    made: Any = type("BlockByBlock", (_Answers, TemplateLM), {})()
    made.lm, made.encoder, made.block_for, made.means = lm, encoder, block_for, means
    made.tokenizer = copy.deepcopy(encoder.tokenizer)  # lm-eval gives it a padding token
    made._device = lm.device
    return made


class _Answers:
    """What lm-eval's ``TemplateLM`` leaves open, and in front of what it does otherwise."""

    lm: CausalLM
    encoder: Encoder
    block_for: Callable[[int], nn.Module]
    means: Means
    tokenizer: Any

    # -- tokens ------------------------------------------------------------------------------------

    @property
    def max_length(self) -> int:
        """Tokens that the model reads at once: what ``hf`` finds, or the rows of its table of positions."""
        table, config = self.lm.position_table, self.lm.text_config
        names = ("n_positions", "max_position_embeddings", "n_ctx")
        found = [value for name in names if isinstance(value := getattr(config, name, None), int)]
        said = getattr(self.tokenizer, "model_max_length", None)
        if not found and isinstance(said, int) and said <= LONGEST_SAID:
            found.append(said)
        longest = found[0] if found else LONGEST
        return longest if table is None else min(longest, table.rows)

    @property
    def eot_token_id(self) -> int | None:
        token: int | None = self.tokenizer.eos_token_id
        return token

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that nothing precedes."""
        begin, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        return next((int(token) for token in (begin, end) if token is not None), 0)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """A text with its beginning, which stands there once."""
        if add_special_tokens is False:
            bare = self.encoder.bare([string], QUESTIONS)[0]
            return self.encoder.known(bare, QUESTIONS).tolist()
        return self.encoder.sequence(string, QUESTIONS, special=True)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation in the model's template; without what the system says where it has no place."""
        import jinja2

        for turns in (chat_history, [turn for turn in chat_history if turn["role"] != "system"]):
            with contextlib.suppress(jinja2.exceptions.TemplateError, ValueError):
                written: str = self.tokenizer.apply_chat_template(
                    turns,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=not add_generation_prompt,
                )
                return written
        raise PreflightError(
            "the model has no chat template that can write the questions",
            where="evaluation.task_chat",
            hint="leave it at false",
        )

    # -- likelihoods -------------------------------------------------------------------------------

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)  # type: ignore[misc]
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[float]:
        """Of whole texts, each in windows that predict every token once."""
        from lm_eval import utils

        asked: list[tuple[None, list[int], list[int]]] = []
        spans = []
        for request in requests:
            (text,) = request.args
            windows = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            first = len(asked)
            asked += [(None, *utils.make_disjoint_window(window)) for window in windows]
            spans.append((first, len(asked)))
        found = self._loglikelihood_tokens(asked)
        return [sum(value for value, _ in found[first:end]) for first, end in spans]

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        """The sum of the log-probabilities of each continuation, and whether greedy decoding writes it.
        Continuations that differ in their last token alone are read once."""
        inputs: dict[tuple[int, ...], list[int]] = {}
        targets: list[list[int]] = []
        for number, (_, context, continuation) in enumerate(requests):
            # A tokenizer may join the two where they meet; one token is asked for in any case.
            continuation = continuation or context[-1:]
            whole = (context + continuation if requests[number][2] else context)[-(self.max_length + 1) :]
            row = tuple(whole[:-1]) or (self.prefix_token_id,)
            targets.append(continuation[-len(row) :])
            inputs.setdefault(row, []).append(number)
        rows, found = list(inputs), [(-torch.inf, False)] * len(requests)

        def heard(row: int, hidden_TH: Tensor) -> None:
            numbers = inputs[rows[row]]
            scored = self._scored(hidden_TH, len(rows[row]), [targets[number] for number in numbers])
            for number, answer in zip(numbers, scored, strict=True):
                found[number] = answer

        for block_for, done, chosen in self._portions(rows):
            self._pass(block_for, rows, done, chosen, heard)
        return found

    def _pass(
        self,
        block_for: Callable[[int], nn.Module],
        rows: Sequence[Sequence[int]],
        done: int,
        chosen: Sequence[int],
        heard: Callable[[int, Tensor], None],
    ) -> None:
        """The chosen ones of the rows, before which ``done`` others were."""

        def told(now: int, of: int) -> None:
            self.means.on_progress(round(1000 * (done + len(chosen) * now / of)), 1000 * len(rows))

        pass_rows(
            self.lm,
            block_for,
            [rows[place] for place in chosen],
            lambda place, hidden_TH: heard(chosen[place], hidden_TH),
            self.means.folder,
            told,
            self.means.on_batch,
        )

    def _scored(
        self, hidden_TH: Tensor, length: int, targets: Sequence[Sequence[int]]
    ) -> list[tuple[float, bool]]:
        """Of continuations of one row, whose targets end with its last token's prediction."""
        most = max(map(len, targets))
        hidden_TH = hidden_TH[length - most : length]
        sums, greedy = [0.0] * len(targets), [True] * len(targets)
        for part in self.lm.head_chunks(most):
            log_p_TV = functional.log_softmax(self.lm.head(hidden_TH[None, part])[0].float(), dim=-1)
            best_T = log_p_TV.argmax(-1)
            for number, ids in enumerate(targets):
                # The last `len(ids)` of `most` places are this one's.
                skip = max(0, most - len(ids) - part.start)
                here = torch.tensor(
                    ids[max(0, part.start - most + len(ids)) : max(0, part.stop - most + len(ids))],
                    device=log_p_TV.device,
                )
                if len(here):
                    sums[number] += log_p_TV[skip:].gather(1, here[:, None]).double().sum().item()
                    greedy[number] &= bool((best_T[skip:] == here).all())
        # An undefined number is the worst answer, not the best.
        return [
            (total if total == total else -torch.inf, same) for total, same in zip(sums, greedy, strict=True)
        ]

    def _portions(
        self, rows: Sequence[Sequence[int]]
    ) -> Iterator[tuple[Callable[[int], nn.Module], int, list[int]]]:
        """Rows whose hidden states have room together, how many came before, and where blocks come from."""
        needed, room = rows_bytes(self.lm, rows), memory_room(self.lm.device)
        block_for = self.block_for
        if needed > room and self.lm.blocks_bytes() <= self.means.free_for_blocks()[0] - room:
            block_for = _kept(block_for)
        elif needed > room and self.means.folder is not None:
            room = max(room, min(shutil.disk_usage(self.means.folder).free // 2, DISK_ROOM))
        # The longest first: what may fail for want of memory does at once.
        order = sorted(range(len(rows)), key=lambda place: -len(rows[place]))
        chosen: list[int] = []
        taken = done = 0
        for place in order:
            size = rows_bytes(self.lm, [rows[place]])
            if chosen and taken + size > room:
                yield block_for, done, chosen
                done, taken, chosen = done + len(chosen), 0, []
            chosen.append(place)
            taken += size
        if chosen:
            yield block_for, done, chosen

    # -- writing -----------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        """What the whole model writes after each context, until one of its stops."""
        if problem := too_large(self.lm, self.means):
            raise PreflightError(problem, where="evaluation.tasks", hint="leave out tasks that let it write")
        batch = self.means.batch_size
        while True:
            try:
                return self._written(requests, batch)
            except torch.OutOfMemoryError:
                if batch == 1:
                    raise
            batch //= 2
            if self.lm.device.type == "cuda":
                torch.cuda.empty_cache()

    @torch.no_grad()
    def _written(self, requests: Sequence[Any], batch: int) -> list[str]:
        with self._whole() as model:
            writer = self._writer(model, batch, len(requests))
            # A text is written while all others wait: a stop must be heard at every token.
            hook = model.get_input_embeddings().register_forward_pre_hook(
                lambda module, inputs: self.means.on_batch()
            )
            try:
                found: list[str] = writer.generate_until(list(requests), disable_tqdm=True)
            finally:
                hook.remove()
        return found

    @contextmanager
    def _whole(self) -> Iterator[Any]:
        """The model in one piece with dense weights, and with what its folder says of writing."""
        from transformers import GenerationConfig

        with ExitStack() as stack:

            def dense(index: int) -> nn.Module:
                self.means.on_batch()
                block = self.block_for(index)
                stack.enter_context(unpacked(block, self.lm.dtype))
                return block

            model = stack.enter_context(self.lm.whole(dense))
            own, said = model.generation_config, self.lm.source.generation_settings()
            if said:
                model.generation_config = GenerationConfig.from_dict(said)
            model.tie_weights = lambda *_, **__: None  # they are what is measured
            try:
                yield model
            finally:
                model.generation_config = own
                del model.tie_weights

    def _writer(self, model: Any, batch: int, requests: int) -> Any:
        """lm-eval's own ``hf`` model of what is in memory already."""
        from lm_eval.models.huggingface import HFLM

        means, done, encode, begin = self.means, 0, self.tok_encode, self.prefix_token_id

        class Writer(HFLM):  # type: ignore[misc]  # lm-eval is not typed
            def _model_generate(self, context: Tensor, *args: Any, **kwargs: Any) -> Any:
                nonlocal done
                written = super()._model_generate(context, *args, **kwargs)
                done += len(context)
                means.on_progress(min(done, requests), requests)
                return written

            def tok_batch_encode(
                self, strings: Sequence[str], *_: Any, left_truncate_len: int | None = None, **__: Any
            ) -> tuple[Tensor, Tensor]:
                texts = [encode(text)[-(left_truncate_len or 0) :] or [begin] for text in strings]
                width, padding = max(map(len, texts)), int(self.tokenizer.pad_token_id or 0)
                ids_BT = torch.full((len(texts), width), padding)
                mask_BT = torch.zeros_like(ids_BT)
                for row, ids in enumerate(texts):
                    ids_BT[row, width - len(ids) :] = torch.tensor(ids)
                    mask_BT[row, width - len(ids) :] = 1
                return ids_BT, mask_BT

        return Writer(
            pretrained=model,
            backend="causal",
            tokenizer=copy.deepcopy(self.tokenizer),
            batch_size=batch,
            max_length=self.max_length,
        )


def too_large(lm: CausalLM, means: Means) -> str:
    """Why the model cannot write, in words; empty where it can."""
    free, place = means.free_for_blocks()
    if (needed := lm.blocks_bytes()) <= free:
        return ""
    return (
        "tasks that let the model write need all of its blocks in memory: "
        f"they take {needed / 2**30:.2f} GiB, and {place} has room for {max(0, free) / 2**30:.2f}"
    )


def _kept(block_for: Callable[[int], nn.Module]) -> Callable[[int], nn.Module]:
    """Each block made once."""
    blocks: dict[int, nn.Module] = {}

    def kept(index: int) -> nn.Module:
        if index not in blocks:
            blocks[index] = block_for(index)
        return blocks[index]

    return kept
