"""What the running engine says: events, status, heartbeat; and what it hears: requests to stop.

The methods know this object only as :class:`engine.training.progress.Progress`. All of it is cheap: a
metric is written at most four times a second, the status file is replaced by a thread every two seconds, and
requests are looked for twice a second.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

import torch

from engine import telemetry
from engine.errors import EqatError, ExitCode, StopRequested, run_is_gone
from engine.run import event_log, events
from engine.run.control import STOP_SIGNALS, acknowledge, pending
from engine.run.directory import RunDirectory
from engine.run.housekeeping import clean_temporaries
from engine.run.peaks import larger
from engine.run.proof import FolderIdentity
from engine.run.status import LONGEST_FAILURE, Status, write_status
from engine.run.task import RUN, Task
from engine.time_left import Estimate, TimeLeft

CONTROL_SECONDS = 0.5
STATUS_SECONDS = 2.0
# The main loop may be silent this long before a reader calls the run hung; slow single operations ask for
# more.
GRACE_SECONDS = 60.0


class Reporter:
    """One attempt's voice. Create it once the lock is held; close it last."""

    def __init__(
        self, run: RunDirectory, attempt: int, device: torch.device, rank: int = 0, *, task: Task = RUN
    ) -> None:
        self.run, self.attempt, self.device, self.task = run, attempt, device, task
        self.rank = rank
        self._place = FolderIdentity.at(run.path)
        if rank == 0:
            clean_temporaries(run)
        self.events = event_log.EventWriter(run.events_path, attempt, rank=rank)
        self.started = time.monotonic()
        self.phases: list[str] = []
        self._estimate = TimeLeft()
        self._estimating = threading.Lock()
        self.phase_name: str = "prepare"
        self._phase_began = self._block_began = time.monotonic()
        self._block: int | None = None
        self._blocks: int | None = None
        self._step = self._steps = 0
        self._counted = False
        self._beat, self._grace = time.time(), GRACE_SECONDS
        self._last_metric = self._last_control = 0.0
        self._signals = 0
        self._signal_code = ExitCode.ABORTED
        self._warned = False
        self._requested: StopRequested | None = None
        self._failure = ""
        self._outcome: events.Outcome | None = None
        self._exit_code: int | None = None
        self.doing = "planning"
        """What is done where nothing can be counted, in words."""
        self.waiting = ""
        """Why nothing happens at the moment; shown by whoever follows the run."""
        self._waits_since = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._keep_status, name="status", daemon=True)
        if rank == 0:
            self._thread.start()

    def begin(self, phases: list[str], predicted_seconds: Mapping[str, float]) -> None:
        """Announce what is to come: the phases, and how long the plan thinks each will take."""
        self.phases = phases
        with self._estimating:
            self._estimate = TimeLeft(phases, predicted_seconds)

    def peaks(self) -> events.RankPeaks:
        """Of this process, since the phase began."""
        return events.RankPeaks(
            rank=self.rank,
            peak_gpu_bytes=telemetry.peak_gpu_bytes(self.device),
            peak_host_bytes=telemetry.peak_host_bytes(),
        )

    # Hearing

    def listen(self) -> None:
        """Install the signal handlers. What was sent and held back until now is heard now.

        The first SIGINT or SIGTERM stops at the next step, the second aborts. SIGUSR1, by which batch systems
        warn before they kill, stops too, and never aborts: SIGTERM follows it. A terminal that hangs up is
        none of our business.
        """
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # Only flags: anything more could run in the middle of a write.
        if number == signal.SIGUSR1:
            self._warned = True
            return
        self._signals += 1
        # Two signals that wait together are handed over in an order that is not the one they were sent in, so
        # the code depends on which came, not on which came last.
        if number == signal.SIGTERM:
            self._signal_code = ExitCode.TERMINATED

    def stop_asked(self) -> StopRequested | None:
        """Whether somebody wants the run to stop, or to abort; beats."""
        self.beat()
        if self._signals > 1:
            return StopRequested(abort=True, exit_code=self._signal_code)
        self._hear_requests()
        if self._requested is None and (self._signals or self._warned):
            return StopRequested()
        return self._requested

    def _hear_requests(self) -> None:
        """Requests in the control directory, looked for twice a second; so is the directory itself."""
        now = time.monotonic()
        if now - self._last_control < CONTROL_SECONDS:
            return
        self._last_control = now
        if self.is_gone():
            raise run_is_gone(self.run.path)
        for request in pending(self.run):
            acknowledge(self.run, request.id)
            self.emit(events.ControlAck(request=request.request, id=request.id))
            if request.request == "abort":
                self._requested = StopRequested(abort=True, exit_code=ExitCode.ABORTED)
            elif self._requested is None:
                self._requested = StopRequested()

    def is_gone(self) -> bool:
        """Whether the run was deleted or moved, or something else lies in its place."""
        return FolderIdentity.at(self.run.path) != self._place

    def leave_if_asked(self) -> None:
        """A place where nothing is lost by leaving: raises :class:`StopRequested` when asked to stop."""
        stop = self.stop_asked()
        if stop is not None:
            raise stop

    # Saying

    def emit(self, event: events.Event) -> None:
        self.events.emit(event)

    def beat(self) -> None:
        """Note that the main loop is alive."""
        self._beat, self._grace = time.time(), GRACE_SECONDS

    def expect_silence(self, seconds: float) -> None:
        """Announce one long operation, so that it is not mistaken for a hang."""
        self._beat, self._grace = time.time(), max(GRACE_SECONDS, seconds)

    def due(self) -> bool:
        self.beat()
        return time.monotonic() - self._last_metric >= event_log.METRIC_INTERVAL_S

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
        now = time.monotonic()
        began = self._block_began if self._block is not None else self._phase_began
        if not self._counted and step > 1:  # a training that goes on inside a block, or inside its phase
            with self._estimating:
                self._estimate.restored(((self._block or 0) + (step - 1) / steps) / (self._blocks or 1), now)
        self._counted = True
        self._last_metric, self._step, self._steps = now, step, steps
        self.emit(
            events.Metric(
                phase=self.phase_name,
                block=self._block,
                step=step,
                steps=steps,
                epoch=epoch,
                loss=loss,
                val_loss=val_loss,
                grad_norm=grad_norm,
                lr=dict(lr or {}),
                tokens_per_second=tokens / (now - began) if tokens else None,
            )
        )

    def step(self, done: int, total: int) -> None:
        """Progress of a phase without metrics (an evaluation, an export)."""
        self._step, self._steps = done, total
        self.leave_if_asked()

    def warning(self, code: str, message: str, hint: str = "") -> None:
        self.emit(events.Warning(code=code, message=message, hint=hint))

    def pause(self, why: str) -> None:
        """Nothing happens from now on, and why; whoever follows the run is told."""
        self._waits_since = time.monotonic()
        self.waiting = why
        if self.task == "run":
            from engine.run.notify import notify

            threading.Thread(target=notify, args=(self.run, "waiting", why), daemon=True).start()

    def go_on(self) -> float:
        """Something happens again. Returns the seconds that nothing did, which count for no phase."""
        if not self.waiting:
            return 0.0
        with self._estimating:
            waited = time.monotonic() - self._waits_since
            self._estimate.paused(waited)
            self._phase_began += waited
            self.waiting = ""
        return waited

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Bracket a phase with events; its peaks are its own."""
        telemetry.reset_peaks(self.device)
        self.phase_name, self.doing = name, ""
        self._phase_began = time.monotonic()
        with self._estimating:
            self._block = self._blocks = None
            self._step = self._steps = 0
            self._counted = False
            self._estimate.phase_begins(name, self._phase_began)
        index = self.phases.index(name) if name in self.phases else len(self.phases)
        self.emit(events.PhaseStarted(phase=name, index=index, phases=len(self.phases)))
        self.ranks: tuple[events.RankPeaks, ...] = ()
        """Of a phase that several processes make together, each one's peaks once it is made."""
        yield
        seconds = time.monotonic() - self._phase_began
        with self._estimating:
            self._estimate.phase_ends(self._phase_began + seconds)
        peaks = self.ranks or (self.peaks(),)
        self.emit(
            events.PhaseFinished(
                phase=name,
                seconds=seconds,
                peak_gpu_bytes=larger(*(one.peak_gpu_bytes for one in peaks)),
                peak_host_bytes=larger(*(one.peak_host_bytes for one in peaks)),
                ranks=self.ranks,
            )
        )

    def block_started(self, block: int, blocks: int) -> None:
        self._block, self._blocks, self._block_began = block, blocks, time.monotonic()
        self._step = self._steps = 0
        self.emit(events.BlockStarted(phase=self.phase_name, block=block, blocks=blocks))

    def block_finished(
        self,
        initial_loss: float | None = None,
        final_loss: float | None = None,
        val_loss: float | None = None,
        restored: bool = False,
    ) -> None:
        assert self._block is not None
        seconds = time.monotonic() - self._block_began
        self.emit(
            events.BlockFinished(
                phase=self.phase_name,
                block=self._block,
                initial_loss=initial_loss,
                final_loss=final_loss,
                val_loss=val_loss,
                seconds=seconds,
                restored=restored,
            )
        )
        if restored:
            with self._estimating:
                self._estimate.restored((self._block + 1) / (self._blocks or 1), time.monotonic())

    # Status

    def time_left(self) -> Estimate:
        """How long the attempt still takes, as far as that can be said."""
        with self._estimating:
            now = self._now()
            fraction = self._fraction_done()
            if fraction is not None:
                self._estimate.at(fraction, now)
            return self._estimate.estimate(now)

    def _now(self) -> float:
        """The clock that phases are measured by, which stands still while nothing happens."""
        return self._waits_since if self.waiting else time.monotonic()

    def _fraction_done(self) -> float | None:
        # Each read once: the main thread goes on to the next phase meanwhile.
        block, blocks, step, steps = self._block, self._blocks, self._step, self._steps
        inner = step / steps if steps else 0.0
        if blocks:
            inner = ((block or 0) + inner) / blocks
        return min(1.0, inner) if inner > 0 else None

    def _status(self) -> Status:
        left = self.time_left()
        return Status(
            phase=self.phase_name,
            block=self._block,
            blocks=self._blocks,
            step=self._step,
            steps=self._steps,
            doing=self.doing,
            phase_s=self._now() - self._phase_began,
            eta_s=left.seconds,
            eta_measured=left.measured,
            over_s=left.over,
            heartbeat=self._beat,
            grace_s=self._grace,
            attempt=self.attempt,
            events_dropped=self.events.dropped,
            waiting=self.waiting,
            outcome=self._outcome,
            exit_code=self._exit_code,
            failure=self._failure,
        )

    def _keep_status(self) -> None:
        while True:
            ended = self._done.is_set()  # before the last status, which alone knows all that was dropped
            # On a full disk this says no and nothing else: a stale status only makes the run look slow.
            write_status(self.run, self._status())
            if ended:
                return
            self._done.wait(STATUS_SECONDS)

    def position(self) -> str:
        """Where the run is, for messages."""
        parts: list[str] = [self.phase_name]
        if self._block is not None:
            parts.append(f"block {self._block}")
        if self._steps:
            parts.append(f"step {self._step} of {self._steps}")
        return ", ".join(parts)

    def fail(self, error: EqatError) -> None:
        """Record why the attempt ends."""
        self._failure = str(error)[:LONGEST_FAILURE]
        self.emit(events.error_event(error))

    def finish(
        self, outcome: events.Outcome, exit_code: ExitCode, leaves: events.Outcome | None = None
    ) -> None:
        """The last event; ``leaves`` is the run's state where that is not how this attempt ended."""
        seconds = time.monotonic() - self.started
        self._outcome, self._exit_code = leaves or outcome, int(exit_code)
        self.emit(
            events.RunFinished(
                outcome=outcome, exit_code=int(exit_code), seconds=seconds, leaves=leaves, task=self.task
            )
        )

    def close(self) -> None:
        self._done.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)
        self.events.close()
