"""What the monitor says about a run: progress, blocks, losses, machine, and what the user asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from engine.config.stages import STAGES, phase_label
from engine.run import events
from engine.run.deaths import KILLED
from engine.run.state import MAX_BLOCKS, BlockRow, RunState
from engine.run.task import job_name
from eqat_tui.display import fraction, left_words
from eqat_tui.feed import RunView
from eqat_tui.journal import Entry
from eqat_tui.lines import Line, Span, bar, beside, columns, cut, in_few, line, squeezed, width_of, wrap
from eqat_tui.output import (
    cell,
    counted,
    format_clock,
    format_number,
    format_seconds,
    format_time,
    number,
    share,
)
from eqat_tui.planned import branch, known
from eqat_tui.run_text import silence
from eqat_tui.words import block_place, hint_for_app, model_name, within_run

MOST_LINES = 4
"""Of one notice: what went wrong must not push away where the run is."""

STATE_ROLES = {
    "running": "accent",
    "starting": "accent",
    "waiting": "muted",
    "created": "muted",
    "done": "good",
    "stopped": "warn",
    "aborted": "warn",
    "hung": "bad",
    "crashed": "bad",
    "failed": "bad",
    "gone": "bad",
}
STATE_MARKS = {
    "running": "▶",
    "starting": "▶",
    "waiting": "·",
    "created": "○",
    "done": "✓",
    "stopped": "■",
    "aborted": "■",
    "hung": "?",
    "crashed": "✗",
    "failed": "✗",
    "gone": "✗",
}


# -- title and progress --------------------------------------------------------------------------------


def what(config: Mapping[str, Any] | None) -> str:
    """``SmolLM2-135M-Instruct w3g64``."""
    if not config:
        return "?"
    return cell(f"{model_name(branch(config, 'model', 'source'))} {grid_name(config)}")


def grid_name(config: Mapping[str, Any]) -> str:
    """``w3g64``."""
    size = branch(config, "grid", "group_size")
    return f"w{branch(config, 'grid', 'bits')}{'channel' if size == -1 else f'g{size}'}"


def state_span(view: RunView) -> Span:
    """The state with its mark, as words and colour."""
    words: str = view.liveness
    if view.trouble:
        return "? no connection", "warn"
    if view.waiting:
        return "‖ paused: disk full", "warn"
    if view.replay is not None:
        if view.replay.position >= 1:
            return "■ replay, at its end", "accent"
        held = view.replay.paused
        return "‖ replay, held" if held else f"▶ replay ×{view.replay.speed:g}", "accent"
    if view.job is not None:
        mark = STATE_MARKS.get(view.job.state, "?")
        return f"{STATE_MARKS.get(words, '?')} {words}, {mark} {job_name(view.job.task)}", "accent"
    where = f" {view.place}" if view.place else ""
    return f"{STATE_MARKS.get(words, '?')} {words}{where}", STATE_ROLES.get(words, "")


def title(view: RunView, width: int) -> Line:
    """Which run."""
    attempt = f"attempt {view.state.attempt}" if view.state.attempt > 1 else ""
    right = line((attempt or view.state.device, "muted"))
    room = max(0, width - width_of(right) - 2 - len(what(view.config)) - 2)
    name = f"{view.host}:{view.id}" if view.host else view.id
    name = name if len(name) <= room else f"…{name[len(name) - room + 1 :]}" if room > 1 else ""
    left = line((what(view.config), "strong"), "  ", (name, "muted"))  # of a long name the end tells it apart
    return beside(cut(left, width - width_of(right) - 2), right, width)


def elapsed(state: RunState) -> float:
    """Seconds of work in all attempts, the phase that is open included."""
    return state.worked_s


def remaining(view: RunView) -> str:
    """The time left, in words: the engine's estimate, and in a replay that of the replay."""
    return left_words(view.at_work) if view.live or view.replay is not None else ""


