"""The state of a training on its way into checkpoints, and out of the last one.

A training offers its state at every step boundary (:meth:`SnapshotKeeper.step_boundary`). It is kept

* when so much time has passed since the last time that a kill would lose more than was promised
  (``runtime.checkpoint_minutes``), and the last ones were cheap enough (``runtime.checkpoint_share``);
* when a stop was asked for: then the run ends with nothing lost.

Training waits only while its state is copied into host memory. A thread hashes, writes and publishes it.

Whoever trains something within a run, whatever it is, does it in :func:`resumable`::

    with resumable(job.checkpoints, stage.name) as keeper:
        Training(method, train, settings, job.report, keeper.snapshot, keeper).run()
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from engine.checkpoints.commits import Checkpoints, Writing, bytes_of
from engine.checkpoints.store import CheckpointStore, Committed
from engine.plan.recovery_model import PART_OF_THE_PROMISE, SNAPSHOT_SHARE
from engine.run.facts import TRAINING
from engine.training.snapshot import Snapshot


@contextmanager
def resumable(checkpoints: Checkpoints, stage: str, block: int | None = None) -> Iterator[SnapshotKeeper]:
    """Around one training of ``stage``: of a block, or of the whole network.

    It begins where an earlier attempt was interrupted (``snapshot``), random numbers included; what it may be
    continued from is kept while it lasts, and forgotten by the next commit once it has ended well. When the
    context ends, nothing is being written any more.
    """
    snapshot = snapshot_of(checkpoints.store, stage, block)
    if snapshot is not None:
        restore_random_state(snapshot.tensors, checkpoints.report.device)
    keeper = SnapshotKeeper(checkpoints, stage, block, snapshot)
    try:
        yield keeper
    except BaseException as error:
        keeper.leave(error)
        raise
    keeper.finish_writing()
    forget_snapshot(checkpoints.store)


class SnapshotKeeper:
    """Keeps the states that one training offers (:class:`engine.training.progress.Keeper`)."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        stage: str,
        block: int | None = None,
        snapshot: Snapshot | None = None,
    ) -> None:
        """``snapshot`` is what an earlier attempt kept of this training."""
        self.checkpoints, self.report = checkpoints, checkpoints.report
        self.store, self.runtime = checkpoints.store, checkpoints.runtime
        self.stage, self.block, self.snapshot = stage, block, snapshot
        self._last = time.monotonic()
        self._writing: Writing[Committed] | None = None
        self._waited = 0.0
        """Seconds that training stood still for it."""

    def wants_state(self) -> bool:
        """Whether one is due, or a stop was asked for."""
        return self.report.stop_asked() is not None or self._is_due()

    def step_boundary(self, state: Callable[[], Snapshot] | None) -> None:
        """A state to continue from: kept when one is due; after a stop, kept and left. Without one, only an
        abort leaves."""
        stop = self.report.stop_asked()
        if state is None:
            if stop is not None and stop.abort:
                raise stop
            return
        if stop is None:
            if self._is_due():
                self.keep(state())
            return
        if not stop.abort:
            self.finish_writing()
            self.keep(state())
            self.finish_writing()
        raise stop

    def _is_due(self) -> bool:
        if self._writing is not None:
            if self._writing.running:
                return False
            self.finish_writing()
        runtime = self.runtime
        promised = PART_OF_THE_PROMISE * 60 * runtime.checkpoint_minutes
        affordable = self.checkpoints.cost / (SNAPSHOT_SHARE * runtime.checkpoint_share)
        return runtime.checkpoint_minutes > 0 and time.monotonic() - self._last >= max(promised, affordable)

    def keep(self, state: Snapshot) -> None:
        """Copy the state; a thread does the rest."""
        began = time.monotonic()
        # One after the other: what was gathered of several ranks for this is let go as it is copied.
        names = list(state.tensors)
        tensors = {name: state.tensors.pop(name).detach().to("cpu", copy=True) for name in names}
        tensors |= random_state(self.report.device)
        self._last = time.monotonic()
        self._waited = self._last - began
        facts = {"phase": self.stage, "block": self.block, **state.facts}
        self._writing = Writing(
            self.checkpoints,
            functools.partial(self._publish, tensors, facts, self._waited),
            bytes_of(tensors),
        )

    def _publish(self, tensors: dict[str, Tensor], facts: dict[str, Any], waited: float) -> Committed:
        self.store.put(TRAINING, tensors)
        self.store.remember(TRAINING, facts)
        committed = self.store.commit()
        self.checkpoints.say(committed, self.stage, self.block, facts["sampler"]["step"], waited)
        return committed

    def finish_writing(self) -> None:
        """Wait for the thread."""
        if self._writing is None:
            return
        committed = self._writing.result()
        self._writing = None  # and with it the copy of the state
        # On a GPU training goes on while the host writes, a CPU does one or the other.
        on_cpu = self.report.device.type == "cpu"
        self.checkpoints.cost = self._waited + (committed.seconds if on_cpu else 0.0)

    def leave(self, error: BaseException) -> None:
        """The training ends by ``error``: what is being written counts all the same."""
        if self._writing is not None:
            self._writing.leave(error)


def snapshot_of(store: CheckpointStore, stage: str, block: int | None = None) -> Snapshot | None:
    """Where an earlier attempt's training of this stage and block can be continued."""
    facts = store.fact(TRAINING)
    if facts is None or (facts["phase"], facts["block"]) != (stage, block):
        return None
    return Snapshot(store.get(TRAINING), facts)


def forget_snapshot(store: CheckpointStore) -> None:
    """What was trained to its end needs no state to continue from."""
    store.drop(TRAINING)
    store.forget(TRAINING)


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The generators' states, by entry name."""
    states = {"random.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["random.cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_random_state(tensors: Mapping[str, Tensor], device: torch.device) -> None:
    """Put the generators where they were."""
    torch.set_rng_state(tensors["random.cpu"])
    if device.type == "cuda" and "random.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random.cuda"], device)
