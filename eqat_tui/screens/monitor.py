"""The monitor: a run as it goes, or as it went."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from textual.containers import Horizontal, Vertical
from textual.timer import Timer
from textual.widget import Widget

from engine.config.stages import STAGES
from engine.run.launch import launch
from engine.run.sight import SeenFromAfar
from engine.run.task import job_name
from eqat_tui.feed import ReplayFeed, RunView
from eqat_tui.keys import Key, bindings
from eqat_tui.lines import Line, line, wrap
from eqat_tui.screens.base import WorkScreen
from eqat_tui.screens.dialogs import Confirm, Reader
from eqat_tui.screens.stopping import ask_to
from eqat_tui.screens.table import key_of
from eqat_tui.views import monitor as views
from eqat_tui.views import run_charts as charts
from eqat_tui.views.run_machine import machine_lines
from eqat_tui.widgets.chart_panel import ChartPanel
from eqat_tui.widgets.list_panel import ListPanel
from eqat_tui.widgets.panel import Panel, ScrollPanel, entitle

CHART_SECONDS = 1.0
"""Charts are drawn at most this often: nine parts in ten of what goes over the line are theirs."""

LIVE_KEYS = (
    Key(
        "x,p", "stop", "stop", "Checkpoint at the next step and end the engine; resume goes on exactly there"
    ),
    Key("r", "resume", "resume", "Start the engine again, from its last checkpoint"),
    Key("a", "abort", "abort", "End the engine now; what came after the last checkpoint is lost"),
    Key("d", "detach", "detach", "Leave the app; the run goes on, eqat attach shows it again"),
)
REPLAY_KEYS = (
    Key("space", "play", "play", "Stop the replay, or go on; at the end, from the beginning"),
    Key("plus,equals_sign", "faster", "faster", "Twice as fast"),
    Key("minus", "slower", "slower", "Half as fast"),
    Key("left", "back", "back", "Back by a twentieth of the run"),
    Key("right", "ahead", "ahead", "Ahead by a twentieth of the run"),
    Key("escape", "live", "leave", "Leave the replay"),
)
COMMON_KEYS = (
    Key("c", "chart", "chart", "Loss of a block, loss per block, memory"),
    Key("b", "blocks", "blocks", "The table of blocks, instead of the chart on a narrow terminal"),
    Key("s", "scale", "scale", "Logarithmic or linear scale"),
    Key("l", "log", "log", "Everything that happened, and what the engine printed"),
    Key("f", "follow", "follow", "Draw the block that is being trained again, not a chosen one"),
    Key("t", "replay", "replay", "Show the run from its beginning again, at any speed", footer=False),
    Key("K", "kill", "kill", "Kill an engine that does not answer", footer=False),
)


class MonitorScreen(WorkScreen):
    """Progress, blocks, losses, machine and journal of the current run."""

    KEYS = (*LIVE_KEYS, *REPLAY_KEYS, *COMMON_KEYS)
    ABOUT = (
        "The run, live. It is a process of its own: leaving this app, losing the connection or closing the "
        "terminal does not end it."
    )
    WRITES = frozenset({"stop", "resume", "abort", "kill"})
    FIRST = "#blocks"
    BINDINGS = bindings(KEYS)
    HORIZONTAL_BREAKPOINTS = [
        (0, "-narrow"),
        (78, "-normal"),
        (120, "-wide"),
    ]
    VERTICAL_BREAKPOINTS = [
        (0, "-low"),
        (23, "-middle"),
        (36, "-tall"),
    ]
    DEFAULT_CSS = """
    MonitorScreen #progress { height: 2; }
    MonitorScreen #title { height: 1; }
    MonitorScreen #middle { height: 1fr; }
    MonitorScreen #loss { height: 1fr; }
    MonitorScreen #profile { height: 1fr; display: none; }
    MonitorScreen #tables { width: 40; margin-left: 1; }
    MonitorScreen #machine { height: auto; }
    MonitorScreen #journal { height: 4; }
    MonitorScreen #history { height: 40%; display: none; }
    MonitorScreen.-wide #tables { width: 54; }
    MonitorScreen.-wide.-tall #history { display: block; }
    MonitorScreen.-tall #journal { height: 9; }
    MonitorScreen.-tall #profile { display: block; }
    MonitorScreen.-low #journal { display: none; }
    MonitorScreen.-empty #middle, MonitorScreen.-empty .section { display: none; }
    MonitorScreen.-narrow #tables { display: none; margin: 0; width: 1fr; }
    MonitorScreen.-narrow.-blocks #tables { display: block; }
    MonitorScreen.-narrow.-blocks #charts { display: none; }
    """

    def __init__(self) -> None:
        super().__init__()
        self._chart: charts.ChartKind = "loss"
        self._log_scale = True
        self._chosen: int | None = None
        self._drawn = 0.0
        self._later: Timer | None = None
        self._view: RunView | None = None

    def body(self) -> Iterable[Widget]:
        yield Panel(id="title")
        yield Panel(id="progress")
        yield Panel(id="notices")
        with Horizontal(id="middle"):
            with Vertical(id="charts"):
                yield ChartPanel(id="loss", classes="section", title="loss")
                yield ChartPanel(id="profile", classes="section", title="loss per block")
            with Vertical(id="tables"):
                yield ListPanel(id="blocks", classes="section", title="blocks")
                yield ChartPanel(id="history", classes="section", title="memory")
        yield Panel(id="machine", classes="section", title="machine")
        yield ScrollPanel(id="journal", classes="section", title="journal")

    def offered(self) -> Sequence[Key]:
        replaying = self._view is not None and self._view.replay is not None
        return (*(REPLAY_KEYS if replaying else LIVE_KEYS), *COMMON_KEYS)

    # -- what is shown -----------------------------------------------------------------------------

    def take(self, view: RunView) -> None:
        if self._view is None or self._view.id != view.id:
            self._chosen, self._drawn = None, 0.0
            self.query_one("#blocks", ListPanel).cursor = 0
        before, self._view = self._view, view
        ended = before is not None and before.id == view.id and before.live and not view.live
        if ended and view.replay is None and before is not None and before.job is None:
            self._tell_end(view)
        self._fill(charts=time.monotonic() - self._drawn >= CHART_SECONDS)

    def _draw_charts(self) -> None:
        if self._later is not None:
            self._later.stop()
        self._later, self._drawn = None, time.monotonic()
        if self._view is not None:
            self._fill_charts(self._view)

    def _tell_end(self, view: RunView) -> None:
        """The engine has ended while somebody watched."""
        trains = (view.state.phase or "") in STAGES
        place = "exactly there" if trains else "with this phase from its beginning"
        kept = "goes on from the last checkpoint" if view.state.checkpoint is not None else "begins anew"
        words = {
            "done": f"the run is done: {key_of('result')} shows its result",
            "stopped": f"stopped: r goes on {place}",
            "aborted": f"aborted: r {kept}",
            "failed": "the run failed: see above, or l for the log",
            "crashed": "the engine died: l shows its last words",
            "gone": "the run's directory is gone",
        }
        fine = view.liveness in ("done", "stopped", "aborted")
        self.notify(words.get(view.liveness, view.liveness), severity="information" if fine else "error")
        self.eqat.ring()

    def refill(self) -> None:
        self._fill(charts=True)

    def _fill(self, *, charts: bool) -> None:
        view = self._view
        if view is None:
            self._fill_empty()
            return
        self.shows_a_run(True)
        width = self.size.width
        self.query_one("#title", Panel).show([views.title(view, width)])
        self.query_one("#progress", Panel).show(views.progress(view, width))
        self.query_one("#notices", Panel).show(views.notices(view, width))
        machine = self.query_one("#machine", Panel)
        works = view.live or view.replay is not None
        entitle(machine, "machine" if works else "machine, as it was")
        machine.show(machine_lines(view, width))
        journal = self.query_one("#journal", ScrollPanel)
        # Beside a journal that scrolls there is a bar, which is there only once its lines are.
        room = max(10, journal.container_size.width - 1)
        journal.show(views.journal(view.journal[-200:], room), follow=True)
        self._fill_blocks(view)
        if charts:
            self._draw_charts()
        elif self._later is None:
            # What is left out now is drawn a little later, even if nothing more happens.
            self._later = self.set_timer(CHART_SECONDS, self._draw_charts)
        self.refresh_bars(line(views.state_span(view), " "))

    def _fill_empty(self) -> None:
        self.shows_a_run(False)
        self.query_one("#title", Panel).show([self.no_run()])
        self.refresh_bars(line())

    def _fill_blocks(self, view: RunView) -> None:
        panel = self.query_one("#blocks", ListPanel)
        if not panel.size.width:
            return
        header, rows = views.block_table(view, panel.size.width - 2)
        panel.show(rows, header=header)
        if self._chosen is None and view.state.block is not None:
            panel.move_to(view.state.block, tell=False)

    def _fill_charts(self, view: RunView) -> None:
        self._draw("#loss", view, self._chart)
        if self.query_one("#profile").display:
            self._draw("#profile", view, "profile" if self._chart != "profile" else "loss")
        if self.query_one("#history").display:
            self._draw("#history", view, "memory")

    def _draw(self, where: str, view: RunView, kind: charts.ChartKind) -> None:
        name, series, x_name = charts.drawn(view, kind, self._chosen)
        log = self._log_scale and kind != "memory"
        terminal = self.eqat.terminal
        several = len(series) > 1
        self.query_one(where, ChartPanel).draw(
            f"{name}{' (log)' if log else ''}",
            series,
            terminal,
            named=several,
            marks=terminal.marks and several,
            log=log,
            x_name=x_name,
            x_range=charts.x_range(view, kind, self._chosen),
            y_from_zero=kind == "memory",
        )

    # -- choosing a block --------------------------------------------------------------------------

    def on_list_panel_moved(self, message: ListPanel.Moved) -> None:
        message.stop()
        if self._view is not None:
            self._chosen, self._chart = message.row, "loss"
            self._fill_charts(self._view)
            self.refresh_bars()

    def on_list_panel_chosen(self, message: ListPanel.Chosen) -> None:
        message.stop()
        self._chosen, self._chart = message.row, "loss"
        self.refill()

    # -- keys --------------------------------------------------------------------------------------

    def impossible(self, action: str) -> str:
        view = self._view
        if view is None:
            return f"there is no run yet: {key_of('setup')} sets one up"
        if view.replay is not None and action in self.WRITES:
            return "this is a replay; esc leaves it"
        if view.replay is None and any(key.action == action for key in REPLAY_KEYS):
            return "this is no replay"
        if view.trouble and action in self.WRITES:
            return view.trouble
        running = view.live
        if action in ("stop", "abort", "kill") and not running:
            return f"the run is {view.liveness}: no engine works on it"
        if view.job is not None and action == "resume":
            return f"the run is {view.liveness}: x stops its {job_name(view.job.task)}"
        if action == "stop" and view.asked:
            return "it was asked to already, and ends at its next step"
        if action == "abort" and view.asked == "abort":
            return "it was asked to already"
        if action == "resume":
            if running:
                return f"the run is {view.liveness}"
            if view.liveness == "done":
                return f"the run is done: {key_of('result')} shows its result"
            if view.liveness == "gone":
                return "the run's directory is gone"
        if action == "kill" and not view.hung and not view.asked:
            return "the engine answers: x stops it, a aborts it"
        if action == "follow" and self._chosen is None:
            return "it does already"
        if action == "replay" and view.liveness == "gone":
            return "the run's directory is gone"
        if action == "replay" and (view.replay is not None or not view.state.event_count):
            return "there is nothing to replay" if view.replay is None else "this is a replay already"
        if action == "scale" and self._chart == "memory":
            return "memory has a linear scale"
        return ""

    def do_stop(self) -> None:
        assert self._view is not None
        ask_to("stop", self, self._view)

    def do_abort(self) -> None:
        assert self._view is not None
        ask_to("abort", self, self._view)

    def do_resume(self) -> None:
        run = self.eqat.current()
        if isinstance(run, SeenFromAfar):
            self.eqat.in_background(run.sight.resume, f"{run.sight.host} was asked to go on with it")
        else:
            self.eqat.start_engine(run, launch)

    def do_kill(self) -> None:
        run = self.eqat.current()

        def kill(yes: bool | None) -> None:
            if yes:
                from eqat_tui.actions import kill_engine

                afar = run.sight if isinstance(run, SeenFromAfar) else None
                kills = afar.kill if afar is not None else lambda: kill_engine(run)
                self.eqat.in_background(kills, "the engine was killed")

        question = Confirm(
            "Kill the engine?", "It has no time for a checkpoint; the last one is kept.", "kill"
        )
        self.app.push_screen(question, kill)

    def do_detach(self) -> None:
        self.eqat.leave()

    def do_chart(self) -> None:
        kinds = charts.CHARTS
        self._chart = kinds[(kinds.index(self._chart) + 1) % len(kinds)]
        self.refill()

    def do_blocks(self) -> None:
        if self.has_class("-narrow"):
            self.toggle_class("-blocks")
        blocks = self.query_one("#blocks", ListPanel)
        if not self.has_class("-narrow") or self.has_class("-blocks"):
            blocks.focus()
        self.call_after_refresh(self.refill)

    def do_scale(self) -> None:
        self._log_scale = not self._log_scale
        self.refill()

    def do_follow(self) -> None:
        self._chosen = None
        self.set_focus(None)
        self.refill()

    def do_log(self) -> None:
        view = self._view
        assert view is not None
        from eqat_tui.log_tail import log_tail

        entries = views.journal(view.journal, 10_000)
        printed = log_tail(self.eqat.current(), view.state.attempt) or ["(nothing)"]

        def lines(width: int) -> list[Line]:
            return [
                *(row for entry in entries for row in _wrapped(entry, width)),
                line(),
                line(("what the engine printed", "strong")),
                *(row for text in printed for row in wrap(text, width)),
            ]

        self.app.push_screen(Reader(f"{view.id}: journal", lines, at_end=True))

    # -- replay ------------------------------------------------------------------------------------

    def do_replay(self) -> None:
        self.eqat.replay(self.eqat.current())

    def do_live(self) -> None:
        self.eqat.open_run(self.eqat.current())

    def _replay(self) -> ReplayFeed:
        feed = self.eqat.feed
        assert isinstance(feed, ReplayFeed)
        return feed

    def do_play(self) -> None:
        self._replay().pause()
        self.eqat.look_now()

    def do_faster(self) -> None:
        self._replay().faster(2.0)
        self.eqat.look_now()

    def do_slower(self) -> None:
        self._replay().faster(0.5)
        self.eqat.look_now()

    def do_back(self) -> None:
        self._replay().seek(-0.05)
        self.eqat.look_now()

    def do_ahead(self) -> None:
        self._replay().seek(0.05)
        self.eqat.look_now()


def _wrapped(entry: Line, width: int) -> list[Line]:
    """A journal line over as many lines as it needs, its continuation indented."""
    (stamp, role), *rest = entry
    words, kind = rest[0] if rest else ("", "")
    rows = wrap(words, width - len(stamp), kind)
    return [[(stamp if index == 0 else " " * len(stamp), role), *row] for index, row in enumerate(rows)]