def share_done(state: RunState, left_s: float | None = None) -> float | None:
    """How much of the whole run is done.

    Where a time left is known the share is that of the work in it, so the two never contradict each other.
    Otherwise the phases are weighed by the plan's seconds, those that are finished by what they really took.
    """
    worked = elapsed(state)
    if left_s is not None and worked + left_s > 0:
        return share(worked, worked + left_s)
    plan = known(state.plan)
    took = {row.name: row.seconds for row in state.accounted().phases if row.finished}
    seconds = {phase["name"]: took.get(phase["name"], phase["seconds"] or 0.0) for phase in plan["phases"]}
    total = number(sum(seconds.values()))
    done = sum(of_phase * _share_of(state, name, plan["blocks"]) for name, of_phase in seconds.items())
    return share(done, total) if total else None


def _known_left(view: RunView) -> float | None:
    """Seconds left, where the screen shows them; none where a phase has outlasted its plan, whose own rest
    nobody knows."""
    status = view.at_work.status
    if status is None or status.over_s is not None or not remaining(view):
        return None
    return number(status.eta_s)


def _share_of(state: RunState, phase: str, planned: int | None) -> float:
    if any(row.finished for row in state.phases if row.name == phase):
        return 1.0
    blocks = planned or state.blocks
    done = share(sum(row.finished for row in state.blocks_of(phase)), blocks)
    last = state.metrics[-1] if state.metrics else None
    if last is not None and last.phase == phase and last.steps:
        # What an interrupted block or phase had reached; a resumed one goes on there.
        row = state.block_rows.get((phase, last.block)) if last.block is not None else None
        if row is None or not row.finished:
            done += share(share(last.step, last.steps), blocks if last.block is not None and blocks else 1)
    return min(1.0, max(done, (fraction(state) or 0.0) if state.phase == phase else 0.0))


def progress(view: RunView, width: int) -> list[Line]:
    """Two lines: the phase, and the whole run with the time left."""
    state = view.state
    if view.job is not None:
        return [job_progress(view, width), _finished(view, width)]
    if view.liveness == "done":
        return [_finished(view, width), line((counted(len(state.phases), "phase"), "muted"))]
    return [_phase_line(view, width), _run_line(view, width)]


def _phase_line(view: RunView, width: int) -> Line:
    """What the run does now, and how much of that is done."""
    state = view.state
    done = fraction(state)
    index = next((row.index for row in state.phases if row.name == state.phase), None)
    count = f" {index + 1}/{state.phase_count}" if index is not None and state.phase_count else ""
    began = "ended while it started" if state.attempt else "not started"
    name = (
        phase_label(state.phase)
        if state.phase
        else (("waiting" if view.liveness == "waiting" else "starting") if view.live else began)
    )
    words = line((name, "strong"), (count, "muted"), *_doing(view))
    if state.blocks and state.block is not None:
        words += line(f"  block {block_place(state.block, state.blocks)}")
    row = state.block_rows.get((state.phase or "", state.block if state.block is not None else -1))
    if row is not None and row.finished and view.live:
        words += line(("  passing on", "muted"))  # finished before: only its activations are needed again
    elif state.epoch is not None and state.steps and state.step is not None:
        words += line((f"  step {state.step}/{state.steps}", "muted"))
    share = line(f"{done:4.0%}" if done is not None else "")
    return _bar_line(words, done, _bar_role(view), share, width)


def _run_line(view: RunView, width: int) -> Line:
    """The whole run: how much is done, how long it took, and how long it will."""
    state = view.state
    left = remaining(view)
    worked = elapsed(state)
    whole = share_done(state, _known_left(view))
    clock = line(f"{whole:4.0%}  " if whole is not None else "", (f"{format_clock(worked)} done", "muted"))
    if left:
        clock += line("  ", (left, "strong"))
    return _bar_line(line(("run", "strong")), whole, _bar_role(view), clock, width)


def _bar_role(view: RunView) -> str:
    return "accent" if view.live or view.replay is not None else "muted"


