"""The result: how good the quantized model is, what it writes, where it lies, how others load it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import msgspec
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widget import Widget
from textual.widgets import Input

from engine.config.formats import FORMATS
from engine.errors import EqatError
from engine.run.events import Export
from engine.run.finding import shorten
from engine.run.launch import launch
from engine.run.measured import measured
from engine.run.shown import CARD, json_safe, origin, render
from engine.run.sight import SeenFromAfar, sight_of
from engine.run.trained import UNTRAINED, has_trained
from engine.system.copying import check_target
from engine.system.guarded import read_bytes
from eqat_tui.feed import RunView
from eqat_tui.keys import Key, bindings
from eqat_tui.lines import Line, line, wrap
from eqat_tui.report.page import report_page
from eqat_tui.report.pictures import default_folder, pictures, write_pictures
from eqat_tui.report.place import check_place, default_file, write_report
from eqat_tui.screens.base import WorkScreen
from eqat_tui.screens.dialogs import Ask, MarkdownReader
from eqat_tui.screens.stopping import ask_to
from eqat_tui.screens.table import key_of
from eqat_tui.views import monitor as monitor_views
from eqat_tui.views import result as views
from eqat_tui.widgets.list_panel import ListPanel
from eqat_tui.widgets.panel import Panel
from eqat_tui.widgets.scrolling import ScrollBox
from eqat_tui.widgets.typed import TypedInput

FIRST_PROMPT = "The capital of France is"
LARGEST_CARD = 1 << 20


def _verified(view: RunView) -> list[Export]:
    """The exports that are what was trained, in the order in which they were first written."""
    return [export for export in view.state.exports.values() if export.verified]


class ResultScreen(WorkScreen):
    """Perplexity, figures, samples and packed checkpoints of the current run."""

    KEYS = (
        Key(
            "i",
            "sample",
            "sample",
            "Let the full-precision and the quantized model continue a prompt of yours",
        ),
        Key("e", "export", "export", "Write a packed checkpoint again, into this run or a folder of yours"),
        Key("v", "evaluate", "evaluate", "Measure the perplexity of the quantized model again"),
        Key("x", "stop", "stop", "Stop the sample, export or evaluation that was started here"),
        Key("m", "card", "card", "The model card of each packed checkpoint, as it was written"),
        Key("y", "copy", "copy", "Copy the lines of Python that load the packed checkpoints"),
        Key("t", "replay", "replay", "Show the run from its beginning again, at any speed"),
        Key("W", "report", "report", "Write the report (HTML) and its charts (SVG) into this folder"),
    )
    ABOUT = "What came of the run. Perplexity is measured on the same tokens before, between and after."
    WRITES = frozenset({"sample", "export", "evaluate", "stop"})
    FIRST = "#columns"
    BINDINGS = bindings(KEYS)
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (120, "-wide")]
    DEFAULT_CSS = """
    ResultScreen #headline { height: auto; }
    ResultScreen #columns { layout: vertical; height: 1fr; overflow-x: hidden; overflow-y: auto; }
    ResultScreen #columns > Vertical { height: auto; width: 1fr; }
    ResultScreen.-wide #columns { layout: horizontal; }
    ResultScreen.-wide #columns > Vertical { width: 1fr; margin-right: 1; }
    ResultScreen .section { height: auto; }
    ResultScreen.-empty #columns { display: none; }
    """

    def __init__(self) -> None:
        super().__init__()
        self._view: RunView | None = None
        self._since = 0.0
        """When this run came into view."""
        self._prompt = FIRST_PROMPT
        self._origin: tuple[str, dict[str, Any] | None] | None = None
        """Of the run with that id."""

    def body(self) -> Iterable[Widget]:
        yield Panel(id="headline")
        with ScrollBox(id="columns"):
            with Vertical():
                yield Panel(id="perplexity", classes="section", title="quality")
                yield Panel(id="figures", classes="section", title="figures")
            with Vertical():
                yield Panel(id="samples", classes="section", title="samples")
                yield Panel(id="exports", classes="section", title="packed checkpoints")
                yield Panel(id="loading", classes="section", title="load it elsewhere")

    def on_mount(self) -> None:
        self.query_one(self.FIRST).focus()

    # -- what is shown -----------------------------------------------------------------------------

    def take(self, view: RunView) -> None:
        before, self._view = self._view, view
        if before is None or before.id != view.id:
            self._since = time.time()
        self.refill()
        if before is not None and before.id == view.id:
            self._tell_news(before, view)

    def _tell_news(self, before: RunView, view: RunView) -> None:
        """What was started here has an end: say so, and show it where it is further down."""
        for name, done in view.state.exports.items():
            old = before.state.exports.get(name)
            # A long log is read in parts: what it tells of long ago is no news.
            if (old is None or old.t != done.t) and done.t >= self._since:
                where = done.copied_to or shorten(views.export_path(view.path, done.path))
                words = "written and verified" if done.verified else "written and NOT verified"
                copied = "copied to" if done.copied_to else "in"
                self.notify(f"{words}, {copied} {where}", title=name, timeout=12, markup=False)
                self.query_one("#exports").scroll_visible(animate=False)
        if view.state.samples != before.state.samples:
            self.query_one("#samples").scroll_visible(animate=False)

    def refill(self) -> None:
        view = self._view
        headline = self.query_one("#headline", Panel)
        if view is None:
            self.shows_a_run(False)
            headline.show([self.no_run()])
            self.refresh_bars(line())
            return
        self.shows_a_run(True)
        width = self.size.width
        busy = self._busy_lines(view, width)
        headline.show([views.headline(view, width), *busy])
        half = self.query_one("#perplexity").size.width or width
        self.query_one("#perplexity", Panel).show(views.perplexities(view.state, half))
        self.query_one("#figures", Panel).show(self._figures(view, half))
        self.query_one("#samples", Panel).show(
            views.samples(view.state, half, can_sample=not self.impossible("sample"))
        )
        self.query_one("#exports", Panel).show(
            views.exports(view, half, can_export=not self.impossible("export"))
        )
        exports = _verified(view)
        snippet = self._snippet(view).splitlines() if exports else ["packed checkpoints come first"]
        self.query_one("#loading", Panel).show([line((text, "" if exports else "muted")) for text in snippet])
        self.refresh_bars(line(monitor_views.state_span(view), " "))

    def _busy_lines(self, view: RunView, width: int) -> list[Line]:
        lines = monitor_views.notices(view, width)
        if view.live:
            lines += monitor_views.progress(view, width)[:1]
        return lines

    def _figures(self, view: RunView, width: int) -> list[Line]:
        """Like ``eqat show``, of the moment that is shown."""
        run = self.eqat.current()
        if self._origin is None or self._origin[0] != run.id:
            self._origin = run.id, origin(run)
        shown = render(view.state, state=view.liveness, work=view.job, config=view.config)
        later = [json_safe(msgspec.to_builtins(one)) for one in measured(run)]
        more = {"path": sight_of(run).place, "origin": self._origin[1], "measured": later}
        return views.figures({**shown, **more}, width)

    def _snippet(self, view: RunView) -> str:
        """How each export is loaded, under its format's name where there are several."""
        done = _verified(view)
        parts = [
            views.loading_snippet(views.export_path(view.path, export.path), export.format) for export in done
        ]
        if len(done) < 2:
            return "".join(parts)
        return "\n\n".join(f"# {export.format}\n{part}" for export, part in zip(done, parts, strict=True))

    # -- keys --------------------------------------------------------------------------------------

    def impossible(self, action: str) -> str:
        view = self._view
        if view is None:
            return f"there is no run yet: {key_of('setup')} sets one up"
        if view.replay is not None and action != "replay":
            return f"this is a replay; open the run from {key_of('runs')}"
        run = self.eqat.current()
        if isinstance(run, SeenFromAfar) and action in ("sample", "export", "evaluate", "card"):
            return f"its files are on {run.sight.host}: ssh there for it"
        if view.liveness == "gone" and action != "stop":
            return "the run's directory is gone"
        if action in ("sample", "export", "evaluate"):
            if view.live:
                return "an engine works on the run already"
            if not has_trained(view.state, view.config):
                return f"{UNTRAINED}: r on {key_of('monitor')} goes on with it"
        if action in ("card", "copy") and not _verified(view):
            return "there is no verified packed checkpoint yet"
        if action == "stop":
            if not view.live:
                return "nothing is being done"
            if view.job is None:
                return f"the run itself is at work: x on {key_of('monitor')} stops it"
        return ""

    def do_sample(self) -> None:
        def begin(prompt: str | None) -> None:
            if prompt and prompt.strip():
                self._prompt = prompt
                self._launch("--task", "generate", f"--prompt={prompt}")

        self.app.push_screen(
            Ask("Continue this prompt", self._prompt, help=["Both models write on, greedily."]), begin
        )

    def do_evaluate(self) -> None:
        self._launch("--task", "eval")

    def do_stop(self) -> None:
        assert self._view is not None
        ask_to("stop", self, self._view)

    def do_export(self) -> None:
        assert self._view is not None

        def begin(answer: tuple[list[str], str] | None) -> None:
            if answer is None:
                return
            formats, folder = answer
            args = ["--task", "export"]
            for name in formats:
                args += ["--format", name]
            if folder:
                args += ["--to", folder]
            self._launch(*args)

        run = self.eqat.current()
        unfit = views.unfit_formats(self._view.config)
        self.app.push_screen(ExportDialog(FORMATS.names(), unfit, run.path), begin)

    def _launch(self, *args: str) -> None:
        run = self.eqat.current()
        self.eqat.in_background(lambda: launch(run, args=args))

    def do_card(self) -> None:
        view = self._view
        assert view is not None
        root, pages = Path(view.path), []
        for export in _verified(view):
            card = Path(os.path.normpath(views.export_path(view.path, export.path) / CARD))
            if not card.is_relative_to(root):  # the log says where, and a log can say anything
                self.notify(f"{card} lies outside of the run, and is not read", severity="warning")
                continue
            text = read_bytes(card, LARGEST_CARD, root=root).decode(errors="replace")
            # The front matter is for the hub's index, not for a reader.
            if text.startswith("---"):
                text = text.partition("\n---")[2].lstrip("-\n")
            pages.append((str(card), text))
        if pages:
            self.app.push_screen(MarkdownReader(pages))

    def do_report(self) -> None:
        run = self.eqat.current()
        file, folder = default_file([run]), default_folder([run])

        def write() -> None:
            check_place(file)
            write_pictures(folder, pictures([run]))
            write_report(file, report_page([run]))

        here = shorten(Path.cwd())
        self.eqat.in_background(write, f"wrote {file} and charts in {folder}/ into {here}")

    def do_copy(self) -> None:
        assert self._view is not None
        self.eqat.copy(self._snippet(self._view), "the lines that load it")

    def do_replay(self) -> None:
        self.eqat.replay(self.eqat.current())


