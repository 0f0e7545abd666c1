"""All keys of a screen."""

from __future__ import annotations

from eqat_tui.keys import EVERYWHERE
from eqat_tui.lines import Line, line, wrap
from eqat_tui.screens.base import WorkScreen
from eqat_tui.screens.dialogs import Reader

MOVING = (("↑ ↓", "Move"), ("enter", "Choose"), ("tab", "Next part of the screen"), ("esc", "Close, go back"))


def help_for(screen: WorkScreen, width: int) -> Reader:
    """The help of ``screen``."""
    lines: list[Line] = [*wrap(screen.ABOUT, width), line()]
    for key in screen.offered():
        lines.append(line((f"{key.shown:>7}  ", "key"), f"{key.label:<10} ", (key.tip, "muted")))
        why = screen.why_not(key.action)
        if why:
            lines.append(line(" " * 20, (f"not now: {why}", "warn")))
    lines += [line(), line(("everywhere", "strong"))]
    for key in EVERYWHERE:
        lines.append(line((f"{key.shown:>7}  ", "key"), f"{key.label:<10} ", (key.tip, "muted")))
    for name, words in MOVING:
        lines.append(line((f"{name:>7}  ", "key"), words))
    return Reader(f"{screen.MODE.title()}: keys", lines)
