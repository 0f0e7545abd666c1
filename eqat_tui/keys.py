"""Keys: one list a screen, from which its bindings, its footer, the help and the command palette are made.

A key that does nothing at the moment stays where it is, in brackets, and says why when it is pressed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from textual.binding import Binding, BindingType

from eqat_tui.screens.table import SCREENS


class Key(NamedTuple):
    """One thing that can be done."""

    keys: str
    """As Textual names them, several joined by commas; the first is the one that is shown."""
    action: str
    """Name of the method ``do_ACTION``."""
    label: str
    """One word for the footer."""
    tip: str
    """One line for the help and the palette."""
    footer: bool = True
    above: bool = False
    """It works in dialogs and inputs too, before they are asked."""

    @property
    def shown(self) -> str:
        """The key as people write it."""
        return key_name(self.keys.split(",")[0])


_NAMES = {
    "question_mark": "?",
    "space": "space",
    "enter": "enter",
    "escape": "esc",
    "slash": "/",
    "plus": "+",
    "minus": "-",
    "equals_sign": "=",
    "left": "←",
    "right": "→",
    "delete": "del",
    "less_than_sign": "<",
    "greater_than_sign": ">",
}


def key_name(key: str) -> str:
    """``^p`` for ``ctrl+p``, ``?`` for ``question_mark``."""
    return f"^{key[5:]}" if key.startswith("ctrl+") else _NAMES.get(key, key)


def bindings(keys: Iterable[Key]) -> list[BindingType]:
    """Textual's bindings for ``keys``; all of them go through one action, which knows what is possible."""
    return [
        Binding(
            key.keys,
            f"do('{key.action}')",
            key.label,
            id=key.action,
            tooltip=key.tip,
            show=False,
            priority=key.above,
        )
        for key in keys
    ]


ALWAYS = (
    Key("question_mark,f1", "help", "help", "All keys of this screen"),
    Key("ctrl+p", "palette", "palette", "Find any action by its name"),
    Key("q,ctrl+q", "quit", "quit", "Leave the app; runs go on"),
    Key(
        "ctrl+z",
        "suspend",
        "suspend",
        "Back to the shell for a while; fg comes back",
        footer=False,
        above=True,
    ),
    Key("ctrl+l", "repaint", "repaint", "Draw the whole screen again", footer=False, above=True),
    Key("ctrl+c", "how_to_leave", "how to leave", "Say how to leave", footer=False),
)
"""What works on every screen, besides going to another one."""


def screen_keys() -> tuple[Key, ...]:
    """The keys that go to the screens."""
    return tuple(Key(row.key, row.name, row.label, row.tip, footer=False) for row in SCREENS)


def everywhere() -> tuple[Key, ...]:
    """The keys that work on every screen."""
    return (*screen_keys(), *ALWAYS)
