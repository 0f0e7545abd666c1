"""Choosing a model or a preset: a list that shrinks while one types, and a word on each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from textual import events
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import Input

from engine.config.grid import GridConfig
from eqat_tui.lines import Line, columns, cut, line, widths_of, wrap
from eqat_tui.output import counted, format_bytes, format_parameters
from eqat_tui.screens.host import host_of
from eqat_tui.widgets.list_panel import ListPanel
from eqat_tui.widgets.panel import Panel, entitle
from eqat_tui.widgets.typed import TypedInput

if TYPE_CHECKING:
    from eqat_tui.models import Found, ModelFacts

INSPECT_DELAY_S = 0.15


class Picker(ModalScreen[str | None]):
    """An input, a list, and a few lines about the row under the cursor."""

    TITLE: ClassVar[str | None] = ""
    HINT = "type to search"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "dismiss(None)", "Cancel"),
        # The keys of the list work while the input has the focus.
        Binding("up", "move(-1)", "Up", show=False, priority=True),
        Binding("down", "move(1)", "Down", show=False, priority=True),
        Binding("pageup", "move(-8)", "Up", show=False, priority=True),
        Binding("pagedown", "move(8)", "Down", show=False, priority=True),
        Binding("home", "end(False)", "Top", show=False, priority=True),
        Binding("end", "end(True)", "Bottom", show=False, priority=True),
    ]
    DEFAULT_CSS = """
    Picker #list { height: 1fr; min-height: 4; }
    Picker #about { height: 5; }
    """

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog tall"):
            yield Panel(id="title")
            yield TypedInput(placeholder=self.HINT, id="words")
            yield ListPanel(id="list", classes="section")
            yield Panel(id="about", classes="section")
            yield Panel(id="keys")

    def on_mount(self) -> None:
        self.query_one("#title", Panel).show([line((self.TITLE or "", "strong"))])
        self.query_one("#words").focus()
        self.fill()

    def on_resize(self, event: events.Resize) -> None:
        self.call_after_refresh(self.fill)

    @property
    def words(self) -> str:
        """What has been typed."""
        return self.query_one("#words", Input).value.strip()

    def fill(self) -> None:
        """Show what matches."""
        raise NotImplementedError

    def chosen(self) -> str | None:
        """What enter means now."""
        raise NotImplementedError

    def action_move(self, by: int) -> None:
        self.query_one("#list", ListPanel).action_move(by)

    def action_end(self, last: bool) -> None:
        self.query_one("#list", ListPanel).action_end(last)

    def on_input_changed(self, message: Input.Changed) -> None:
        message.stop()
        self.query_one("#list", ListPanel).move_to(0, tell=False)
        self.fill()

    def on_input_submitted(self, message: Input.Submitted) -> None:
        message.stop()
        self.take()

    def on_list_panel_chosen(self, message: ListPanel.Chosen) -> None:
        message.stop()
        self.take()

    def take(self) -> None:
        """Enter."""
        answer = self.chosen()
        if answer is not None:
            self.dismiss(answer)


class PresetPicker(Picker):
    """The shipped presets."""

    TITLE = "Start from a preset"
    HINT = "type a part of its name, or the path of a .toml file"

    def __init__(self, current: str) -> None:
        super().__init__()
        from eqat_tui.preset_rows import preset_rows

        self._all = preset_rows()
        self._current = current
        self._shown = self._all

    def fill(self) -> None:
        words = self.words.lower().split()
        found = [
            row
            for row in self._all
            if all(word in f"{row['name']} {row['description']}".lower() for word in words)
        ]
        # Who types a name means it, and not the first description that has these letters.
        self._shown = sorted(found, key=lambda row: not all(word in str(row["name"]) for word in words))
        table = [
            [row["name"], (f"w{row['bits']}g{row['group_size']}" if row["bits"] else "", "muted")]
            for row in self._shown
        ]
        panel = self.query_one("#list", ListPanel)
        panel.show(columns(table, widths_of(table)))
        if not words:
            names = [row["name"] for row in self._shown]
            panel.move_to(names.index(self._current) if self._current in names else 0, tell=False)
        self._tell()
        self.query_one("#keys", Panel).show(
            [line((" ↑↓", "key"), " move   ", (" enter", "key"), " take it   ", (" esc", "key"), " leave it")]
        )

    def on_list_panel_moved(self, message: ListPanel.Moved) -> None:
        message.stop()
        self._tell()

    def _tell(self) -> None:
        about = self.query_one("#about", Panel)
        row = self._under()
        words = str(row["description"]) if row else "no preset has these words; enter takes them as a file"
        model = f"model {row['model']}" if row and row["model"] else "takes any model" if row else ""
        width = max(20, about.size.width)
        about.show([*wrap(words, width), *wrap(model, width, "muted")])

    def _under(self) -> dict[str, object] | None:
        cursor = self.query_one("#list", ListPanel).cursor
        return self._shown[cursor] if cursor < len(self._shown) else None

    def chosen(self) -> str | None:
        row = self._under()
        return str(row["name"]) if row is not None else self.words or None


class ModelPicker(Picker):
    """Models that are here, a folder browser, or whatever is typed."""

    TITLE = "Choose a model"
    HINT = "search, type a path, or a hub id: org/name"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("tab", "complete", "Complete", show=False, priority=True),
    ]

    def __init__(self, runs_dir: Path, grid: GridConfig, current: str) -> None:
        super().__init__()
        self._runs_dir, self._grid, self._current = runs_dir, grid, current
        self._known: list[Found] | None = None
        self._shown: list[Found] = []
        self._facts: dict[str, ModelFacts | str] = {}
        self._asked = 0

    def on_mount(self) -> None:
        super().on_mount()

        def look() -> None:
            from eqat_tui.models import known_models

            found = known_models(self._runs_dir)
            self.app.call_from_thread(self._found, found)

        host_of(self).in_thread(look)

    def _found(self, known: list[Found]) -> None:
        self._known = known
        self.fill()

    def fill(self) -> None:
        from eqat_tui.models import Found, complete

        text = self.words
        words = text.lower().split()
        paths = complete(text) if text[:1] in ("/", ".", "~") else []
        matches = [one for one in self._known or [] if all(word in one.source.lower() for word in words)]
        typed = []
        if text and not paths and all(one.source != text for one in matches):
            typed = [Found(source=text, origin="typed", detail="take it as a path or a hub id")]
        self._shown = [*paths, *matches, *typed]
        panel = self.query_one("#list", ListPanel)
        width = max(20, panel.size.width - 3)
        panel.show([self._row(one, width) for one in self._shown])
        entitle(panel, "looking for models …" if self._known is None else "models")
        self.query_one("#keys", Panel).show(
            [
                line(
                    (" ↑↓", "key"),
                    " move  ",
                    (" enter", "key"),
                    " take it  ",
                    (" tab", "key"),
                    " into the folder  ",
                    (" esc", "key"),
                    " leave it",
                )
            ]
        )
        self._look_at()

    def _row(self, one: Found, width: int) -> Line:
        detail = f"  {one.detail or one.origin}"
        name = one.source + ("" if one.is_model else "/")
        room = max(12, width - len(detail))
        if len(name) > room:  # of a long path the end tells more
            name = f"…{name[1 - room :]}"
        return cut(line(name, (detail, "muted")), width)

    def _under(self) -> Found | None:
        cursor = self.query_one("#list", ListPanel).cursor
        return self._shown[cursor] if cursor < len(self._shown) else None

    def on_list_panel_moved(self, message: ListPanel.Moved) -> None:
        message.stop()
        self._look_at()

    def _look_at(self) -> None:
        """Read the header of the model under the cursor, on a thread, once the cursor rests."""
        one = self._under()
        about = self.query_one("#about", Panel)
        if one is None or not one.is_model:
            about.show([line(("a folder, no model: enter or tab goes in", "muted"))] if one else [])
            return
        if one.source in self._facts:
            self._tell(one.source)
            return
        if one.origin == "typed":
            about.show(wrap("enter takes it; the plan then says what it is", about.size.width, "muted"))
            return
        about.show([line(("reading its header …", "muted"))])
        self._asked += 1
        number, source, grid = self._asked, one.source, self._grid

        def look() -> None:
            from eqat_tui.models import inspect

            if number == self._asked:
                facts = inspect(source, grid=grid)
                self.app.call_from_thread(self._learn, source, facts)

        self.set_timer(INSPECT_DELAY_S, lambda: host_of(self).in_thread(look))

    def _learn(self, source: str, facts: ModelFacts | str) -> None:
        self._facts[source] = facts
        under = self._under()
        if under is not None and under.source == source:
            self._tell(source)

    def _tell(self, source: str) -> None:
        about = self.query_one("#about", Panel)
        about.show(facts_lines(self._facts[source], max(20, about.size.width)))

    def action_complete(self) -> None:
        """Put the folder or the model under the cursor into the input."""
        one = self._under()
        if one is not None:
            box = self.query_one("#words", Input)
            box.value = one.source + ("" if one.is_model else "/")
            box.cursor_position = len(box.value)

    def chosen(self) -> str | None:
        one = self._under()
        if one is not None and not one.is_model:
            self.action_complete()
            return None
        return one.source if one is not None else None


def facts_lines(facts: ModelFacts | str, width: int) -> list[Line]:
    """Architecture, parameters, size, and whether it is supported."""
    if isinstance(facts, str):
        return wrap(f"✗ {facts}", width, "bad")
    size = format_parameters(facts.parameters)
    stored = f", {format_bytes(facts.stored_bytes)} on disk" if facts.stored_bytes else ""
    lines: Sequence[Line] = [
        line(
            (facts.model_type, "strong"),
            f"  {size} parameters, {counted(facts.blocks, 'block')} of width {facts.hidden}",
        ),
        line((f"{format_bytes(facts.fp_bytes)} at 16 bits{stored}; context {facts.context:,}", "muted")),
    ]
    if not facts.supported:
        return [*lines, *wrap(f"✗ {facts.problem}", width, "bad")]
    words = ("✓ supported, a family eqat is tested with", "good")
    if not facts.tested:
        words = ("✓ looks supported, but this family is not tested", "warn")
    return [*(cut(row, width) for row in lines), line(words)]
