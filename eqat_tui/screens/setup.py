"""Setup: model, method, bits, group size, text, and every other setting; beside them the plan, live."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from textual.containers import Horizontal
from textual.timer import Timer
from textual.widget import Widget
from textual.widgets import Input

from engine.config.fields import value_of
from engine.config.lists import value_words
from engine.config.loading import preset_names
from engine.config.run import RunConfig
from engine.config.writing import to_toml
from engine.errors import EqatError, UsageError
from engine.run.directory import RunDirectory
from engine.run.launch import launch
from engine.system.files import atomic_write
from eqat_tui.keys import Key, bindings
from eqat_tui.lines import line, wrap
from eqat_tui.screens.base import WorkScreen, show_input
from eqat_tui.screens.dialogs import Ask, Choose, Confirm
from eqat_tui.views import methods
from eqat_tui.views import setup as views
from eqat_tui.views.setup import Draft, Row
from eqat_tui.widgets.list_panel import ListPanel
from eqat_tui.widgets.panel import Panel, ScrollPanel
from eqat_tui.widgets.typed import TypedInput
from eqat_tui.words import hint_for_app

PLAN_AGAIN_S = 15.0
PLAN_DELAY_S = 0.15
"""The plan is computed when the keys have rested this long."""


class SetupScreen(WorkScreen):
    """The form and the plan."""

    KEYS = (
        Key("r", "run", "run", "Start the run; it goes on when this app is left"),
        Key("enter", "edit", "edit", "Choose or type a value; fold or unfold a section"),
        Key("right", "next", "change", "The next value; unfold a section"),
        Key("left", "previous", "back", "The value before; fold a section", footer=False),
        Key("y", "copy", "copy command", "Copy the equal `eqat run …`"),
        Key("slash", "find", "find", "Find a setting by its name or meaning"),
        Key("backspace", "reset", "reset", "What the preset says, again", footer=False),
        Key("R", "fresh", "reset all", "Forget everything that was changed about the preset", footer=False),
        Key("w", "save", "save", "Save these settings as a file that `eqat run` takes", footer=False),
        Key("u", "plan", "plan", "Compute the plan again: what is free now?", footer=False),
    )
    ABOUT = (
        "Choose a model and how to quantize it. The plan says what it would need on this machine now; "
        "what does not fit is explained there. * marks what you changed."
    )
    WRITES = frozenset({"run", "save"})
    BINDINGS = bindings(key for key in KEYS if key.action != "edit")
    HORIZONTAL_BREAKPOINTS = [
        (0, "-narrow"),
        (78, "-normal"),
        (120, "-wide"),
    ]
    DEFAULT_CSS = """
    SetupScreen #find { display: none; }
    SetupScreen #halves { height: 1fr; }
    SetupScreen #form { width: 1fr; }
    SetupScreen #plan { width: 1fr; margin-left: 1; }
    SetupScreen.-narrow #halves { layout: vertical; }
    SetupScreen.-narrow #form { height: 9; }
    SetupScreen.-narrow #plan { margin: 0; height: 1fr; }
    SetupScreen #meaning { height: 4; }
    SetupScreen.-narrow #meaning { height: 3; }
    SetupScreen.-wide #meaning { height: 3; }
    SetupScreen #command { height: auto; max-height: 4; }
    """

    def __init__(self) -> None:
        super().__init__()
        self.draft = Draft(base=views.first_preset())
        self._config: RunConfig = self.draft.shown()
        self._unfolded: frozenset[str] = frozenset()
        self._words = ""
        self._rows: list[Row] = []
        self._wrong = self._touched = ""
        self._plan: dict[str, Any] | None = None
        self._error: Exception | None = None
        self._planning = self._answered = 0
        """Numbers of the plan that was asked for last and of the one that is shown."""
        self._timer: Timer | None = None
        self._devices: Sequence[str] = ()

    def body(self) -> Iterable[Widget]:
        yield TypedInput(
            placeholder="words in the name or meaning of a setting; esc shows all again", id="find"
        )
        with Horizontal(id="halves"):
            yield ListPanel(id="form", classes="section", title="a new run")
            yield ScrollPanel(id="plan", classes="section", title="plan")
        yield Panel(id="meaning", classes="section")
        yield Panel(id="command", classes="section", title="the same from the command line")

    def on_mount(self) -> None:
        self.query_one("#form").focus()
        self._change(self.draft)
        self.set_interval(PLAN_AGAIN_S, self._plan_again)

    def _plan_again(self) -> None:
        """Others use this machine too: what is free now is not what was free a minute ago."""
        if self.is_current and self._error is None and self._plan is not None:
            self._make_plan()

    def start_from(self, base: str) -> None:
        """Begin again with a preset or a file; what was changed is given up only if that is agreed to."""
        self._begin_again(
            Draft(base=base),
            "Replace what is set up here?",
            f"{len(self.draft.changes)} settings that were changed about {self.draft.base} are forgotten; w "
            "saves them as a file first.",
            "replace it",
        )

    def _begin_again(self, again: Draft, question: str, consequence: str, yes: str) -> None:
        if len(self.draft.changes) <= 1:  # is soon made again
            self._change(again)
            return
        self.app.push_screen(
            Confirm(question, consequence, yes), lambda agreed: self._change(again) if agreed else None
        )

    # -- the draft ---------------------------------------------------------------------------------

    def _change(self, draft: Draft) -> None:
        """Take a new draft, unless it cannot even be shown."""
        try:
            config = draft.shown()
        except EqatError as error:
            self.eqat.tell(error)
            return
        self.draft, self._config = draft, config
        self._error, self._wrong = None, ""
        try:
            draft.config()
        except EqatError as error:
            self._error, self._wrong = error, error.where
            self._plan = None
        self._planning += 1
        if self._error is None:
            if self._timer is not None:
                self._timer.stop()
            self._timer = self.set_timer(PLAN_DELAY_S, self._make_plan)
        self.refill()

    def _make_plan(self) -> None:
        """Compute the plan on a thread: a hub id may need the network."""
        number, draft = self._planning, self.draft

        def work() -> None:
            from engine.plan.plan import make_plan

            try:
                result: Any = make_plan(draft.config(), runs_dir=self.eqat.runs_dir).to_dict()
            except (EqatError, OSError) as error:
                result = error
            self.app.call_from_thread(self._planned, number, result)

        self.eqat.in_thread(work)

    def _planned(self, number: int, result: Any) -> None:
        if number != self._planning:
            return  # of settings that have changed since
        self._answered = number
        if isinstance(result, Exception):
            self._plan, self._error = None, result
            self._wrong = getattr(result, "where", "")
        else:
            self._plan, self._error = result, None
            self._wrong = result["problems"][0]["where"] if result["problems"] else ""
        self.refill()

    # -- what is shown -----------------------------------------------------------------------------

    def refill(self) -> None:
        form, plan = self.query_one("#form", ListPanel), self.query_one("#plan", ScrollPanel)
        self._rows = views.rows(self._unfolded, self._words)
        width = max(20, form.size.width - 3)
        form.show(
            [
                views.form_line(row, self.draft, self._config, self._unfolded, self._wrong, width)
                for row in self._rows
            ]
        )
        room = max(20, plan.size.width - 1)
        if self._error is not None:
            plan.show(views.error_lines(self._error, room))
        elif self._plan is not None:
            plan.show(views.plan_lines(self._plan, room))
        else:
            plan.show([line(("computing …", "muted"))])
        self._fill_meaning()
        command = self.draft.command(self.eqat.runs_dir)
        self.query_one("#command", Panel).show(wrap(command, max(20, self.size.width - 1)))
        if self._error is None and not self._is_current_plan:
            words = ("planning … ", "muted")
        elif self.eqat.read_only:
            words = ("read-only ", "muted")
        elif self._plan is not None and not self._plan["problems"]:
            words = ("ready: r runs it ", "good")
        else:
            words = ("not ready ", "warn")
        self.refresh_bars(line(words))

    def _fill_meaning(self) -> None:
        panel = self.query_one("#meaning", Panel)
        row = self._row()
        width = max(20, self.size.width - 1)
        words = views.meaning(row, self.draft, self._config) if row is not None else ""
        lines = wrap(words, width, "muted")
        if row is not None and self._trouble and self._names(row) & {self._wrong, self._touched}:
            # What this choice makes impossible is said here, where it was made.
            lines = wrap(f"✗ {self._trouble}", width, "bad")
        panel.show(lines[: max(1, panel.size.height)])

    @property
    def _is_current_plan(self) -> bool:
        """Whether the plan that is shown is that of the present settings; the last one stays meanwhile."""
        return self._plan is not None and self._answered == self._planning

    @property
    def _trouble(self) -> str:
        """Why the run cannot start."""
        if self._error is not None:
            return views.error_words(self._error)
        if self._plan is not None and self._is_current_plan and self._plan["problems"]:
            problem = self._plan["problems"][0]
            return f"{problem['message']}{hint_for_app(problem['hint'])}"
        return ""

    def _row(self) -> Row | None:
        cursor = self.query_one("#form", ListPanel).cursor
        return self._rows[cursor] if cursor < len(self._rows) else None

    def on_list_panel_moved(self, message: ListPanel.Moved) -> None:
        message.stop()
        self._fill_meaning()
        self.refresh_bars()

    async def on_list_panel_chosen(self, message: ListPanel.Chosen) -> None:
        message.stop()
        await self.action_do("edit")

    # -- keys --------------------------------------------------------------------------------------

    def impossible(self, action: str) -> str:
        row = self._row()
        if action == "run":
            if self._trouble:
                return self._trouble
            if not self._is_current_plan:
                return "the plan is not ready yet: press it again in a moment"
        if action in ("edit", "next", "previous", "reset") and row is None:
            return "no setting is under the cursor"
        if action == "fresh" and not self.draft.changes:
            return "nothing was changed about the preset"
        if action == "reset" and row is not None and not self._names(row) & set(self.draft.changes):
            return "this is what the preset says"
        return ""

    def _names(self, row: Row) -> set[str]:
        """The fields that a line of the form stands for."""
        return views.names_of(row)

    def do_run(self) -> None:
        config = self.draft.config()

        def begin() -> None:
            run = RunDirectory.create(self.eqat.runs_dir, config)
            launch(run)
            self.app.call_from_thread(self.eqat.open_run, run)

        self.eqat.in_background(begin)

    def do_edit(self) -> None:
        row = self._row()
        assert row is not None
        if row.kind == "section":
            self._fold(row, unfold=row.name not in self._unfolded)
        elif row.kind == "model":
            self._choose_model()
        elif row.kind == "base":
            self._choose_preset()
        elif row.kind == "method":
            names = list(methods.methods())
            self._choose("Method", names, methods.method_of(self._config), self._set_method)
        elif views.choices(row.name) and row.name not in views.OPEN:
            values = list(views.choices(row.name))
            words = ["channel (whole rows)" if value == -1 else value_words(value) for value in values]
            now = words[values.index(value_of(self._config, row.name))]
            self._choose(row.name, words, now, lambda word: self._set(row.name, values[words.index(word)]))
        else:
            self._ask(row)

    def _choose(self, title: str, words: list[str], now: str, take: Callable[[str], None]) -> None:
        """One of a few."""
        self.app.push_screen(Choose(title, words, now), lambda word: take(word) if word is not None else None)

    def _set_method(self, name: str) -> None:
        self._change(self.draft.with_method(name))

    def _ask(self, row: Row) -> None:
        value = value_words(views.shown_value(row, self._config))

        def answered(text: str | None) -> None:
            if text is not None:
                self._set(row.name, text)

        self.app.push_screen(
            Ask(
                row.name,
                value,
                help=[views.meaning(row, self.draft, self._config)],
                choices=[str(choice) for choice in views.choices(row.name, self._devices_for(row))],
                check=lambda text: views.complaint(self.draft, row.name, text),
            ),
            answered,
        )

    def _set(self, name: str, value: object) -> None:
        self._touched = name
        try:
            self._change(self.draft.set(name, value))
        except EqatError as error:
            self.eqat.tell(error)

    def _choose_model(self) -> None:
        from eqat_tui.screens.pickers import ModelPicker

        def chosen(source: str | None) -> None:
            if source:
                self._set("model.source", source)

        self.app.push_screen(
            ModelPicker(self.eqat.runs_dir, self._config.grid, self._config.model.source), chosen
        )

    def _start_on(self, base: str) -> None:
        """Another preset or file; what was changed stays changed."""
        try:
            self._change(self.draft.on(base))
        except EqatError as error:
            self.eqat.tell(error)

    def _choose_preset(self) -> None:
        from eqat_tui.screens.pickers import PresetPicker

        def chosen(name: str | None) -> None:
            if name:
                self._start_on(name)

        self.app.push_screen(PresetPicker(self.draft.base), chosen)

    def do_next(self) -> None:
        row = self._row()
        assert row is not None
        if row.kind == "section":
            self._fold(row, unfold=True)
        else:
            self._step(row, 1)

    def _fold(self, row: Row, *, unfold: bool) -> None:
        """Fold a section or unfold it; what comes out of one at the lower edge is brought into view."""
        self._unfolded = self._unfolded | {row.name} if unfold else self._unfolded - {row.name}
        self.refill()
        if unfold:
            self.query_one("#form", ListPanel).reveal_after(len(views.section_fields(row.name)))

    def do_previous(self) -> None:
        row = self._row()
        assert row is not None
        section = row.name.partition(".")[0]
        if row.kind == "section" or (row not in views.HEAD and not views.choices(row.name)):
            self._unfolded = self._unfolded - {section}
            self.refill()
            places = [i for i, one in enumerate(self._rows) if one.kind == "section" and one.name == section]
            if places:
                self.query_one("#form", ListPanel).move_to(places[0])
        else:
            self._step(row, -1)

    def _step(self, row: Row, by: int) -> None:
        """The next or the last of a row's values."""
        if row.kind == "method":
            self._set_method(_beside(list(methods.methods()), methods.method_of(self._config), by))
        elif row.kind == "base":
            names = preset_names()
            self._start_on(_beside(names, self.draft.base, by))
        elif row.kind == "model":
            self._choose_model()
        elif choices := views.choices(row.name, self._devices_for(row)):
            self._set(row.name, _beside(list(choices), views.shown_value(row, self._config), by))
        else:
            self._ask(row)

    def _devices_for(self, row: Row) -> Sequence[str]:
        """``cuda:0`` … for as many GPUs as there are; the driver is asked once, and only where it matters."""
        if not self._devices and row.name == "runtime.device":
            from eqat_tui.doctor import gpu_names

            self._devices = [f"cuda:{index}" for index in range(len(gpu_names()))]
        return self._devices

    def do_reset(self) -> None:
        row = self._row()
        assert row is not None
        self._change(self.draft.reset(sorted(self._names(row))))

    def do_fresh(self) -> None:
        self._begin_again(
            Draft(base=self.draft.base),
            "Forget all changes?",
            f"{len(self.draft.changes)} settings go back to what {self.draft.base} says.",
            "forget them",
        )

    def do_copy(self) -> None:
        self.eqat.copy(self.draft.command(self.eqat.runs_dir), "the command")

    def do_plan(self) -> None:
        self._change(self.draft)

    def do_save(self) -> None:
        def save(path: str | None) -> None:
            if path and path.strip():
                target = Path(os.path.expanduser(path.strip()))
                text = to_toml(self.draft.config()).encode()
                self.eqat.in_background(lambda: _write_new(target, text), f"saved; eqat run {target}")

        if self._error is not None:
            self.eqat.tell(self._error)
            return
        self.app.push_screen(Ask("Save the settings as", "eqat.toml", help=["A .toml file."]), save)

    def do_find(self) -> None:
        show_input(self, self.query_one("#find", Input))

    def on_input_changed(self, message: Input.Changed) -> None:
        message.stop()
        self._words = message.value.strip()
        self.query_one("#form", ListPanel).move_to(0, tell=False)
        self.refill()

    def on_input_submitted(self, message: Input.Submitted) -> None:
        message.stop()
        self.query_one("#form").focus()

    def key_escape(self) -> None:
        box = self.query_one("#find", Input)
        box.value = ""
        box.display = False
        self.query_one("#form").focus()


def _beside(values: Sequence[Any], value: Any, by: int) -> Any:
    """The next value, or the one before, round and round; the first for one that is not among them."""
    return values[(values.index(value) + by) % len(values)] if value in values else values[0]


def _write_new(path: Path, text: bytes) -> None:
    if path.suffix != ".toml":
        raise UsageError("must end in .toml, or eqat run takes it for a preset", where=str(path))
    if os.path.lexists(path):
        raise UsageError("exists already", where=str(path), hint="choose another name")
    # The folder is the user's to choose, and may be a link.
    atomic_write(Path(os.path.realpath(path.parent)) / path.name, text)