def job_progress(view: RunView, width: int) -> Line:
    """What is done with a finished run: its phase, how far that is, the time left."""
    job = view.at_work
    assert view.job is not None
    done = fraction(job)
    words = line((job_name(view.job.task), "strong"), "  ", phase_label(job.phase), *_doing(view))
    clock = line(f"{done:4.0%}  " if done is not None else "", (remaining(view), "strong"))
    return _bar_line(words, done, "accent", clock, width)


def _doing(view: RunView) -> Line:
    """What the engine does where it counts nothing, and for how long it has."""
    spent = view.starting_s
    status = view.at_work.status
    if spent is None and status is not None and view.live and fraction(view.at_work) is None:
        spent = status.phase_s
    words = f"  {view.doing}" if view.doing else ""
    return line((f"{words}{'' if spent is None else f'  {format_clock(spent)}'}", "muted"))


def _finished(view: RunView, width: int) -> Line:
    took = f"took {format_seconds(elapsed(view.state))}"
    return _bar_line(line(("finished", "strong")), 1.0, "good", line(took), width)


def _bar_line(left: Line, share: float | None, role: str, right: Line, width: int) -> Line:
    """Words, a bar in what room is left, and numbers."""
    right = cut(right, width)
    left = cut(left, max(0, width - width_of(right) - 2))
    pad = max(0, 44 - width_of(left)) if width >= 100 else max(0, 34 - width_of(left)) if width >= 70 else 0
    room = width - width_of(left) - pad - width_of(right) - 4
    if room < 6:
        return beside(left, right, width)
    return [*left, (" " * (pad + 2), ""), *bar(share, room, role), ("  ", ""), *right]


# -- what needs attention ------------------------------------------------------------------------------


def notices(view: RunView, width: int) -> list[Line]:
    """What went wrong or was asked for, and what to do about it; empty while all is well."""
    lines: list[Line] = []
    if view.trouble:
        lines += in_few(f"? {view.trouble}", width, MOST_LINES, "warn")
    if view.problem:
        lines += in_few(f"! {view.problem}", width, MOST_LINES, "warn")
    if view.waiting:
        lines += in_few(f"‖ {view.waiting}", width, MOST_LINES, "warn")
    if view.asked:
        lines.append(request_line(view))
    if view.hung:
        pid = f" (process {view.pid})" if view.pid else ""
        silent = silence(view.at_work.status, view.now)
        lines += wrap(
            f"? no sign of life from the engine{pid} for {silent}; K kills it, what is checkpointed is kept",
            width,
            "bad",
        )
    if view.liveness == "crashed":
        kept = view.state.checkpoint is not None
        then = (
            "goes on from its last checkpoint" if kept else "starts it from its beginning: none is kept yet"
        )
        why = view.why_gone or KILLED
        died = "died without a word" if why == KILLED else "died"
        words = f"✗ the engine {died}: {why}; r {then}, l shows its last words"
        lines += in_few(words, width, MOST_LINES, "bad")
    if view.state.error is not None and view.liveness not in ("running", "starting", "waiting"):
        lines += in_few(f"✗ {_error_words(view.state.error, view.path)}", width, MOST_LINES, "bad")
    lines += in_few(job_notice(view), width, MOST_LINES, "warn") if job_notice(view) else []
    if broken(view.state) and view.live:
        lines += wrap("! the loss is not finite; the engine goes back to its last good state", width, "bad")
    return lines


def _error_words(error: events.Error, run: str) -> str:
    """Where in the folder ``run`` or elsewhere, what, and what to do about it here."""
    where = f"{within_run(error.where, run)}: " if error.where else ""
    return f"{where}{error.message}{hint_for_app(error.hint)}"


