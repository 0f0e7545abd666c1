"""What a run looks like now, computed from its events alone.

:meth:`RunState.apply` takes one event and returns the next state. It is pure, so a screen that follows a
run and a command that reads it once a week later show the same; and total, so no log, however its
attempts were cut off and resumed, can make it fail. Memory stays bounded over a run of days: metrics are
thinned, and of warnings the first and the last are kept.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from engine.config.stages import STAGES, versions
from engine.errors import ExitCode
from engine.run import events
from engine.run.directory import RunDirectory
from engine.run.event_log import read_events
from engine.run.events import Event
from engine.run.measures import MOST_ERRORS, MOST_SCORES, MOST_TEXTS, Divergence, TaskScore, TextMeasure
from engine.run.peaks import larger, larger_of_each, of_reading
from engine.run.status import Status, read_status
from engine.run.task import RUN, is_job
from engine.run.thinning import MAX_METRICS, MAX_READINGS, Bulk, appended, before
from engine.system.guarded import bad_file

MAX_WARNINGS = 200
MAX_BLOCKS = 1024
"""No model has as many: a block with a larger number comes from a damaged log, and a table as long would
never be drawn."""
MAX_EXPORTS = 16


class PhaseRow(msgspec.Struct, frozen=True, kw_only=True):
    """One phase; ``seconds`` and peaks are over all attempts that worked on it."""

    name: str
    index: int = 0
    seconds: float = 0.0
    peak_gpu_bytes: int | None = None
    peak_host_bytes: int | None = None
    started: bool = True
    finished: bool = False
    ranks: tuple[events.RankPeaks, ...] = ()
    """Of several processes that made it together, each one's peaks."""


class BlockRow(msgspec.Struct, frozen=True, kw_only=True):
    """One decoder block in one phase."""

    phase: str
    index: int
    initial_loss: float | None = None
    final_loss: float | None = None
    val_loss: float | None = None
    seconds: float | None = None
    finished: bool = False
    restored: bool = False


