"""Foreign words on their way to a person: whatever could steer a terminal or hide text is made visible.

Names and texts come from models, logs, archives, other programs and their users. An escape sequence in one
sets a window's title, writes the clipboard or hides what stands beside it; a letter that changes the
direction of writing lets ``gpj.exe`` look like ``exe.jpg``. Such letters are shown as what they are
(``\\x1b``, ``\\u202e``) rather than left out, so that whoever looks sees that something is there.
"""

from __future__ import annotations

import re
import unicodedata

_VISIBLE_FORMATS = frozenset(
    "\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2\U000110bd\U000110cd"
)
"""Signs of Arabic, Syriac and Kaithi numbers: Unicode counts them as formats, and they are seen."""

JOINERS = frozenset("\u200c\u200d")
"""They join emoji and tell apart letters of Indic scripts and of Persian; anywhere else they hide words from
a search."""
_JOINABLE = "[^\\0-\u05ff\u2000-\u206f]"
_STRAY_JOINER = re.compile(f"(?<!{_JOINABLE})[\u200c\u200d]|[\u200c\u200d](?!{_JOINABLE})")

_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def printable(text: str) -> str:
    """``text`` as one line that only shows itself: control characters (C0, DEL, C1), line ends, signs without
    a width or for the direction of writing, lone surrogates and what is no character become ASCII escapes.

    Everything else is the same as before, and a text that went through once does not change again.
    """
    # True of letters, marks, signs and the blank, which is nearly every text there is, and answered in C.
    if text.isprintable():
        return text
    return _STRAY_JOINER.sub(lambda found: escaped(found[0]), text.translate(_ESCAPES))


def printable_lines(text: str) -> str:
    """:func:`printable` for a text of several lines: newlines and tabs stay, ``\\r\\n`` is a newline."""
    if text.isprintable():
        return text
    parts = re.split("([\n\t]+)", text.replace("\r\n", "\n"))
    return "".join(printable(part) if index % 2 == 0 else part for index, part in enumerate(parts))


def hides(letter: str) -> bool:
    """Whether a letter steers a terminal, hides text or is none, wherever it stands."""
    kind = unicodedata.category(letter)
    if kind == "Cf":
        return letter not in _VISIBLE_FORMATS and letter not in JOINERS
    return kind in ("Cc", "Cs", "Zl", "Zp") or (kind == "Cn" and _is_no_character(ord(letter)))


def escaped(letter: str) -> str:
    """``\\x1b``, ``\\u202e``, ``\\U000e0041``: a letter as Python writes it."""
    code = ord(letter)
    if letter in _SHORT:
        return _SHORT[letter]
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _is_no_character(code: int) -> bool:
    """Unicode's 66 code points that are never characters; one that is not assigned yet may become one."""
    return 0xFDD0 <= code <= 0xFDEF or code & 0xFFFE == 0xFFFE


class _Escapes(dict[int, str]):
    """What :meth:`str.translate` makes of each letter, looked up once."""

    def __missing__(self, code: int) -> str:
        letter = chr(code)
        self[code] = shown = escaped(letter) if hides(letter) else letter
        return shown


_ESCAPES = _Escapes()
