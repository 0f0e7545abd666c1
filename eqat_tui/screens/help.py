"""All keys of a screen."""

from __future__ import annotations

from eqat_tui.keys import Key, everywhere
from eqat_tui.lines import Line, line, width_of, wrap
from eqat_tui.screens.base import WorkScreen
from eqat_tui.screens.dialogs import Reader
from eqat_tui.screens.table import SCREENS

MOVING = (
    ("↑↓ j k", "Move"),
    ("g G", "Top and bottom"),
    ("pgup pgdn", "A page up and down"),
    ("enter", "Choose"),
    ("tab", "Next part of the screen"),
    ("esc", "Close, go back"),
)


def help_for(screen: WorkScreen) -> Reader:
    """The help of ``screen`` as it is now."""
    keys = [(key, screen.why_not(key.action)) for key in screen.offered()]

    def lines(width: int) -> list[Line]:
        made: list[Line] = [*wrap(screen.ABOUT, width), line()]
        for key, why_not in keys:
            made += _key(key, why_not, width)
        made += [line(), line(("everywhere", "strong"))]
        for key in everywhere():
            made += _key(key, "", width)
        return [*made, *(line((f"{name:>9}  ", "key"), words) for name, words in MOVING)]

    return Reader(f"{SCREENS[screen.eqat.current_mode].label}: keys", lines)


def _key(key: Key, why_not: str, width: int) -> list[Line]:
    """The key, its name, what it does, and why it cannot do that now."""
    head = line((f"{key.shown:>9}  ", "key"), f"{key.label:<12}  ")
    indent = width_of(head)
    room = max(12, width - indent)
    rows = wrap(key.tip, room, "muted")
    if why_not:
        rows += wrap(f"not now: {why_not}", room, "warn")
    return [[*(head if index == 0 else line(" " * indent)), *row] for index, row in enumerate(rows)]