class RunState(msgspec.Struct, frozen=True, kw_only=True):
    """Everything the screens and ``--json`` show of a run, except its configuration and liveness."""

    # The attempt that is running, or ran last.
    id: str = ""
    attempt: int = 0
    pid: int = 0
    host: str = ""
    device: str = ""
    versions: dict[str, str] = {}
    argv: tuple[str, ...] = ()
    task: str = RUN
    """What the attempt does: the run itself, or (in :attr:`job`) something with it."""
    attempt_t: float | None = None
    """Wall clock of its first word."""
    first_t: float | None = None
    """Wall clock of the first event."""
    last_t: float | None = None
    """Wall clock of the latest event."""
    event_count: int = 0
    """Events seen."""
    outcome: events.Outcome | None = None
    exit_code: int | None = None
    seconds: float = 0.0
    """Working time of the attempts that are over; :meth:`accounted` adds that of one that is not."""

    job: RunState | None = None
    """What was done with the run last, or is being done: an evaluation, an export, a sample. An attempt of
    its own, with its own phases, readings, end and error; what it achieves is the run's."""

    # Where it is.
    phase: str | None = None
    phase_count: int = 0
    block: int | None = None
    blocks: int | None = None
    step: int | None = None
    steps: int | None = None
    epoch: int | None = None

    # What it did.
    plan: dict[str, Any] | None = None
    phases: tuple[PhaseRow, ...] = ()
    block_rows: dict[tuple[str, int], BlockRow] = {}
    metrics: tuple[events.Metric, ...] = ()
    """Training steps, oldest first: the recent ones as logged, older ones thinned."""
    memory: events.Memory | None = None
    readings: tuple[events.Memory, ...] = ()
    """Samples of the machine, oldest first, thinned like the metrics."""
    evaluations: dict[str, events.Eval] = {}
    """The latest evaluation of each stage."""
    checkpoint: events.CheckpointCommitted | None = None
    exports: dict[str, events.Export] = {}
    """The latest export of each format."""
    own_formats: frozenset[str] = frozenset()
    """Those that the run itself wrote, not a later export."""
    samples: dict[str, events.Sample] = {}
    """The latest text that each version of the model wrote, by stage."""
    acknowledged: tuple[events.ControlAck, ...] = ()
    warnings: tuple[events.Warning, ...] = ()
    error: events.Error | None = None
    status: Status | None = None
    """The latest ``status.json``, for what only it knows: the time left."""

    # Clocks of the attempt and the phase that are open, to account for what is cut off.
    began: float | None = None
    """When the attempt began to work, its libraries being loaded; none once it has told its end."""
    open_since: float | None = None
    last_mono: float = 0.0

    def apply(self, event: Event) -> RunState:
        """The state after ``event``; never raises, never changes ``self``."""
        if not is_job(self.task) and (_begins_job(event) or _is_of(self.job, event)):
            return _apply_to_job(self, event)
        begins = isinstance(event, events.RunStarted | events.AttemptStarting)
        state = _begin_attempt(self, event) if begins or event.attempt != self.attempt else self
        state = _change(
            state,
            event_count=state.event_count + 1,
            first_t=event.t if state.first_t is None else state.first_t,
            last_t=event.t,
            last_mono=event.mono,
        )
        handler = _HANDLERS.get(type(event))
        return handler(state, event) if handler is not None else state

    def apply_all(self, new: Iterable[Event]) -> RunState:
        """The state after ``new``: what :meth:`apply` makes of them one by one, in a fraction of the time.

        Nineteen events in twenty are metrics and readings of the machine. Between two of another kind they
        are collected in lists, which a state that never changes cannot do.
        """
        state, bulk = self, Bulk()
        for event in new:
            if isinstance(event, events.Metric | events.Memory) and event.attempt == state.attempt:
                bulk.take(state, event)
            else:
                state = _change(state, **bulk.changes(state)).apply(event)
                bulk = Bulk()
        after: RunState = _change(state, **bulk.changes(state))
        return after

    @property
    def eta_s(self) -> float | None:
        """Seconds left, as the engine last estimated them."""
        return self.status.eta_s if self.status is not None else None

    @property
    def at_work(self) -> RunState:
        """Whose position and readings are shown while an engine works: the job's, unless that has ended, else
        the run's own."""
        return self.job if self.job is not None and self.job.outcome is None else self

    @property
    def newest_attempt(self) -> int:
        """The attempt that spoke last."""
        return max(self.attempt, self.job.attempt if self.job is not None else 0)

    def with_status(self, status: Status | None) -> RunState:
        """The same with what only ``status.json`` knows: the time left, and how far a phase is that counts
        windows or tensors and not steps of a training. One that an earlier attempt left says nothing."""
        if status is None or status.attempt < self.newest_attempt:
            return _change(_placed(self, None), job=self.job and _placed(self.job, None))
        if self.job is not None and self.at_work is self.job:
            return _change(_placed(self, None), job=_placed(self.job, status))
        return _placed(self, status)

    def blocks_of(self, phase: str) -> list[BlockRow]:
        """The blocks of one phase, in order."""
        return sorted((row for row in self.block_rows.values() if row.phase == phase), key=lambda r: r.index)

    def accounted(self) -> RunState:
        """The same with the phase and the attempt that are open counted up to the last event."""
        return _close_attempt(_close_phase(self))

    @property
    def worked_s(self) -> float:
        """Seconds of work in all attempts, the phase that is open included."""
        return sum(row.seconds for row in self.accounted().phases)

    def trained_blocks(self) -> list[BlockRow]:
        """The blocks as the run quantized them: by a method, else by rounding."""
        made = {row.phase for row in self.block_rows.values()}
        by = [stage.name for stage in STAGES if stage.scope == "block" and not stage.baseline]
        named = next((name for name in (*by, *sorted(made - set(STAGES.names()))) if name in made), None)
        return self.blocks_of(named or next(stage.name for stage in STAGES if stage.baseline and stage.run))

    def perplexity(self) -> dict[str, float | None]:
        """Perplexity by stage; ``None`` for one that was not evaluated or was not finite."""
        return {stage: _perplexity(self.evaluations.get(stage)) for stage in versions(self.evaluations)}

    def divergence(self) -> dict[str, Divergence]:
        """How far each quantized version is from full precision, where that was measured."""
        found = {stage: self.evaluations.get(stage) for stage in versions(self.evaluations)}
        return {stage: one.divergence for stage, one in found.items() if one and one.divergence}

    def block_errors(self) -> dict[str, tuple[float | None, ...]]:
        """Relative error behind each block of each quantized version, where that was measured."""
        found = {stage: self.evaluations.get(stage) for stage in versions(self.evaluations)}
        return {
            stage: one.block_errors[:MOST_ERRORS] for stage, one in found.items() if one and one.block_errors
        }

    def texts(self) -> dict[str, dict[str, TextMeasure]]:
        """What was measured on texts other than the run's own, by text and stage."""
        made: dict[str, dict[str, TextMeasure]] = {}
        for stage in versions(self.evaluations):
            found = self.evaluations.get(stage)
            for one in found.texts[:MOST_TEXTS] if found is not None else ():
                made.setdefault(one.corpus, {})[stage] = one
        return made

    def answer_perplexity(self) -> dict[str, float | None]:
        """Perplexity of the answers of held-out conversations by stage, for stages that were measured so."""
        return {
            stage: found.answer_perplexity
            for stage in versions(self.evaluations)
            if (found := self.evaluations.get(stage)) is not None and found.answer_tokens
        }

    def scores(self) -> dict[str, tuple[TaskScore, ...]]:
        """Of tasks that lm-eval asked, by stage."""
        found = {stage: self.evaluations.get(stage) for stage in versions(self.evaluations)}
        return {stage: one.scores[:MOST_SCORES] for stage, one in found.items() if one and one.scores}

    def smallest_export(self) -> events.Export | None:
        """The export whose size stands for the run's: some formats unpack what was quantized. One that was
        asked for later changes nothing of it, where the run has some of its own."""
        own = [done for name, done in self.exports.items() if name in self.own_formats]
        return min(own or self.exports.values(), key=lambda done: done.bytes, default=None)

    def accuracy(self) -> dict[str, dict[str, float]]:
        """Share of right answers by stage and task, for stages that were asked."""
        return {
            stage: found.accuracy
            for stage in versions(self.evaluations)
            if (found := self.evaluations.get(stage)) is not None and found.accuracy
        }


