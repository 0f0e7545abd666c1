"""All runs: find one, open it, go on with it, compare some, delete one."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

from textual.containers import Vertical
from textual.widget import Widget
from textual.widgets import Input

from engine.errors import EqatError
from engine.run import housekeeping
from engine.run.comparison import LETTERS, Compared
from engine.run.directory import RunDirectory
from engine.run.finding import list_runs
from engine.run.launch import launch
from engine.run.liveness import WORKING
from engine.run.lock import is_held
from engine.run.shown import summarize
from eqat_tui.housekeeping import what_is_in
from eqat_tui.keys import Key, bindings
from eqat_tui.lines import line
from eqat_tui.output import error_words, format_bytes
from eqat_tui.run_text import UNREADABLE
from eqat_tui.screens.base import WorkScreen, show_input
from eqat_tui.screens.dialogs import Confirm
from eqat_tui.screens.looking import LookingScreen
from eqat_tui.views import comparison
from eqat_tui.views import runs as views
from eqat_tui.widgets.chart_panel import ChartPanel
from eqat_tui.widgets.list_panel import ListPanel
from eqat_tui.widgets.panel import Panel, ScrollPanel, entitle
from eqat_tui.widgets.typed import TypedInput

MOST_COMPARED = len(LETTERS)
"""Of so many runs each has a letter, as in ``eqat compare``."""


class Catalogue:
    """Summaries of runs, each read again only when its files have changed."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[Any, dict[str, Any]]] = {}

    def read(self, runs: Sequence[RunDirectory]) -> list[dict[str, Any]]:
        """A row for each run; that of one that cannot be read says so."""
        found = []
        for run in runs:
            stamp = self._stamp(run)
            known = self._known.get(run.id)
            try:
                # What a cluster does with a job, and silence elsewhere, change no file.
                restless = known is not None and known[1]["state"] in WORKING
                if known is None or restless or known[0] != stamp:
                    known = self._known[run.id] = (stamp, summarize(run))
            except Exception as error:  # whatever its files make a parser raise
                found.append(views.unreadable(run, error_words(error)))
                continue
            found.append(known[1])
        return found

    @staticmethod
    def _stamp(run: RunDirectory) -> Any:
        sizes = []
        for path in (run.events_path, run.status_path, run.launch_path, run.submitted_path):
            try:
                status = path.stat()
                sizes.append((status.st_size, status.st_mtime_ns))
            except OSError:
                sizes.append((0, 0))
        held = is_held(run.lock_path)
        # A heartbeat that stops changes no file: whoever is held is looked at every time.
        return (sizes, held, time.time() if held else 0)


