"""What foreign words become on their way to a person."""

from __future__ import annotations

import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.system.printable import hides, printable, printable_lines

ANYTHING = st.text(
    st.characters(exclude_categories=()) | st.sampled_from("\x1b\x07\r\n\t\x9b\u202e\u200d\ud800")
)
STEERING = [*range(0x20), *range(0x7F, 0xA0)]
BIDI = [0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
WITHOUT_WIDTH = [0xAD, 0x180E, 0x200B, 0x2060, 0x2061, 0xFEFF, 0xFFF9, 0xE0001, 0xE0041]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "SmolLM2-135M.Q4_1",
        "é ü ß ñ  Ελλάδα Москва",
        "中文模型",
        "नमस्ते",
        "क्\u200dष",
        "می\u200cخواهم",
        "🎉 👩\u200d🔬 ❤\ufe0f 1\ufe0f\u20e3 👨\u200d👩\u200d👧",
        "→ × ✓ – … █ ⠿",
        "a\u0301",
        "\u0600\u06dd",
        "no\xa0break",
    ],
)
def test_what_people_write_stays_as_it_is(text: str) -> None:
    assert printable(text) == text == printable_lines(text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]0;owned\x07", r"\x1b]0;owned\x07"),
        ("\x1b]52;c;ZXZpbA==\x1b\\", "\\x1b]52;c;ZXZpbA==\\x1b\\"),
        ("\x9b31m", r"\x9b31m"),
        ("a\nb\tc\r", r"a\nb\tc\r"),
        ("\x7f", r"\x7f"),
        ("exe.\u202egpj", r"exe.\u202egpj"),
        ("a\u2028b\u2029", r"a\u2028b\u2029"),
        ("\ud83d", r"\ud83d"),
        ("\ufffe\ufdd0", r"\ufffe\ufdd0"),
        ("\U000e0041", r"\U000e0041"),
        ("pass\u200dword", r"pass\u200dword"),
        ("\u200c", r"\u200c"),
        ("क\u200d\u200dष", r"क\u200d\u200dष"),
    ],
)
def test_what_steers_a_terminal_or_hides_is_shown_as_an_escape(text: str, shown: str) -> None:
    assert printable(text) == shown


@pytest.mark.parametrize(
    "code", [*STEERING, *BIDI, *WITHOUT_WIDTH, 0x2028, 0x2029, 0xD800, 0xDFFF, 0xFFFF, 0x10FFFE]
)
def test_nothing_of_its_kind_is_forgotten(code: int) -> None:
    assert printable(f"a{chr(code)}b").isascii()


def test_of_all_letters_only_formats_and_controls_change() -> None:
    """The shortcut and the rule agree on every code point that there is."""
    for code in range(sys.maxunicode + 1):
        letter = chr(code)
        if hides(letter):
            assert not letter.isprintable()
            assert unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Zl", "Zp", "Cn")
        elif letter not in "\u200c\u200d":
            assert printable(letter) == letter


@given(ANYTHING)
def test_what_went_through_once_does_not_change_again(text: str) -> None:
    for clean in (printable, printable_lines):
        assert clean(clean(text)) == clean(text)


@given(ANYTHING)
def test_nothing_that_steers_goes_through(text: str) -> None:
    assert not any(hides(letter) for letter in printable(text))
    assert not any(hides(letter) for letter in printable_lines(text) if letter not in "\n\t")
    printable(text).encode("utf-8")


@given(ANYTHING)
def test_lines_stay_lines(text: str) -> None:
    assert printable_lines(text).split("\n") == [
        "\t".join(map(printable, row.split("\t"))) for row in text.replace("\r\n", "\n").split("\n")
    ]
