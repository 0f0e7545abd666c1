"""Colours of the app, by role, and what the terminal can show.

The hues are those of Okabe and Ito (https://jfly.uni-koeln.de/color/), which people with any common form of
colour blindness tell apart. A role has a colour in the dark and the light theme, and one of the terminal's
own sixteen in the ANSI themes, which cost a slow connection a third of the bytes. No state is told by colour
alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import lru_cache
from itertools import groupby
from typing import TYPE_CHECKING

import msgspec
from rich.segment import Segment
from rich.style import Style
from textual.content import Content
from textual.filter import LineFilter
from textual.theme import Theme

from engine.system.ascii import SIGNS
from engine.system.printable import hides
from eqat_tui.lines import Line, cut

if TYPE_CHECKING:
    from textual.color import Color

LONGEST_TITLE = 300
"""Cells of a title; no terminal is as wide."""
COVER = "\ufffd"

DARK, LIGHT, ANSI_DARK, ANSI_LIGHT = "eqat-dark", "eqat-light", "ansi-dark", "ansi-light"
THEMES = (DARK, LIGHT, ANSI_DARK, ANSI_LIGHT)

_DARK = {
    "muted": "#8b949e",
    "accent": "#56b4e9",
    "good": "#2fc49a",
    "warn": "#e69f00",
    "bad": "#ff7b54",
    "key": "#f0e442",
    "series1": "#56b4e9",
    "series2": "#e69f00",
    "series3": "#2fc49a",
    "series4": "#cc79a7",
}
_LIGHT = {
    "muted": "#565d66",
    "accent": "#005f96",
    "good": "#00684a",
    "warn": "#774d00",
    "bad": "#a33400",
    "key": "#7a2f62",
    "series1": "#005f96",
    "series2": "#8a4e00",
    "series3": "#00684a",
    "series4": "#8f3869",
}
_ANSI = {
    "muted": "dim",
    "accent": "cyan",
    "good": "green",
    "warn": "yellow",
    "bad": "bold red",
    "key": "bold magenta",
    "series1": "cyan",
    "series2": "yellow",
    "series3": "green",
    "series4": "magenta",
}
_ANSI_LIGHT = {**_ANSI, "accent": "blue", "warn": "red", "series1": "blue", "series2": "red"}
_EVERYWHERE = {"strong": "bold", "cursor": "reverse", "title": "bold", "link": "underline"}

STYLES: Mapping[str, Mapping[str, str]] = {
    DARK: _DARK,
    LIGHT: _LIGHT,
    ANSI_DARK: _ANSI,
    ANSI_LIGHT: _ANSI_LIGHT,
}

OUR_THEMES = (
    Theme(
        name=DARK,
        primary="#56b4e9",
        secondary="#2fc49a",
        accent="#e69f00",
        warning="#e69f00",
        error="#ff7b54",
        success="#2fc49a",
        foreground="#d8dee4",
        background="#0f1419",
        surface="#161c23",
        panel="#1d242d",
        dark=True,
    ),
    Theme(
        name=LIGHT,
        primary="#005f96",
        secondary="#00684a",
        accent="#8a4e00",
        warning="#774d00",
        error="#a33400",
        success="#00684a",
        foreground="#1b1f24",
        background="#fbfbf9",
        surface="#f1f1ee",
        panel="#e6e6e2",
        dark=False,
    ),
)


@lru_cache(256)
def style_of(role: str, theme: str) -> Style:
    """The style of a role; several roles are joined by blanks (``good strong``)."""
    table = STYLES.get(theme, _ANSI)
    style = Style.null()
    for name in role.split():
        style += Style.parse(table.get(name) or _EVERYWHERE.get(name, ""))
    return style


def content(spans: Line, theme: str) -> Content:
    """``spans`` as Textual's text, for the titles of panels. A title that is given as words would be read as
    markup, and a run may be called ``[/]``."""
    parts = []
    for text, role in cut(spans, LONGEST_TITLE):
        styles = [STYLES.get(theme, _ANSI).get(name) or _EVERYWHERE.get(name, "") for name in role.split()]
        parts.append((text, " ".join(_content_style(part) for style in styles for part in style.split())))
    return Content.assemble(*parts)


def _content_style(part: str) -> str:
    """A bare name is a web colour there; the terminal's own ones have a prefix."""
    return part if part.startswith("#") or part in ("bold", "dim", "reverse", "underline") else f"ansi_{part}"


class Terminal(msgspec.Struct, frozen=True, kw_only=True):
    """What the terminal can show and how much it should be sent."""

    ascii_only: bool = False
    colour: bool = True
    theme: str = DARK

    @property
    def marks(self) -> bool:
        """Whether series of a chart need different characters, because colours do not tell them apart."""
        return not self.colour