# -- one handler per kind of event ---------------------------------------------------------------------


def _begin_attempt(state: RunState, event: Event) -> RunState:
    """A new attempt clears how the last one ended and where it was, and keeps what was achieved."""
    state = _close_phase(state)
    # What tells of itself once its libraries are loaded has begun before.
    first_t = state.attempt_t if event.attempt == state.attempt and state.phase is None else None
    if event.attempt != state.attempt:
        state = _close_attempt(state)
    starts = isinstance(event, events.AttemptStarting)  # which is not counted where it is told to its end
    return _change(
        state,
        attempt=event.attempt,
        attempt_t=event.t if first_t is None else first_t,
        began=event.mono if state.began is None and not starts else state.began,
        job=None,
        outcome=None,
        exit_code=None,
        error=None,
        phase=None,
        phase_count=0,
        **_NOWHERE,
    )


def _begins_job(event: Event) -> bool:
    return isinstance(event, events.RunStarted | events.AttemptStarting) and is_job(event.task)


def _is_of(job: RunState | None, event: Event) -> bool:
    return job is not None and event.attempt == job.attempt


def _apply_to_job(state: RunState, event: Event) -> RunState:
    """``event`` of something that is done with the run: it moves the job; what it achieves is the run's."""
    job = state.job
    if job is None or not _is_of(job, event):
        assert isinstance(event, events.RunStarted | events.AttemptStarting)
        job = RunState(id=state.id, task=event.task, attempt=event.attempt)
    state = _change(
        state,
        job=job.apply(event),
        event_count=state.event_count + 1,
        first_t=event.t if state.first_t is None else state.first_t,
        last_t=event.t,
    )
    if isinstance(event, events.RunFinished):
        return _after_job(state, event)
    if isinstance(event, events.RunStarted | events.AttemptStarting) and state.outcome is None:
        return _change(state, outcome=event.leaves)  # the log had no room for the run's own end
    return _HANDLERS[type(event)](state, event) if isinstance(event, _ACHIEVED) else state


def _after_job(state: RunState, event: events.RunFinished) -> RunState:
    """A job leaves the run what it was, unless it was what the run still lacked, or has found it damaged."""
    if event.leaves is not None:
        return _change(state, outcome=event.leaves)
    error = state.job.error if state.job is not None and event.outcome == "failed" else None
    return _change(state, outcome=event.outcome, exit_code=event.exit_code, error=error)


def _attempt_starting(state: RunState, event: events.AttemptStarting) -> RunState:
    return _change(state, pid=event.pid, host=event.host, task=event.task)


def _run_started(state: RunState, event: events.RunStarted) -> RunState:
    return _change(
        state,
        id=event.id,
        pid=event.pid,
        host=event.host,
        device=event.device,
        versions=event.versions,
        argv=tuple(event.argv),
        task=event.task,
    )


def _plan(state: RunState, event: events.Plan) -> RunState:
    return _change(state, plan=event.plan)


