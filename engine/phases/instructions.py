"""The conversations of a run as token windows, with what of them is learned."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.config.instructions import InstructionsConfig
from engine.data.encoding import Encoder
from engine.data.instructions import Instructions
from engine.data.packing import Answers, Filled, fill
from engine.data.parts import Part
from engine.data.tokens import MAX_PASSES, Said, Warn, load_windows, store_windows
from engine.errors import DataError, PreflightError
from engine.evaluation.answers import Written
from engine.evaluation.templates import renderer, rules
from engine.models.causal_lm import CausalLM
from engine.system.user_cache import token_cache

_SCHEME = 1  # raise it when the same inputs would give other windows: old cache entries then die out
PARTS: dict[Part, str] = {"train": "training", "validation": "validation", "evaluation": "held out"}
"""The parts in words."""
_TOLERANCE = 1e-3
"""Of the largest number that a block puts out, between a sample alone and in company, which other kernels
compute."""


@dataclass(frozen=True)
class Conversations:
    """Windows of conversations."""

    tokens_NT: Tensor
    answers: Answers


class InstructionWindows:
    """Draws the windows of one run's conversations."""

    def __init__(self, config: InstructionsConfig, encoder: Encoder, seed: int, warn: Warn) -> None:
        self._config, self._encoder, self._seed, self._warn = config, encoder, seed, warn
        # What the tokenizer lacks is said before a row is read.
        renderer(config.template, encoder.tokenizer)
        self._source = Instructions(config.data)

    def draw(self, part: Part, sequences: int, length: int) -> Conversations:
        """So many windows of a part; of ``evaluation`` at most so many.

        Raises:
            DataError: for rows that are no conversations, or too few of them.
            PreflightError: for a template that cannot be used.
        """
        path = token_cache() / f"{self._key(part, sequences, length)}.safetensors"
        found = load_windows(path, 2 * length, self._warn)
        if found is None:
            filled, said = self._fill(part, sequences, length)
            joined = _joined(filled.tokens_NT, filled.answers)
            store_windows(path, joined, self._source.identity(part), said, self._warn)
        else:
            joined, said = found
        for code, message in said:
            self._warn(code, message)
        tokens, answers = _parted(joined, length, packed=self._config.packing)
        self._encoder.known(tokens.numpy(), self._source.corpus)
        return Conversations(tokens, answers)

    def _fill(self, part: Part, sequences: int, length: int) -> tuple[Filled, Said]:
        source = self._source
        written = Written(self._encoder, self._config.template, source.corpus)
        seed = 0 if part == "evaluation" else self._seed
        filled = fill(
            written.samples(source.conversations(part, seed)),
            windows=sequences,
            length=length,
            packed=self._config.packing,
            order=f"samples/{seed}/{part}",
            passes=1 if part == "evaluation" else MAX_PASSES,
        )
        count = len(filled.tokens_NT)
        said = [("instructions-rows", line) for line in (*source.skipped(), *written.words())]
        said += [("instructions-cut", line) for line in filled.cut.words(source.corpus, PARTS[part], length)]
        if part != "evaluation" and count < sequences:
            for code, message in said:  # why there are so few
                self._warn(code, message)
            raise DataError(
                f"too few conversations, {PARTS[part]}: {filled.cut.samples:,} give {count:,} sequences of "
                f"{length} tokens, and {sequences:,} are asked for (each is read at most {MAX_PASSES} times)",
                where=source.corpus,
                hint="use more conversations, or fewer or shorter sequences",
            )
        if filled.passes > 1:
            line = (
                f"{source.corpus}, {PARTS[part]}: {filled.cut.samples:,} conversations were read "
                f"{filled.passes} times over for {sequences:,} sequences of {length}; more would serve better"
            )
            said.append(("text-repeated", line))
        return filled, said

    def _key(self, part: Part, sequences: int, length: int) -> str:
        config, encoder = self._config, self._encoder
        decides = {
            "instructions": _SCHEME,
            "tokenizer": encoder.rules,
            "begin": encoder.begin,
            "template": rules(config.template, encoder.tokenizer),
            "source": self._source.identity(part),
            "packing": config.packing,
            "sequences": sequences,
            "length": length,
            "seed": 0 if part == "evaluation" else self._seed,
        }
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:40]


def _joined(tokens_NT: Tensor, answers: Answers) -> Tensor:
    """Tokens, and behind them what is known of each, int32 ``[N, 2 T]``."""
    known = answers.segments_NT.int() * 2 + answers.learned_NT.int()
    return torch.cat([tokens_NT.int(), known], 1)


def _parted(joined: Tensor, length: int, *, packed: bool) -> tuple[Tensor, Answers]:
    tokens, known = joined[:, :length].long(), joined[:, length:]
    return tokens, Answers(known % 2 == 1, (known // 2).to(torch.int16), packed)


# -- whether a model can be packed for -----------------------------------------------------------------


def check_packing(lm: CausalLM, poll: Callable[[], None] = lambda: None) -> None:
    """Refuse a model that would see one sample of a window from another, or would read it at another place:
    two samples pass through a block of each kind together, and the second alone.

    Raises:
        PreflightError: naming the block.
    """
    if not lm.takes_positions:
        raise _unpacked("its forward takes no positions")
    first, second = 5, 7
    ids = torch.randint(lm.vocab_size, (1, first + second), generator=torch.Generator().manual_seed(0))
    together = torch.cat([torch.arange(first), torch.arange(second)])[None]
    alone = torch.arange(second)[None]
    for index in _of_each_kind(lm):
        poll()
        block = lm.load_block(index, dtype=torch.float32)
        whole, own = (
            _passed(lm, block, index, ids[:, part], positions)
            for part, positions in ((slice(None), together), (slice(first, None), alone))
        )
        error = (whole[:, first:] - own).abs().max()
        if not bool(error <= _TOLERANCE * own.abs().max()):
            raise _unpacked(f"what block {index} puts out depends on the sample before it")


def _of_each_kind(lm: CausalLM) -> list[int]:
    """One block of each kind: of unlike linears, or another kind of attention."""
    kinds = list(getattr(lm.text_config, "layer_types", None) or [])
    found: dict[object, int] = {}
    for index in range(lm.blocks):
        kind = (lm.linear_names(index), kinds[index] if index < len(kinds) else None)
        found.setdefault(kind, index)
    return list(found.values())


@torch.no_grad()
def _passed(lm: CausalLM, block: nn.Module, index: int, ids_BT: Tensor, positions_BT: Tensor) -> Tensor:
    hidden = lm.embed(ids_BT, positions_BT).float()
    return lm.run_block(block, index, hidden, positions_BT=positions_BT)


def _unpacked(why: str) -> PreflightError:
    return PreflightError(
        f"conversations cannot share a sequence of this model: {why}",
        where="instructions.packing",
        hint="instructions.packing = false gives each a sequence of its own",
    )