class RunsScreen(LookingScreen):
    """The list of runs."""

    KEYS = (
        Key("enter", "open", "open", "Open the run: the monitor while it works, the result when it is done"),
        Key(
            "slash",
            "filter",
            "filter",
            "Show only runs with some words: model, state, w2g64, a part of the id",
        ),
        Key("o", "sort", "order", "Order by start, state, model, perplexity or size"),
        Key("space", "mark", "mark", "Mark the run for a comparison"),
        Key(
            "equals_sign",
            "compare",
            "compare",
            "Compare the marked runs: settings, loss per block, perplexity, size, time",
        ),
        Key("r", "resume", "resume", "Start its engine again, from its last checkpoint"),
        Key("n", "again", "new like it", "Set up a new run with this one's settings"),
        Key("t", "replay", "replay", "Show the run from its beginning again, at any speed", footer=False),
        Key(
            "F",
            "clean",
            "free",
            "Free what the run can make again: activations, old checkpoints",
            footer=False,
        ),
        Key("delete,D", "delete", "delete", "Delete the run with everything in it"),
    )
    ABOUT = "Every run in the runs folder, newest first."
    WRITES = frozenset({"resume", "delete", "clean"})
    BINDINGS = bindings(KEYS[1:])
    DEFAULT_CSS = """
    RunsScreen #filter { display: none; }
    RunsScreen #details { height: auto; }
    """

    def __init__(self) -> None:
        super().__init__()
        self._catalogue = Catalogue()
        self._all: list[dict[str, Any]] = []
        self._runs: dict[str, RunDirectory] = {}
        """By the id that each is listed by."""
        self._shown: list[views.Summary] = []
        self._marked: frozenset[str] = frozenset()
        self._sort: views.SortBy = "started"
        self._words = ""

    def body(self) -> Iterable[Widget]:
        yield TypedInput(placeholder="words to look for; enter keeps, esc forgets them", id="filter")
        yield ListPanel(id="list", classes="section", title="runs")
        yield Panel(id="details", classes="section", title="run")

    def read(self) -> tuple[dict[str, RunDirectory], list[dict[str, Any]]]:
        runs = list_runs(self.eqat.runs_dir)
        return {run.id: run for run in runs}, self._catalogue.read(runs)

    def took(self, found: tuple[dict[str, RunDirectory], list[dict[str, Any]]] | None) -> None:
        self._runs, self._all = found or ({}, [])
        self.refill()

    def refill(self) -> None:
        panel, details = self.query_one("#list", ListPanel), self.query_one("#details", Panel)
        under = self._under()
        self._shown = views.chosen(self._all, self._words, self._sort)
        header, rows = views.rows(self._shown, self._marked, max(20, panel.size.width - 3), time.time())
        panel.show(rows, header=header)
        if under is not None:  # the cursor stays on its run, wherever that has moved to
            place = next((i for i, run in enumerate(self._shown) if run["id"] == under["id"]), None)
            if place is not None:
                panel.move_to(place, tell=False)
        order = f"by {self._sort}" + (f", with “{self._words}”" if self._words else "")
        bad = sum(run["state"] == UNREADABLE for run in self._all)
        entitle(panel, f"runs, {order}" + (f"; {bad} cannot be read" if bad else ""))
        self._fill_details(details)
        self.refresh_bars(line((f"{len(self._shown)} of {len(self._all)} ", "muted")))

    def _fill_details(self, details: Panel) -> None:
        width = self.size.width
        run = self._under()
        if run is not None:
            details.show(views.details(run, width))
        elif not self.loaded:
            details.show([line(("looking …", "muted")), line(), line()])
        elif self._all:
            details.show([line(("no run has all of these words; / changes them", "muted")), line(), line()])
        else:
            details.show(views.nothing_here(str(self.eqat.runs_dir), width))

    def _under(self) -> views.Summary | None:
        """The run under the cursor."""
        cursor = self.query_one("#list", ListPanel).cursor
        return self._shown[cursor] if cursor < len(self._shown) else None

    def _directory(self) -> RunDirectory:
        """The run under the cursor, if it is still there, as it was listed: a link is known as one."""
        run = self._under()
        assert run is not None
        RunDirectory.open(run["path"])
        return self._runs[run["id"]]

    def on_list_panel_moved(self, message: ListPanel.Moved) -> None:
        message.stop()
        self._fill_details(self.query_one("#details", Panel))
        self.refresh_bars()

    async def on_list_panel_chosen(self, message: ListPanel.Chosen) -> None:
        message.stop()
        await self.action_do("open")

    # -- keys --------------------------------------------------------------------------------------

    def impossible(self, action: str) -> str:
        run = self._under()
        if action in ("filter", "sort"):
            return "" if self._all else "there are no runs yet"
        if action == "compare":
            return "" if len(self._marked) >= 2 else "mark two or more runs with space first"
        if run is None:
            return "no run is under the cursor"
        if action == "resume":
            if run["state"] in ("running", "hung"):
                return f"the run is {run['state']}"
            return "the run is done" if run["state"] == "done" else ""
        if action in ("delete", "clean") and run["state"] in ("running", "hung"):
            return "an engine works on it: open it and stop it first"
        return ""

    def do_open(self) -> None:
        run = self._under()
        assert run is not None
        try:
            self.eqat.open_run(self._directory(), mode="result" if run["state"] == "done" else "monitor")
        except EqatError as error:
            self.eqat.tell(error)
            self.look()

    def do_filter(self) -> None:
        show_input(self, self.query_one("#filter", Input))

    def on_input_changed(self, message: Input.Changed) -> None:
        message.stop()
        self._words = message.value
        self.refill()

    def on_input_submitted(self, message: Input.Submitted) -> None:
        message.stop()
        self._leave_filter(keep=True)

    def key_escape(self) -> None:
        self._leave_filter(keep=False)

    def _leave_filter(self, *, keep: bool) -> None:
        box = self.query_one("#filter", Input)
        if not keep:
            box.value = ""
        box.display = keep and bool(box.value)
        self.query_one("#list").focus()

    def do_sort(self) -> None:
        self._sort = views.SORTS[(views.SORTS.index(self._sort) + 1) % len(views.SORTS)]
        self.refill()

    def do_mark(self) -> None:
        run = self._under()
        assert run is not None
        if run["id"] not in self._marked and len(self._marked) >= MOST_COMPARED:
            self.notify(f"at most {MOST_COMPARED} runs are compared", severity="warning")
            return
        self._marked = self._marked ^ {run["id"]}
        self.refill()
        self.query_one("#list", ListPanel).action_move(1)

    def do_compare(self) -> None:
        chosen = [run for run in self._all if run["id"] in self._marked]
        self.app.push_screen(
            CompareScreen([RunDirectory(RunDirectory.open(run["path"]).path) for run in chosen])
        )

    def do_resume(self) -> None:
        self.eqat.start_engine(self._directory(), launch)

    def do_again(self) -> None:
        from eqat_tui.screens.setup import SetupScreen

        run = self._directory()

        async def go() -> None:
            await self.eqat.do_everywhere("setup")
            if isinstance(self.app.screen, SetupScreen):
                self.app.screen.start_from(str(run.config_toml))

        self.run_worker(go())

    def do_replay(self) -> None:
        self.eqat.replay(self._directory())

    def do_clean(self) -> None:
        run, summary = self._directory(), self._under()
        assert summary is not None
        over = summary["state"] == "done"

        def clean() -> None:
            freed = housekeeping.clean_run(run)
            self.app.call_from_thread(self.notify, f"freed {format_bytes(freed)} of {run.id}")

        def ask(found: housekeeping.Cleanable) -> None:
            if not found.total:
                self.notify(f"{run.id} holds nothing that it could make again")
                return
            question = Confirm(*views.freeing(run.id, found, over=over), "free it")
            self.app.push_screen(question, lambda yes: self.eqat.in_background(clean) if yes else None)

        self.eqat.in_thread(lambda: self.app.call_from_thread(ask, housekeeping.cleanable(run)))

    def do_delete(self) -> None:
        run = self._directory()

        def delete(yes: bool | None) -> None:
            if yes:
                self.eqat.in_background(lambda: self._delete(run))

        housekeeping.require_deletable(run)
        inside = what_is_in(run, housekeeping.size_of(run.path))
        question = Confirm(
            f"Delete {run.path}?",
            f"{inside}: its checkpoints, its log and its packed checkpoints. Blocks that another run shares "
            "stay there. This cannot be undone.",
            "delete",
        )
        self.app.push_screen(question, delete)

    def _delete(self, run: RunDirectory) -> None:
        freed = housekeeping.delete_run(run)
        self._marked -= {run.id}
        self.app.call_from_thread(self.notify, f"deleted {run.id} ({format_bytes(freed)})")
        self.app.call_from_thread(self.look)


