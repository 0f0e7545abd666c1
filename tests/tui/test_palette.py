"""What is sent to which terminal."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.color import Color
from rich.segment import Segment
from textual.color import BLACK

from eqat_tui.palette import OUR_THEMES, STYLES, AsciiFilter, look_at_terminal, style_of, to_ascii


@pytest.mark.parametrize(
    ("environ", "theme", "colour", "ascii_only"),
    [
        (
            {"TERM": "xterm-256color", "COLORTERM": "truecolor", "LANG": "en_US.UTF-8"},
            "eqat-dark",
            True,
            False,
        ),
        ({"TERM": "xterm-256color", "LANG": "en_US.UTF-8"}, "ansi-dark", True, False),
        ({"TERM": "screen", "LANG": "C.UTF-8", "COLORFGBG": "0;15"}, "ansi-light", True, False),
        ({"COLORTERM": "truecolor", "COLORFGBG": "0;15", "LC_ALL": "de_DE.utf8"}, "eqat-light", True, False),
        ({"COLORTERM": "truecolor", "NO_COLOR": "1"}, "ansi-dark", False, False),
        ({"TERM": "vt220", "LANG": "en_US.ISO-8859-1"}, "ansi-dark", False, True),
        ({"TERM": "linux"}, "ansi-dark", True, True),
    ],
)
def test_the_terminal_is_taken_at_its_word(
    environ: dict[str, str], theme: str, colour: bool, ascii_only: bool
) -> None:
    seen = look_at_terminal(environ=environ)
    assert (seen.theme, seen.colour, seen.ascii_only) == (theme, colour, ascii_only)


def test_flags_win_over_the_terminal() -> None:
    assert look_at_terminal(ascii_only=True, environ={"LANG": "C.UTF-8"}).ascii_only
    assert look_at_terminal(theme="eqat-light", environ={}).theme == "eqat-light"


@given(st.text(st.characters(blacklist_categories=("Cc", "Cs", "Mn", "Me", "Cf")), max_size=30))
def test_ascii_is_as_wide_as_what_it_stands_for(text: str) -> None:
    made = to_ascii(text)
    assert made.isascii()
    assert cell_len(made) == cell_len(text)


@pytest.mark.parametrize(
    ("drawn", "shown"),
    [
        (" → change  y copy  ", " -> change y copy  "),
        ("size 257 MiB → 96.4 MiB  2.67x", "size 257 MiB -> 96.4 MiB 2.67x"),
        (" ↑↓ move   esc leave it          ", " up/down move   esc leave it     "),
        ("│ a → b│  c  ", "| a > b|  c  "),
        ("► ▸ Model  ▾ Grid", "> + Model  - Grid"),
    ],
)
def test_an_arrow_in_ascii_is_no_other_key(drawn: str, shown: str) -> None:
    made = AsciiFilter().apply([Segment(drawn[:7]), Segment(drawn[7:])], BLACK)
    assert "".join(segment.text for segment in made) == shown


def luminance(colour: str) -> float:
    """Relative luminance (WCAG 2.1)."""
    parts = [channel / 255 for channel in Color.parse(colour).get_truecolor()]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", OUR_THEMES, ids=lambda theme: theme.name)
def test_every_role_is_legible_on_its_background(theme) -> None:  # type: ignore[no-untyped-def]
    """A contrast of 4.5, as WCAG asks for text."""
    for role, colour in STYLES[theme.name].items():
        for ground in (theme.background, theme.surface, theme.panel):
            one, other = sorted((luminance(colour), luminance(ground)))
            assert (other + 0.05) / (one + 0.05) >= 4.5, (theme.name, role, ground)


def test_every_theme_has_every_role() -> None:
    roles = {frozenset(table) for table in STYLES.values()}
    assert len(roles) == 1
    for theme in STYLES:
        for role in next(iter(roles)):
            assert style_of(role, theme)
