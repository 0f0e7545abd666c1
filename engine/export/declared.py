"""An export read as it declares itself: alone, from the files, in the arithmetic that its config.json names.

That is what whoever loads it gets. A run on a CPU computes in float32 and one on a GPU in bfloat16, so an
export that says float16 could be right to the last bit and still overflow for its readers, or be worse than
its figures. Asked of a few tokens: whether its predictions are numbers, and whether they are worse than those
of the trained model by more than other arithmetic explains.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from engine.evaluation.perplexity import token_nll
from engine.export.layout import Form
from engine.export.stored import dtype_name

if TYPE_CHECKING:
    from engine.models.causal_lm import CausalLM

CPU_TOKENS = 128
"""Of the first window, that are read as declared on a CPU, where arithmetic of 16 bits takes five times as
long."""
NOISE, ERRORS = 0.01, 3
"""Other arithmetic changes the loss; more than so much of a nat, and more than so many standard errors of the
tokens' differences, is no noise."""


@dataclass(frozen=True)
class AsDeclared:
    """-log p of the same tokens ``[N, T-1]``, by the trained model and by the files alone."""

    dtype: torch.dtype
    trained_NT: Tensor
    packed_NT: Tensor

    @property
    def tokens(self) -> int:
        """That were read."""
        return self.packed_NT.shape[0] * (self.packed_NT.shape[1] + 1)

    @property
    def overflow(self) -> str:
        """The dtype's name where what the files predict is no number."""
        return "" if bool(self.packed_NT.isfinite().all()) else dtype_name(self.dtype)

    @property
    def trained(self) -> float | None:
        """Perplexity of the trained model."""
        return _perplexity(self.trained_NT)

    @property
    def packed(self) -> float | None:
        """Perplexity of the files."""
        return _perplexity(self.packed_NT)

    @property
    def note(self) -> str:
        """In words, how much the files differ from the trained model; empty for noise."""
        difference = (self.packed_NT - self.trained_NT).flatten()
        mean = difference.mean().item()
        error = difference.std().item() / math.sqrt(len(difference)) if len(difference) > 1 else math.inf
        if self.trained is None or self.packed is None or abs(mean) <= max(NOISE, ERRORS * error):
            return ""
        return (
            f"read as {dtype_name(self.dtype)}, as it declares itself, the export has a perplexity of "
            f"{self.packed:.4g} on {len(difference)} tokens, the trained model {self.trained:.4g}"
        )


def read_as_declared(
    out_dir: Path,
    form: Form,
    lm: CausalLM,
    declared: torch.dtype,
    tokens_NT: Tensor,
    trained_NT: Tensor,
    packed_NT: Tensor,
    on_block: Callable[[int, int], None] | None,
) -> AsDeclared:
    """What the files alone predict.

    ``trained_NT`` is -log p of the tokens by the trained model ``lm``, and ``packed_NT`` by the files in its
    arithmetic: the answer, where that is the one they declare, or where this machine has no other.
    """
    if declared == lm.dtype:
        return AsDeclared(declared, trained_NT, packed_NT)
    if lm.device.type == "cpu":
        tokens_NT = tokens_NT[:1, :CPU_TOKENS]
        trained_NT, packed_NT = (known[:1, : tokens_NT.shape[1] - 1] for known in (trained_NT, packed_NT))
    alone = form.open(out_dir, lm.device, declared, trust_remote_code=lm.source.trust_remote_code)
    try:
        hidden = alone.embed(tokens_NT)
        for index in range(alone.blocks):
            hidden = alone.run_block(alone.load_block(index), index, hidden)
            if on_block is not None:
                on_block(index + 1, alone.blocks)
        return AsDeclared(declared, trained_NT, token_nll(alone, hidden, tokens_NT))
    except RuntimeError as error:
        if "not implemented for" not in str(error):
            raise
        return AsDeclared(declared, trained_NT, packed_NT)


def _perplexity(nll_NT: Tensor) -> float | None:
    mean = nll_NT.mean().item()
    return math.exp(mean) if math.isfinite(mean) and mean < 700 else None