class CompareScreen(WorkScreen):
    """Some runs side by side."""

    KEYS = (
        Key("escape", "back", "back", "Back to the list of runs"),
        Key("s", "scale", "scale", "Logarithmic or linear scale"),
    )
    ABOUT = (
        "Runs side by side; the arrow marks the smallest number where they are numbers of one thing. Only "
        "settings that differ are listed."
    )
    BINDINGS = bindings(KEYS)
    DEFAULT_CSS = """
    CompareScreen #losses { height: 40%; }
    CompareScreen #table { height: 1fr; }
    """

    def __init__(self, runs: Sequence[RunDirectory]) -> None:
        super().__init__()
        self._runs = [Compared(run, letter) for run, letter in zip(runs, LETTERS, strict=False)]
        self._log_scale = True

    def body(self) -> Iterable[Widget]:
        with Vertical():
            yield ChartPanel(id="losses", classes="section", title="final loss per block")
            yield ScrollPanel(id="table", classes="section", title="what came of them, and what differs")

    def on_mount(self) -> None:
        self.query_one("#table").focus()

    def refill(self) -> None:
        chart, table = self.query_one("#losses", ChartPanel), self.query_one("#table", ScrollPanel)
        scale = " (log)" if self._log_scale else ""
        chart.draw(
            f"final loss per block{scale}",
            comparison.overlaid(self._runs),
            self.eqat.terminal,
            marks=True,
            log=self._log_scale,
            x_name="block",
        )
        table.show(comparison.differences(self._runs, self.size.width - 2))
        self.refresh_bars(line((f"{len(self._runs)} runs ", "muted")))

    def do_back(self) -> None:
        self.app.pop_screen()

    def do_scale(self) -> None:
        self._log_scale = not self._log_scale
        self.refill()