def _phase_started(state: RunState, event: events.PhaseStarted) -> RunState:
    state = _close_phase(state)
    here = {"phase": event.phase, "phase_count": event.phases, **_NOWHERE}
    row = _change(_phase_row(state, event.phase), index=event.index, started=True, finished=False)
    return _change(state, phases=_with_phase(state.phases, row), open_since=event.mono, **here)


def _phase_finished(state: RunState, event: events.PhaseFinished) -> RunState:
    row = _phase_row(state, event.phase)
    row = _change(
        row,
        seconds=row.seconds + event.seconds,
        peak_gpu_bytes=larger(row.peak_gpu_bytes, event.peak_gpu_bytes),
        peak_host_bytes=larger(row.peak_host_bytes, event.peak_host_bytes),
        ranks=larger_of_each(row.ranks, event.ranks),
        finished=True,
    )
    # The event carries the seconds of this attempt's part: they must not be counted again on closing.
    still_open = None if event.phase == state.phase else state.open_since
    return _change(state, phases=_with_phase(state.phases, row), open_since=still_open)


def _block_started(state: RunState, event: events.BlockStarted) -> RunState:
    key = (event.phase, event.block)
    row = state.block_rows.get(key) or BlockRow(phase=event.phase, index=event.block)
    return _change(
        state,
        block_rows=_with_block(state.block_rows, key, row),
        block=event.block,
        blocks=event.blocks,
        step=None,
        steps=None,
        epoch=None,
    )


def _block_finished(state: RunState, event: events.BlockFinished) -> RunState:
    key = (event.phase, event.block)
    row = state.block_rows.get(key) or BlockRow(phase=event.phase, index=event.block)
    if event.restored and row.finished:
        # Reading it back took no training: the losses and seconds of the attempt that trained it stay.
        row = _change(row, restored=True)
    else:
        row = BlockRow(
            phase=event.phase,
            index=event.block,
            initial_loss=event.initial_loss,
            final_loss=event.final_loss,
            val_loss=event.val_loss,
            seconds=event.seconds,
            finished=True,
            restored=event.restored,
        )
    return _change(state, block_rows=_with_block(state.block_rows, key, row))


def _with_block(
    rows: dict[tuple[str, int], BlockRow], key: tuple[str, int], row: BlockRow
) -> dict[tuple[str, int], BlockRow]:
    return {**rows, key: row} if 0 <= row.index < MAX_BLOCKS else rows


def _metric(state: RunState, event: events.Metric) -> RunState:
    return _change(
        state,
        metrics=tuple(appended(before(list(state.metrics), event), event, MAX_METRICS)),
        block=event.block,
        step=event.step,
        steps=event.steps,
        epoch=event.epoch,
    )


def _memory(state: RunState, event: events.Memory) -> RunState:
    return _change(state, memory=event, readings=tuple(appended(list(state.readings), event, MAX_READINGS)))


def _eval(state: RunState, event: events.Eval) -> RunState:
    return _change(state, evaluations={**state.evaluations, event.stage: event})


def _checkpoint(state: RunState, event: events.CheckpointCommitted) -> RunState:
    return _change(state, checkpoint=event)


def _export(state: RunState, event: events.Export) -> RunState:
    others = {name: done for name, done in state.exports.items() if name != event.format}
    if len(others) >= MAX_EXPORTS:
        del others[next(iter(others))]
    own = state.own_formats | ({event.format} if event.attempt == state.attempt else set())
    return _change(state, exports={**others, event.format: event}, own_formats=own)


def _sample(state: RunState, event: events.Sample) -> RunState:
    return _change(state, samples={**state.samples, event.stage: event})


def _control_ack(state: RunState, event: events.ControlAck) -> RunState:
    return _change(state, acknowledged=(*state.acknowledged[-9:], event))


def _warning(state: RunState, event: events.Warning) -> RunState:
    warnings = (*state.warnings, event)
    if len(warnings) > MAX_WARNINGS:  # the first ones often say why the later ones came
        half = MAX_WARNINGS // 2
        warnings = warnings[:half] + warnings[half + 1 :]
    return _change(state, warnings=warnings)


def _error(state: RunState, event: events.Error) -> RunState:
    return _change(state, error=event)


def _run_finished(state: RunState, event: events.RunFinished) -> RunState:
    state = _close_phase(state)
    return _change(
        state,
        # A job's own end is that of its attempt; of an attempt at the run it is what it leaves.
        outcome=event.outcome if is_job(state.task) else event.leaves or event.outcome,
        exit_code=event.exit_code,
        seconds=state.seconds + event.seconds,
        began=None,
    )


