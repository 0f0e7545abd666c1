"""How many sequences pass through a block together where nothing is trained.

A block of a small model is done with a training batch before the next one is asked for: then launches are
what takes the time, and more sequences at a time cost nothing but their memory. Products of other sizes have
other last bits, so a run remembers what it began with (``prepare``), and one from before this keeps its
batches.
"""

from __future__ import annotations

from engine.plan.estimate import Workload

TOGETHER = 1 << 25
"""Numbers of hidden states that fill a GPU: 56 sequences of 1024 tokens with 576 numbers each, two of a 7B
model's of 4096 tokens."""


def numbers_together(work: Workload) -> int:
    """Numbers that pass together at least; 0 where it is the training's batch whatever it has. Attention that
    keeps its scores takes more memory with every sequence."""
    return TOGETHER if work.cuda and not work.arch.eager_attention else 0


def together(batch: int, length: int, hidden: int, numbers: int) -> int:
    """Sequences of ``length`` tokens that pass together, of which a training takes ``batch``."""
    return max(batch, numbers // (length * hidden))


def passed_together(work: Workload, batch: int, length: int) -> int:
    """The same as is planned."""
    return together(batch, length, work.arch.hidden, numbers_together(work))
