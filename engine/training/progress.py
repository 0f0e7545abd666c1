"""What a training says while it trains, and where it can be left.

Whoever listens is handed in: in a run the reporter (:class:`engine.reporter.Reporter`), which knows nothing
of checkpoints, and a keeper of snapshots (:mod:`engine.checkpoints.snapshots`), through which no loss passes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from engine.training.snapshot import Snapshot


class Progress(Protocol):
    """What a method tells whoever runs it. Every call is cheap unless :meth:`due` has said otherwise."""

    def due(self) -> bool:
        """Whether a metric would be written now; only then does the loop read numbers back from the
        device."""

    def metric(
        self,
        *,
        step: int,
        steps: int,
        epoch: int,
        loss: float,
        grad_norm: float | None = None,
        lr: Mapping[str, float] | None = None,
        tokens: int = 0,
        val_loss: float | None = None,
    ) -> None:
        """Report a step; ``tokens`` is the number trained on since the phase (or block) began."""

    def warning(self, code: str, message: str, hint: str = "") -> None:
        """Report something the user should know that does not end the run."""

    def leave_if_asked(self) -> None:
        """Called where nothing is lost by leaving; raises StopRequested once a stop was asked for."""

    def expect_silence(self, seconds: float) -> None:
        """One operation may take so long that nothing is heard meanwhile."""


class Keeper(Protocol):
    """Whoever keeps the states from which a training can be continued."""

    def wants_state(self) -> bool:
        """Whether the state at the next boundary would be kept: a checkpoint is due, or a stop was asked
        for. Asked where it takes all ranks of a training to have it."""

    def step_boundary(self, state: Callable[[], Snapshot] | None) -> None:
        """Called where a training can be continued from ``state()``, which is only asked for when needed.

        Saves it when a checkpoint is due; raises StopRequested, after saving it, once a stop was asked for.
        Where there is no ``state`` now, only an abort leaves; a stop waits for the next boundary.
        """
