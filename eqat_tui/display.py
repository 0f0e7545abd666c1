"""Live progress of a run on stderr: two moving lines on a terminal, plain lines everywhere else.

Both displays are given the run's state and the events that led to it, and keep nothing of their own. What
is worth keeping (a finished phase, a perplexity, a warning) becomes a line that stays; the position, loss
and speed are redrawn in place, or on a log printed every few seconds.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from engine.config.stages import phase_label, stage_label
from engine.run import events
from engine.run.events import Event
from engine.run.state import RunState
from engine.run.task import is_job, job_name
from eqat_tui.job_control import in_foreground
from eqat_tui.output import (
    LONGEST_LINE,
    cell,
    colour_wanted,
    format_bytes,
    format_clock,
    format_count,
    format_number,
    format_seconds,
    number,
    say,
    share,
)
from eqat_tui.ranks_text import slowest
from eqat_tui.words import block_place, time_left

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

REDRAW_S = 0.5
"""The moving lines are redrawn at most this often: SSH can be slow."""

PLAIN_INTERVAL_S = 15.0
"""A log gets a line of progress at most this often."""


class Display(Protocol):
    """Where progress is shown."""

    def update(self, state: RunState, new: Sequence[Event]) -> None:
        """Show ``state``, and the events in ``new`` that are worth a line."""

    def join(self, state: RunState) -> None:
        """What is followed was at work before: show where it is."""

    def note(self, text: str) -> None:
        """A line from the program itself."""

    def leave(self) -> None:
        """The shell is about to have the terminal for a while: leave nothing on it that moves."""

    def come_back(self) -> None:
        """The terminal may be ours again; it can show anything, and have another size."""

    def close(self) -> None:
        """Leave the terminal as it was found."""


def open_display() -> Display:
    """The display that fits stderr."""
    return LiveDisplay() if colour_wanted(sys.stderr) else PlainDisplay()


# -- what is said --------------------------------------------------------------------------------------


def lasting_line(event: Event) -> str | None:
    """The line that stays of ``event``, or none for one that only moves the display."""
    match event:
        case events.PhaseFinished():
            peaks = [
                f"{name} {format_bytes(peak)}"
                for name, peak in (("GPU", event.peak_gpu_bytes), ("memory", event.peak_host_bytes))
                if peak is not None
            ]
            peak_text = f", peak {', '.join(peaks)}" if peaks else ""
            return f"✓ {phase_label(event.phase)}: {format_seconds(event.seconds)}{peak_text}"
        case events.Eval():
            value = format_number(event.perplexity) if event.perplexity is not None else "not finite"
            return f"  perplexity, {stage_label(event.stage)}: {value}"
        case events.Export():
            checked = "verified" if event.verified else "NOT VERIFIED"
            copied = f", copied to {event.copied_to}" if event.copied_to else ""
            return f"  {event.format}: {format_bytes(event.bytes)}, {checked}{copied}"
        case events.Warning():
            return _with_hint(f"warning: {event.message}", event.hint)
        case events.ControlAck():
            return f"the engine will {event.request} at the next step"
        case events.Error():
            where = f"{event.where}: " if event.where else ""
            return _with_hint(f"error: {where}{event.message}", event.hint)
    return None


def lasting(text: str) -> str:
    """A line as it is printed: one line, of words only, and not without end."""
    return cell(text, LONGEST_LINE)


def _with_hint(text: str, hint: str) -> str:
    return f"{text} ({hint})" if hint else text


def fraction(state: RunState) -> float | None:
    """How much of the current phase is done, where that is known; of a job, its own state is asked."""
    within = share(state.step, state.steps)
    if state.blocks and state.block is not None:
        return share((number(state.block) or 0.0) + within, state.blocks)
    return within if state.steps else None


def position(state: RunState) -> str:
    """``Block-AP [4/8]  block 12 of 0–29``; of a job on a finished run, ``evaluation: prepare [1/2]``."""
    index = next((row.index for row in state.phases if row.name == state.phase), None)
    text = phase_label(state.phase)
    if is_job(state.task):
        text = f"{job_name(state.task)}: {text}"
    if index is not None and state.phase_count:
        text += f" [{index + 1}/{state.phase_count}]"
    if state.blocks and state.block is not None:
        text += f"  block {block_place(state.block, state.blocks)}"
    return text


def left_words(state: RunState) -> str:
    """The time left in words, as the engine estimates it; empty where it does not."""
    status = state.status
    return "" if status is None else time_left(status.eta_s, status.over_s, measured=status.eta_measured)


def doing(state: RunState) -> list[str]:
    """What an engine does beside what it counts, and for how long where it counts nothing: ``loading torch``,
    ``0:12``."""
    status = state.status
    if status is None or status.outcome is not None:
        return []
    counted = fraction(state) is not None or status.phase_s is None
    spent = [] if counted else [format_clock(status.phase_s or 0.0)]
    return [*([status.doing] if status.doing else []), *spent]


def measurements(state: RunState) -> list[str]:
    """Step, loss, speed and memory, as far as they are known; or why nothing moves."""
    if state.status is not None and state.status.waiting:
        return [f"paused: {state.status.waiting}"]
    parts = doing(state)
    if state.epoch is not None and state.steps and state.step is not None:  # of a training, not of a count
        parts.append(f"step {state.step}/{state.steps}")
    metric = state.metrics[-1] if state.metrics else None
    if metric is not None and metric.phase == state.phase:
        if metric.non_finite:
            parts.append("loss not finite")
        elif metric.loss is not None:
            parts.append(f"loss {format_number(metric.loss)}")
        if metric.tokens_per_second:
            parts.append(f"{format_count(metric.tokens_per_second)} tokens/s")
    memory = state.memory
    if memory is not None:
        if memory.gpu_used is not None and memory.gpu_total:
            parts.append(f"GPU {format_bytes(memory.gpu_used)} of {format_bytes(memory.gpu_total)}")
        if memory.host_used is not None:
            parts.append(f"memory {format_bytes(memory.host_used)}")
        last = slowest(memory.ranks)
        if last is not None:
            parts.append(f"rank {last} of {len(memory.ranks)} is the slowest")
    return parts


# -- a log, a pipe, a dumb terminal --------------------------------------------------------------------


class PlainDisplay:
    """Whole lines without control codes: for logs, pipes, and terminals that cannot do more."""

    def __init__(self, interval: float = PLAIN_INTERVAL_S, prefix: str = "") -> None:
        self._interval = interval
        self._prefix = prefix
        self._last = time.monotonic()

    def update(self, state: RunState, new: Sequence[Event]) -> None:
        for event in new:
            if isinstance(event, events.PhaseStarted):
                self._print(f"{phase_label(event.phase)} [{event.index + 1}/{event.phases}]")
            line = lasting_line(event)
            if line is not None:
                self._print(line)
        if time.monotonic() - self._last >= self._interval:
            self.join(state)

    def join(self, state: RunState) -> None:
        now = state.at_work
        if now.phase is not None or doing(now):
            done, left = fraction(now), left_words(now)
            parts = [position(now), *([f"{done:.0%}"] if done is not None and now.epoch is None else [])]
            parts += [*measurements(now), *([left] if left else [])]
            self._print("  " + "  ".join(parts))

    def note(self, text: str) -> None:
        self._print(text)

    def leave(self) -> None:
        pass

    def come_back(self) -> None:
        pass

    def close(self) -> None:
        pass

    def _print(self, text: str) -> None:
        say(lasting(self._prefix + text))
        self._last = time.monotonic()


# -- a terminal ----------------------------------------------------------------------------------------


class LiveDisplay:
    """Lines that stay scroll up above two that are redrawn in place, where this is in the foreground."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True, highlight=False, markup=False, emoji=False)
        self._live = self._open()
        self._drawn = float("-inf")

    def _open(self) -> Live:
        """Moving lines that know nothing of those before them."""
        from rich.live import Live

        return Live(
            console=self._console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def update(self, state: RunState, new: Sequence[Event]) -> None:
        for event in new:
            line = lasting_line(event)
            if line is not None:
                self._print(line, _style(event))
        now = time.monotonic()
        if now - self._drawn >= REDRAW_S and in_foreground(sys.stderr):
            self._drawn = now
            self._live.start()
            self._live.update(self._lines(state.at_work), refresh=True)

    def join(self, state: RunState) -> None:
        pass  # it draws at every update

    def note(self, text: str) -> None:
        self._print(text, "yellow")

    def _print(self, text: str, style: str) -> None:
        self._console.print(lasting(text), style=style, soft_wrap=True)

    def leave(self) -> None:
        self._live.stop()
        self._live = self._open()

    def come_back(self) -> None:
        self._live._live_render._shape = None  # what was drawn is somewhere above what the shell wrote
        self.leave()
        self._drawn = float("-inf")

    def close(self) -> None:
        self._live.stop()

    def _lines(self, state: RunState) -> RenderableType:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        done = fraction(state)
        bar = ProgressBar(
            total=1.0, completed=done or 0.0, pulse=done is None, width=None, animation_time=time.monotonic()
        )
        first = Table.grid(expand=True, padding=(0, 1))
        first.add_column(no_wrap=True)
        first.add_column(ratio=1)
        first.add_column(no_wrap=True, justify="right")
        share = "" if done is None else f"{done:4.0%}  "
        first.add_row(Text(cell(position(state)), style="bold"), bar, Text(f"{share}{left_words(state)}"))
        words = cell("  " + "   ".join(measurements(state)), LONGEST_LINE)
        second = Text(words, style="dim", no_wrap=True, overflow="ellipsis")
        return Group(first, second)


def _style(event: Event) -> str:
    if isinstance(event, events.Error):
        return "bold red"
    return "yellow" if isinstance(event, events.Warning | events.ControlAck) else ""
