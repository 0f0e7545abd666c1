"""Weights of blocks that are not those of ``nn.Linear`` layers, known by their names and shapes.

The plan sees them in the headers of the files, the engine in the module tree; what is said of one is said
here, so that both say the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from engine.architecture.headers import TensorInfo
from engine.errors import PreflightError

ONLY_LINEAR = "only blocks whose projections are nn.Linear work; choose a dense Transformer of such"
EXPERTS = "fused expert weights are not nn.Linear layers, so a mixture of experts cannot be quantized"
CONVOLUTION = (
    "blocks with convolutions or recurrences (state spaces, linear attention) cannot be quantized: "
    "their weights are not those of nn.Linear layers"
)
CONV1D = "the projections are Conv1D, not nn.Linear: their matrices lie the other way round"
OTHER = "blocks hold weights that are not those of nn.Linear layers"

_EXPERTS = re.compile(r"(^|\.)\w*(?<!shared_)(experts|exps)(\.|$)|(^|\.)ffn_(gate|up|down)\.\d+\.")
_RECURRENT = re.compile(r"conv|mamba|rg_lru|(^|\.)(A_log|time_mix\w*|time_decay|time_maa\w*)(\.|$)")
_SEVERAL = 3
"""Dimensions of a weight that is no matrix."""


class Unfit(msgspec.Struct, frozen=True):
    """A weight that is not that of an ``nn.Linear``."""

    name: str
    """As the checkpoint, or the model, calls it."""
    why: str

    def refusal(self) -> PreflightError:
        """What is said of a model that has one."""
        return PreflightError(self.why, where=self.name, hint=ONLY_LINEAR)


def unfit(name: str, shape: Sequence[int]) -> Unfit:
    """Judge a weight that is known not to be that of an ``nn.Linear``."""
    if _EXPERTS.search(name):
        return Unfit(name, EXPERTS)
    if _RECURRENT.search(name) or (len(shape) >= _SEVERAL and 1 in shape):
        return Unfit(name, CONVOLUTION)
    # Where experts go by another name, their weights are matrices laid upon each other all the same.
    return Unfit(name, EXPERTS if len(shape) == _SEVERAL else OTHER)


def first_unfit(found: Iterable[Unfit]) -> Unfit | None:
    """The one to name: experts before everything else, for they are what such a model is chosen for."""
    ordered = sorted(found, key=lambda one: [EXPERTS, CONVOLUTION, CONV1D, OTHER].index(one.why))
    return ordered[0] if ordered else None


def is_norm(name: str) -> bool:
    """Whether a parameter of this name belongs to a norm, whose matrices scale number by number: some norms
    have a row for each head."""
    module = name.rpartition(".")[0].rpartition(".")[2] or name
    return "norm" in module.lower() or module.startswith("ln_")


def unfit_in(block: Mapping[str, TensorInfo], prefix: str) -> list[Unfit]:
    """The weights among a block's stored tensors that cannot be those of an ``nn.Linear``.

    ``block`` has names as they are in the block, ``prefix`` is the block's own.
    """
    found = []
    for name, info in block.items():
        full = f"{prefix}.{name}"
        if len(info.shape) < 2 or is_norm(name):
            continue
        if len(info.shape) >= _SEVERAL or not name.endswith(".weight") or _EXPERTS.search(name):
            found.append(unfit(full, info.shape))
        elif _transposed(block, name, info.shape):
            found.append(Unfit(full, CONV1D))
    return found


def _transposed(block: Mapping[str, TensorInfo], name: str, shape: Sequence[int]) -> bool:
    """An nn.Linear has a bias for each row of its weight; the Conv1D of older models one for each column."""
    bias = block.get(f"{name.removesuffix('weight')}bias")
    return bias is not None and bias.shape == (shape[1],) and shape[0] != shape[1]