class ExportDialog(ModalScreen[tuple[list[str], str] | None]):
    """Which formats, and where to."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "dismiss(None)", "Cancel"),
        Binding("space", "switch", "Switch", show=False),
    ]

    def __init__(self, formats: tuple[str, ...], unfit: Mapping[str, str], run: Path) -> None:
        """``unfit`` says of formats why the run cannot be written in them."""
        super().__init__()
        self._formats, self._unfit = formats, unfit
        self._chosen = {name for name in formats[:1] if name not in unfit}
        self._run = run

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog"):
            yield Panel(id="question")
            yield ListPanel(id="formats")
            yield Panel(id="where")
            yield TypedInput(placeholder="a folder of yours, or nothing", id="folder")
            yield Panel(id="wrong")
            yield Panel(id="keys")

    def on_mount(self) -> None:
        formats = self.query_one("#formats", ListPanel)
        formats.styles.height = len(self._formats)
        formats.focus()
        self.query_one("#question", Panel).show([line(("Write packed checkpoints", "strong"))])
        self.query_one("#where", Panel).show(
            [line(), line(("Copy them to this folder as well (empty: they stay in the run)", "muted"))]
        )
        self.query_one("#keys", Panel).show(
            [
                line(
                    (" space", "key"),
                    " choose  ",
                    (" tab", "key"),
                    " folder  ",
                    (" enter", "key"),
                    " write  ",
                    (" esc", "key"),
                    " leave it",
                )
            ]
        )
        self._fill()

    def _fill(self) -> None:
        self.query_one("#formats", ListPanel).show([self._row(name) for name in self._formats])

    def _row(self, name: str) -> Line:
        if name in self._unfit:
            return line((f"    {name}  {self._unfit[name]}", "muted"))
        return line(f"[{'x' if name in self._chosen else ' '}] {name}")

    def action_switch(self) -> None:
        name = self._formats[self.query_one("#formats", ListPanel).cursor]
        if name in self._unfit:
            self.notify(f"{name} {self._unfit[name]}", severity="warning")
            return
        self._chosen ^= {name}
        self._fill()

    def on_list_panel_chosen(self, message: ListPanel.Chosen) -> None:
        message.stop()
        self._done()

    def on_input_submitted(self, message: Input.Submitted) -> None:
        message.stop()
        self._done()

    def _done(self) -> None:
        if not self._chosen:
            self.notify("choose a format with space", severity="warning")
            return
        folder = self.query_one("#folder", Input).value.strip()
        if folder:
            folder = str(Path(os.path.expanduser(folder)).absolute())
            try:
                check_target(Path(folder), self._run)
            except EqatError as error:
                wrong = self.query_one("#wrong", Panel)
                wrong.show(wrap(f"✗ {error}", max(20, wrong.size.width), "bad"))
                return
        self.dismiss(([name for name in self._formats if name in self._chosen], folder))