def job_notice(view: RunView) -> str:
    """How what was done last with a finished run has ended, where that was not well; the run stays what it
    was."""
    job = view.state.job
    if job is None or view.live or view.replay is not None or job.outcome == "done":
        return ""
    name = job_name(job.task)
    if job.outcome is None:
        return f"! the last {name} was cut off: {view.why_gone or KILLED}"
    if job.outcome != "failed":
        return f"■ the last {name} was {job.outcome}; the run stays {view.liveness}"
    if job.error is None or view.state.error is not None:
        return ""  # where it found the run damaged, that is told of the run
    return f"! the last {name} failed: {_error_words(job.error, view.path)}"


def request_line(view: RunView) -> Line:
    """How far a stop or an abort has come: asked, accepted, done."""
    steps = (("asked", True), ("accepted", view.accepted), ("done", False))
    spans = line((f"{view.asked}: ", "warn strong"))
    for index, (word, reached) in enumerate(steps):
        spans += line(
            " → " if index else "", (f"{word} {'✓' if reached else '…'}", "warn" if reached else "muted")
        )
    return spans


def broken(state: RunState) -> bool:
    """Whether the newest step's numbers were not finite."""
    metric = state.metrics[-1] if state.metrics else None
    return metric is not None and metric.phase == state.phase and metric.non_finite


# -- blocks --------------------------------------------------------------------------------------------


def block_table(view: RunView, width: int) -> tuple[Line, list[Line]]:
    """Header and a row for every block of the model, those to come included."""
    state = view.state
    rows = {row.index: row for row in state.trained_blocks()}
    planned = known(state.plan)["blocks"] or 0
    count = min(MAX_BLOCKS, max([int(planned), *(index + 1 for index in rows)]))
    training = view.live or view.replay is not None
    current = state.block if training and _makes_blocks(state, rows) else None
    wide = width >= 45
    cells = [_block_cells(rows.get(index), index, index == current, wide) for index in range(count)]
    names = ["#", "state" if wide else "", "initial", "final", "valid.", "time"]
    # Where the words of the state do not fit beside the numbers, its mark says the same.
    sizes = [3, 8, 8, 8, 8, 5] if wide else [3, 1, 7, 7, 7, 5]
    made = columns([names, *cells], sizes, right="rlrrrr", gap=" ")
    return made[0], made[1:]


def _makes_blocks(state: RunState, rows: Mapping[int, BlockRow]) -> bool:
    """Whether the phase that is open is the one that makes the blocks of the table."""
    stage = STAGES.get(state.phase or "")
    if stage is not None:
        return stage.scope == "block"
    return any(row.phase == state.phase for row in rows.values())  # a stage that is not known here


def _block_cells(row: BlockRow | None, index: int, current: bool, wide: bool) -> list[str | Span]:
    if row is not None and row.finished and current:
        current = False  # it is only passed on again
    if row is None or not row.finished:
        state: Span = ("▶ now", "accent") if current else ("· waits", "muted")
        return [str(index), state if wide else (state[0][0], state[1]), "", "", "", ""]
    worse = row.final_loss is not None and row.initial_loss is not None and row.final_loss > row.initial_loss
    mark: Span = ("! worse", "warn") if worse else ("✓ kept", "good") if row.restored else ("✓ done", "good")
    room = 8 if wide else 7
    return [
        str(index),
        mark if wide else (mark[0][0], mark[1]),
        _short(row.initial_loss, room),
        _short(row.final_loss, room),
        _short(row.val_loss, room),
        format_clock(row.seconds) if row.seconds is not None else "",
    ]


def _short(value: float | None, room: int) -> str:
    """A loss in as many digits as fit."""
    if value is None:
        return ""
    text = format_number(value, 3)
    return text if len(text) <= room else format_number(value, 2)


# -- journal -------------------------------------------------------------------------------------------


def journal(entries: Sequence[Entry], width: int) -> list[Line]:
    """What happened, oldest first, each on one line."""
    return [_journal_line(one, width) for one in entries]


def _journal_line(entry: Entry, width: int) -> Line:
    stamp = f"{format_time(entry.t)} "
    return cut([(stamp, "muted"), (squeezed(entry.text, width - len(stamp)), entry.role)], width)