_HANDLERS: dict[type[Event], Any] = {
    events.RunStarted: _run_started,
    events.AttemptStarting: _attempt_starting,
    events.Plan: _plan,
    events.PhaseStarted: _phase_started,
    events.PhaseFinished: _phase_finished,
    events.BlockStarted: _block_started,
    events.BlockFinished: _block_finished,
    events.Metric: _metric,
    events.Memory: _memory,
    events.Eval: _eval,
    events.CheckpointCommitted: _checkpoint,
    events.Export: _export,
    events.Sample: _sample,
    events.ControlAck: _control_ack,
    events.Warning: _warning,
    events.Error: _error,
    events.RunFinished: _run_finished,
}

_ACHIEVED = (events.Eval, events.CheckpointCommitted, events.Export, events.Sample, events.Warning)
"""Of a job, what is the run's."""
_NOWHERE: dict[str, Any] = {"block": None, "blocks": None, "step": None, "steps": None, "epoch": None}


def _change(struct: Any, **changes: Any) -> Any:
    return msgspec.structs.replace(struct, **changes)


def _placed(state: RunState, status: Status | None) -> RunState:
    """``state`` with ``status``, and its count where the phase has none of its own."""
    placed: RunState = _change(state, status=status)
    if status is not None and status.failure and state.error is None and state.outcome is None:
        # The log had no room for the error.
        code = status.exit_code or int(ExitCode.BUG)
        told = events.Error(code="", where="", message=status.failure, hint="", exit_code=code)
        return _change(placed, error=told)
    if status is None or status.phase != state.phase or state.outcome is not None:
        return placed
    last = state.metrics[-1] if state.metrics else None
    if last is not None and (last.attempt, last.phase) == (state.attempt, state.phase):
        return placed  # a training tells its steps sooner
    return _change(placed, step=status.step if status.steps else None, steps=status.steps or None)


def _close_attempt(state: RunState) -> RunState:
    """Account for an attempt that is at work, or was cut off: up to its last event."""
    if state.began is None:
        return state
    worked: RunState = _change(
        state, seconds=state.seconds + max(0.0, state.last_mono - state.began), began=None
    )
    return worked


def _close_phase(state: RunState) -> RunState:
    """Account for a phase that ends without saying so: up to the last event of its attempt, with the peaks of
    the last reading."""
    if state.open_since is None or state.phase is None:
        return state
    row = _phase_row(state, state.phase)
    row = _change(row, seconds=row.seconds + max(0.0, state.last_mono - state.open_since))
    last = state.memory
    if last is not None and last.attempt == state.attempt and last.mono >= state.open_since:
        ranks = of_reading(last)
        row = _change(
            row,
            peak_gpu_bytes=larger(row.peak_gpu_bytes, last.gpu_peak, *(one.peak_gpu_bytes for one in ranks)),
            peak_host_bytes=larger(
                row.peak_host_bytes, last.host_peak, *(one.peak_host_bytes for one in ranks)
            ),
            ranks=larger_of_each(row.ranks, ranks),
        )
    closed: RunState = _change(state, phases=_with_phase(state.phases, row), open_since=None)
    return closed


def _phase_row(state: RunState, name: str) -> PhaseRow:
    return next((row for row in state.phases if row.name == name), PhaseRow(name=name))


def _with_phase(rows: tuple[PhaseRow, ...], changed: PhaseRow) -> tuple[PhaseRow, ...]:
    if any(row.name == changed.name for row in rows):
        return tuple(changed if row.name == changed.name else row for row in rows)
    return (*rows, changed)


def _perplexity(evaluation: events.Eval | None) -> float | None:
    return evaluation.perplexity if evaluation is not None else None


# -- reading a run -------------------------------------------------------------------------------------


def load_state(run: RunDirectory, *, skip: frozenset[str] = frozenset()) -> RunState:
    """The state of ``run`` from its whole log and its status.

    ``skip`` names kinds of events to pass over, but for those that tell until when attempts have worked.
    """
    state = RunState(id=run.id)
    try:
        written, _ = read_events(run.events_path, skip=skip, last=True)
    except OSError as error:
        raise bad_file(error, run.events_path) from error
    state = state.apply_all(written)
    return msgspec.structs.replace(state, id=run.id).with_status(read_status(run))