def look_at_terminal(
    *, ascii_only: bool = False, theme: str | None = None, environ: Mapping[str, str] = os.environ
) -> Terminal:
    """What ``$TERM``, ``$COLORTERM``, ``$NO_COLOR``, ``$COLORFGBG`` and the locale say, unless flags say
    more.

    Without a promise of true colour, and under NO_COLOR, the theme is an ANSI one: there Textual's own would
    still be sent as 24-bit colours or greys.
    """
    colour = not environ.get("NO_COLOR")
    term = environ.get("TERM", "")
    if term in ("vt100", "vt220", "linux-m", "xterm-mono"):
        colour = False
    rich_colour = environ.get("COLORTERM", "").lower() in ("truecolor", "24bit") or term.endswith("-direct")
    light = environ.get("COLORFGBG", "").rpartition(";")[2] in ("7", "15")
    if theme is None:
        plain, full = (ANSI_LIGHT, LIGHT) if light else (ANSI_DARK, DARK)
        theme = full if colour and rich_colour else plain
    return Terminal(ascii_only=ascii_only or not _speaks_utf8(environ), colour=colour, theme=theme)


def _speaks_utf8(environ: Mapping[str, str]) -> bool:
    """The locale's word; with none at all a terminal of today is believed to."""
    locale = environ.get("LC_ALL") or environ.get("LC_CTYPE") or environ.get("LANG") or ""
    if not locale or locale in ("C", "POSIX"):
        return environ.get("TERM") != "linux"
    return "utf" in locale.lower()


# -- ASCII ---------------------------------------------------------------------------------------------


def to_ascii(text: str) -> str:
    """``text`` in ASCII, as many cells wide as before."""
    if text.isascii():
        return text
    from rich.cells import cell_len

    text = _short(text).translate(SIGNS)
    return "".join(letter if letter.isascii() else "?" * cell_len(letter) for letter in text)


_SPELLED = (("↑↓", "up/down"), ("→", "->"), ("←", "<-"))
"""Signs of which one letter would be read as another key (``>``, ``^v``), and what they are in ASCII."""
_SHORT = str.maketrans({"→": ">", "←": "<"})


def _short(text: str) -> str:
    """Arrows where a line has no room for more than one letter."""
    return text.translate(_SHORT)


def spelled(text: str) -> list[tuple[int, int, str]]:
    """How a line's arrows are spelled out in ASCII: from where to where what takes their place, from the end
    of the line to its beginning. The room comes from the next blanks that have some to spare, so the line
    stays as wide; without such blanks before the next border an arrow stays one letter."""
    changes: list[tuple[int, int, str]] = []
    for sign, words in _SPELLED:
        more = len(words) - len(sign)
        for found in re.finditer(sign, text):
            blanks = re.compile(f"[^│┃]*?( {{{more + 1},}})").match(text, found.end())
            taken = blanks is not None and any(begin == blanks.start(1) for begin, _, _ in changes)
            if blanks is not None and not taken:
                changes.append((found.start(), found.end(), words))
                changes.append((blanks.start(1), blanks.start(1) + more, ""))
    return sorted(changes, reverse=True)


class PrintableFilter(LineFilter):
    """The last step but one, after all widgets: what Textual's own ones were given raw cannot pass either.

    The lines are laid out by then: what takes a letter's place is as wide as the letter was counted.
    """

    def apply(self, segments: list[Segment], background: Color) -> list[Segment]:
        if all(segment.text.isprintable() or segment.control for segment in segments):
            return segments
        return [
            segment if segment.control else Segment(_masked(segment.text), segment.style)
            for segment in segments
        ]


def _masked(text: str) -> str:
    from rich.cells import cell_len

    return "".join(COVER * cell_len(letter) if hides(letter) else letter for letter in text)


def covered(text: str) -> str:
    """``text`` with a sign in place of each letter that steers or hides: as many letters as before."""
    return text if text.isprintable() else "".join(COVER if hides(letter) else letter for letter in text)


class AsciiFilter(LineFilter):
    """The last step before the terminal: whatever any widget draws becomes ASCII."""

    def apply(self, segments: list[Segment], background: Color) -> list[Segment]:
        return [
            segment if segment.control else Segment(to_ascii(segment.text), segment.style)
            for segment in _with_room(segments)
        ]


def _with_room(segments: list[Segment]) -> list[Segment]:
    """The line with its arrows spelled out."""
    changes = spelled("".join(segment.text for segment in segments))
    letters = [(letter, segment) for segment in segments for letter in segment.text] if changes else []
    if not changes or any(segment.control for segment in segments):
        return segments
    for begin, end, words in changes:
        letters[begin:end] = [(letter, letters[begin][1]) for letter in words]
    return [
        Segment("".join(letter for letter, _ in group), style)
        for style, group in groupby(letters, key=lambda one: one[1].style)
    ]
