"""The norms of blocks, where the whole network trains them: float32, whatever type the blocks compute in."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from engine.training.stepper import ParameterGroup


class _Cast(nn.Module):
    """A float32 parameter as the block's arithmetic wants it."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, master: Tensor) -> Tensor:
        return master.to(self.dtype)


def norms_of(block: nn.Module) -> dict[str, nn.Parameter]:
    """The norms' parameters by the names that they have in a block as it came: those of one dimension that
    are no biases. Of trained ones it is the float32 form."""
    found: dict[str, nn.Parameter] = {}
    for path, parameter in block.named_parameters():
        if parameter.ndim == 1 and not path.endswith("bias"):
            owner, _, rest = path.partition(".parametrizations.")
            found[f"{owner}.{rest.removesuffix('.original')}" if rest else path] = parameter
    return found


def norm_groups(block: nn.Module, lr: float, *, relative: bool) -> list[ParameterGroup]:
    """The block's norms, ready to be trained; ``relative`` multiplies the rate by a norm's mean size."""
    for name, parameter in norms_of(block).items():
        if parameter.dtype != torch.float32:
            owner, _, child = name.rpartition(".")
            module = block.get_submodule(owner)
            setattr(module, child, nn.Parameter(parameter.detach().float()))
            # The type changes, which torch would otherwise take for a mistake.
            parametrize.register_parametrization(module, child, _Cast(parameter.dtype), unsafe=True)
    groups = []
    for parameter in norms_of(block).values():
        parameter.requires_grad_(True)
        unit = parameter.detach().abs().mean().item() if relative else 1.0
        groups.append(ParameterGroup("norms", [parameter], lr * unit))
    return groups


def trained_norms(block: nn.Module) -> dict[str, Tensor]:
    """The values of those that were trained, by name."""
    return {name: p.detach() for name, p in norms_of(block).items() if p.requires_grad}
