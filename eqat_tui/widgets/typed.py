"""An input that shows what was typed or pasted into it, whatever that is."""

from __future__ import annotations

from rich.text import Text
from textual.widgets import Input

from eqat_tui.palette import covered


class TypedInput(Input):
    """One line of text. A control character that was pasted, or that a value had, stays in the value: a file
    may be called so. On the screen a sign stands for it, so that the cursor is where it seems to be."""

    @property
    def _value(self) -> Text:
        return Text(covered(super()._value.plain), no_wrap=True, overflow="ignore", end="")
