"""Small questions on top of a screen: yes or no, one line of text, a long text to read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

from textual import events
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.suggester import SuggestFromList
from textual.widgets import Input

from engine.system.printable import printable_lines
from eqat_tui.lines import Line, line, wrap
from eqat_tui.widgets.list_panel import ListPanel
from eqat_tui.widgets.panel import Panel, ScrollPanel, entitle
from eqat_tui.widgets.scrolling import ScrollText
from eqat_tui.widgets.typed import TypedInput


class Confirm(ModalScreen[bool]):
    """Asked only for what is hard to undo. Enter alone does not agree."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y", "answer(True)", "Yes"),
        Binding("n,escape,q", "answer(False)", "No"),
    ]

    def __init__(self, question: str, consequence: str, yes: str) -> None:
        super().__init__()
        self._question, self._consequence, self._yes = question, consequence, yes

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog"):
            yield Panel(id="question")

    def on_resize(self, event: events.Resize) -> None:
        width = max(20, min(70, event.size.width - 8))
        self.query_one(Panel).show(
            [
                *wrap(self._question, width, "strong"),
                line(),
                *wrap(self._consequence, width),
                line(),
                line((" y", "key"), f" {self._yes}   ", (" n", "key"), " leave it"),
            ]
        )

    def action_answer(self, yes: bool) -> None:
        self.dismiss(yes)


class Ask(ModalScreen[str | None]):
    """One line of text."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "dismiss(None)", "Cancel")]

    def __init__(
        self,
        question: str,
        value: str = "",
        *,
        help: Sequence[str] = (),
        choices: Sequence[str] = (),
        check: Callable[[str], str] = lambda text: "",
    ) -> None:
        super().__init__()
        self._check = check
        self._question, self._value, self._help = question, value, help
        self._choices = list(choices)

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog"):
            yield Panel(id="question")
            suggester = SuggestFromList(self._choices) if self._choices else None
            yield TypedInput(self._value, id="answer", suggester=suggester, select_on_focus=True)
            yield Panel(id="wrong")
            yield Panel(id="keys")

    def on_resize(self, event: events.Resize) -> None:
        width = max(20, min(70, event.size.width - 8))
        explained = [row for text in self._help for row in wrap(text, width, "muted")]
        self.query_one("#question", Panel).show([*wrap(self._question, width, "strong"), *explained])
        self.query_one("#keys", Panel).show(
            [line((" enter", "key"), " take it   ", (" esc", "key"), " leave it as it was")]
        )

    def on_mount(self) -> None:
        self.query_one(Input).focus()

    def on_input_submitted(self, message: Input.Submitted) -> None:
        message.stop()
        problem = self._check(message.value)
        if problem:  # what was typed stays, to be put right
            wrong = self.query_one("#wrong", Panel)
            wrong.show(wrap(f"✗ {problem}", max(20, wrong.size.width), "bad"))
        else:
            self.dismiss(message.value)


class Choose(ModalScreen[str | None]):
    """One of a few words."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,q", "dismiss(None)", "Cancel")]

    def __init__(self, title: str, words: Sequence[str], now: str) -> None:
        super().__init__()
        self._title, self._words, self._now = title, list(words), now

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog"):
            yield Panel(id="question")
            yield ListPanel(id="words")
            yield Panel(id="keys")

    def on_mount(self) -> None:
        words = self.query_one("#words", ListPanel)
        words.styles.height = min(12, len(self._words))
        words.show([line(word) for word in self._words])
        if self._now in self._words:
            words.move_to(self._words.index(self._now))
        words.focus()
        self.query_one("#question", Panel).show([line((self._title, "strong")), line()])
        self.query_one("#keys", Panel).show(
            [
                line(),
                line(
                    (" ↑↓", "key"), " move   ", (" enter", "key"), " take it   ", (" esc", "key"), " leave it"
                ),
            ]
        )

    def on_list_panel_chosen(self, message: ListPanel.Chosen) -> None:
        message.stop()
        self.dismiss(self._words[message.row])


class Reader(ModalScreen[None]):
    """A text to scroll through."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,q,enter,question_mark", "dismiss", "Close")]

    def __init__(self, title: str, lines: Callable[[int], Sequence[Line]], *, at_end: bool = False) -> None:
        super().__init__()
        self._title, self._at_end = title, at_end
        self._lines = lines
        """The text for a width: a terminal may get another size while one reads."""

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog tall"):
            yield ScrollPanel(id="text", classes="section", title=self._title)
            yield Panel(id="keys")

    def on_mount(self) -> None:
        self.query_one("#text").focus()
        self.query_one("#keys", Panel).show([line((" esc", "key"), " close   ", (" ↑↓", "key"), " scroll")])

    def on_resize(self, event: events.Resize) -> None:
        self.call_after_refresh(self._fill)

    def _fill(self) -> None:
        text = self.query_one("#text", ScrollPanel)
        # A text that scrolls has a bar beside it, which is there only once the text is.
        text.show(self._lines(max(20, text.container_size.width - 1)), follow=self._at_end)


class MarkdownReader(ModalScreen[None]):
    """Markdown files as they will look, one at a time."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q", "dismiss", "Close"),
        Binding("right,tab", "turn(1)", "Next", show=False, priority=True),
        Binding("left,shift+tab", "turn(-1)", "Previous", show=False, priority=True),
    ]

    def __init__(self, pages: Sequence[tuple[str, str]]) -> None:
        """``pages`` are titles and texts; there is at least one."""
        super().__init__()
        self._pages, self._page = pages, 0

    def compose(self) -> ComposeResult:
        from textual.widgets import Markdown

        with Vertical(classes="dialog tall"):
            with ScrollText(id="text", classes="section"):
                yield Markdown(open_links=False)
            yield Panel(id="keys")

    def on_mount(self) -> None:
        self.query_one("#text").focus()
        several = len(self._pages) > 1
        turn = (("   ←→", "key"), " the other cards") if several else ()
        self.query_one("#keys", Panel).show(
            [line((" esc", "key"), " close   ", (" ↑↓", "key"), " scroll", *turn)]
        )
        self._show()

    def action_turn(self, by: int) -> None:
        """To the next file, or the one before."""
        self._page = (self._page + by) % len(self._pages)
        self._show()

    def _show(self) -> None:
        from textual.widgets import Markdown

        title, text = self._pages[self._page]
        number = f"{self._page + 1} of {len(self._pages)}: " if len(self._pages) > 1 else ""
        place = self.query_one("#text")
        entitle(place, number + title)
        place.scroll_home(animate=False)
        self.query_one(Markdown).update(printable_lines(text))
