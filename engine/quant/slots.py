"""Where the linears of a block are: each by its name, read and replaced without knowing how it is kept.

Today every one of them is a module of its own, found by its dotted name. Whatever keeps a matrix otherwise (a
slice of the stacked weights of experts) becomes quantizable by a :class:`Slot` made here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Slot:
    """The place of one linear in a block."""

    name: str
    """Relative to the block (``self_attn.q_proj``)."""
    get: Callable[[], nn.Module]
    """What is there: an ``nn.Linear`` in a block as it came."""
    set: Callable[[nn.Module], None]
    """Put another module there, which maps the same inputs to the same outputs."""

    def linear(self) -> nn.Linear:
        """What is there in a block as it came."""
        found = self.get()
        assert isinstance(found, nn.Linear), self.name
        return found


def slot(block: nn.Module, name: str) -> Slot:
    """The place of the linear called ``name`` in ``block``."""
    parent, _, child = name.rpartition(".")
    owner = block.get_submodule(parent)
    return Slot(name, lambda: owner.get_submodule(child), lambda new: setattr(owner, child, new))


def slots(block: nn.Module, names: Iterable[str]) -> Iterator[Slot]:
    """The places of the named linears, in their order."""
    return (slot(block, name) for name in names)
