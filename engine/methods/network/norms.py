"""The norms of blocks, where the whole network trains them: float32, whatever type the blocks compute in."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from engine.training.stepper import ParameterGroup

_MASTER = "_float32"
"""What the name of a parameter that is trained ends with, beside the one that the arithmetic reads."""


@functools.cache
def _trained_type(kind: type[nn.Module], name: str, dtype: torch.dtype) -> type[nn.Module]:
    """``kind`` whose ``name`` is read from a float32 parameter, as the block's arithmetic wants it.

    One type for all blocks: torch.compile makes another form for each type that it meets, and a form for
    each norm of each block (``torch.nn.utils.parametrize`` makes a type a module) takes minutes.
    """

    def read(module: Any) -> Tensor:
        master: Tensor = getattr(module, name + _MASTER)
        return master.to(dtype)

    return type(kind.__name__, (kind,), {name: property(read)})


def norms_of(block: nn.Module) -> dict[str, nn.Parameter]:
    """The norms' parameters by the names that they have in a block as it came: those of one dimension that
    are no biases. Of trained ones it is the float32 form."""
    found: dict[str, nn.Parameter] = {}
    for path, parameter in block.named_parameters():
        if parameter.ndim == 1 and not path.endswith("bias"):
            found[path.removesuffix(_MASTER)] = parameter
    return found


def norm_groups(block: nn.Module, lr: float, *, relative: bool) -> list[ParameterGroup]:
    """The block's norms, ready to be trained; ``relative`` multiplies the rate by a norm's mean size."""
    for name, parameter in norms_of(block).items():
        if parameter.dtype != torch.float32:
            owner, _, child = name.rpartition(".")
            module = block.get_submodule(owner)
            delattr(module, child)
            module.register_parameter(child + _MASTER, nn.Parameter(parameter.detach().float()))
            kind: Any = type(module)  # which mypy takes for something without a hash
            module.__class__ = _trained_type(kind, child, parameter.dtype)
    groups = []
    for parameter in norms_of(block).values():
        parameter.requires_grad_(True)
        unit = parameter.detach().abs().mean().item() if relative else 1.0
        groups.append(ParameterGroup("norms", [parameter], lr * unit))
    return groups


def trained_norms(block: nn.Module) -> dict[str, Tensor]:
    """The values of those that were trained, by name."""
    return {name: p.detach() for name, p in norms_of(block).items() if p.requires_grad}
