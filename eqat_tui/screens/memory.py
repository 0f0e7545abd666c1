"""Live memory: this machine's GPUs and host, with history and processes, also when no run is ours."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING

from textual.message import Message
from textual.widget import Widget

from engine.errors import EqatError
from engine.run.finding import find_run
from eqat_tui.keys import Key, bindings
from eqat_tui.lines import line
from eqat_tui.screens.base import WorkScreen
from eqat_tui.views import memory as views
from eqat_tui.widgets.chart_panel import ChartPanel
from eqat_tui.widgets.list_panel import ListPanel
from eqat_tui.widgets.panel import Panel, entitle

if TYPE_CHECKING:
    from eqat_tui.hardware import Reading

SAMPLE_S = 1.0
KEPT = 600
"""Readings of the last ten minutes."""


class MemoryScreen(WorkScreen):
    """Bars, a history, and who uses what."""

    KEYS = (
        Key("enter", "open", "open", "Open the run of the engine under the cursor"),
        Key("z", "zero", "from zero", "Scale of the history: all there is, or what changed"),
        Key("h", "hold", "hold", "Stop reading, or go on"),
    )
    ABOUT = "Memory and load of this machine now, read from the driver once a second; no run needs to exist."
    BINDINGS = bindings(KEYS[1:])
    VERTICAL_BREAKPOINTS = [(0, "-low"), (22, "-tall")]
    DEFAULT_CSS = """
    MemoryScreen #machine { height: auto; }
    MemoryScreen #history { height: 1fr; }
    MemoryScreen #processes { height: 30%; min-height: 4; }
    """

    class Read(Message):
        """The sampling thread has a new reading."""

        def __init__(self, reading: Reading) -> None:
            self.reading = reading
            super().__init__()

    def __init__(self) -> None:
        super().__init__()
        self._readings: deque[Reading] = deque(maxlen=KEPT)
        self._from_zero = True
        self._held = threading.Event()
        self._over = threading.Event()

    def body(self) -> Iterable[Widget]:
        yield Panel(id="machine")
        yield ChartPanel(id="history", classes="section", title="memory")
        yield ListPanel(id="processes", classes="section", title="processes")

    def on_mount(self) -> None:
        self.query_one("#processes").focus()
        threading.Thread(target=self._sample, name="sampler", daemon=True).start()

    def on_unmount(self) -> None:
        self._over.set()

    def _sample(self) -> None:
        """On a thread of its own: a driver that hangs must not hang the app."""
        from eqat_tui.hardware import Sampler

        sampler = Sampler(self.eqat.runs_dir)
        while not self._over.is_set():
            if not self._held.is_set():
                self.post_message(self.Read(sampler.sample()))
            self._over.wait(SAMPLE_S)
        sampler.close()

    def on_memory_screen_read(self, message: Read) -> None:
        message.stop()
        self._readings.append(message.reading)
        if self.is_current:
            self.refill()

    def refill(self) -> None:
        if not self._readings:
            self.query_one("#machine", Panel).show([line(("asking the driver …", "muted"))])
            self.refresh_bars(line())
            return
        reading = self._readings[-1]
        width = self.size.width
        self.query_one("#machine", Panel).show(views.machine(reading, width))
        self._fill_history()
        panel = self.query_one("#processes", ListPanel)
        header, rows = views.processes(reading, max(20, width - 3))
        entitle(panel, "processes" if rows else "processes: none on a GPU, no engine of ours")
        panel.show(rows, header=header)
        words = ("held ", "warn") if self._held.is_set() else ("live ", "muted")
        self.refresh_bars(line(words))

    def _fill_history(self) -> None:
        terminal = self.eqat.terminal
        name, series, top = views.history(self._readings)
        several = len(series) > 1
        self.query_one("#history", ChartPanel).draw(
            f"{name}, last {_span(self._readings)}",
            series,
            terminal,
            named=several,
            marks=terminal.marks and several,
            x_name="seconds",
            y_from_zero=self._from_zero,
            y_top=top if self._from_zero else None,
        )

    # -- keys --------------------------------------------------------------------------------------

    def impossible(self, action: str) -> str:
        if action == "open" and not self._run_under():
            return "no engine of ours is under the cursor"
        return ""

    def _run_under(self) -> str:
        if not self._readings:
            return ""
        reading = self._readings[-1]
        listed = [one for gpu in reading.gpus for one in gpu.processes] + list(reading.engines)
        cursor = self.query_one("#processes", ListPanel).cursor
        return listed[cursor].run if cursor < len(listed) else ""

    async def on_list_panel_chosen(self, message: ListPanel.Chosen) -> None:
        message.stop()
        await self.action_do("open")

    def on_list_panel_moved(self, message: ListPanel.Moved) -> None:
        message.stop()
        self.refresh_bars()

    def do_open(self) -> None:
        try:
            self.eqat.open_run(find_run(self.eqat.runs_dir, self._run_under()))
        except EqatError as error:
            self.eqat.tell(error)

    def do_zero(self) -> None:
        self._from_zero = not self._from_zero
        self.refill()

    def do_hold(self) -> None:
        if self._held.is_set():
            self._held.clear()
        else:
            self._held.set()
        self.refill()


def _span(readings: deque[Reading]) -> str:
    seconds = readings[-1].t - readings[0].t
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
