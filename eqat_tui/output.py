"""Words and numbers on a terminal: data goes to stdout, narration and errors to stderr.

Tables are laid out here rather than by rich: a table in a pipe must not be cut to 80 columns, and a listing
should not pay for importing a renderer.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NoReturn

from engine.errors import EqatError
from engine.system.printable import hides, printable, printable_lines
from engine.system.standard_streams import OutputError, finish_output

LONGEST_LINE = 4000
"""Letters of an error or a note: a file's name may have as many, and no sentence has more."""
LONGEST_CELL = 200
"""Letters of a name in a table, which would make all its rows as long."""
LONGEST_TIME_S = 3.6e9
"""What is longer (a million hours) was measured by a clock that is wrong."""


def show(text: str) -> None:
    """Data, on stdout; :class:`~engine.system.standard_streams.OutputError` where that is full or gone."""
    print(printable_lines(text), flush=True)


def say(text: str, end: str = "\n") -> None:
    """Narration: for the person watching, never part of the data."""
    print(printable_lines(text), end=end, file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    """One JSON document on stdout; a NaN is a bug, since JSON has none.

    It is read by people too, and by programs that print what they read: what :func:`printable` would not let
    through is an escape of JSON, and so is all that is not ASCII where the stream has no other letters.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    if not text.isascii() or "\x7f" in text:
        text = text.translate(_JSON_ESCAPES)
        try:
            text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
        except UnicodeEncodeError:
            text = json.dumps(value, indent=2, allow_nan=False).replace("\x7f", "\\u007f")
    print(text, flush=True)


class _JsonEscapes(dict[int, str]):
    """What :meth:`str.translate` makes of each letter of a JSON document, whose line ends are its layout."""

    def __missing__(self, code: int) -> str:
        letter = chr(code)
        if letter != "\n" and hides(letter):
            # Two code units where it takes two, as JSON wants it.
            letter = "\\u007f" if code == 0x7F else json.dumps(letter)[1:-1]
        self[code] = letter
        return letter


_JSON_ESCAPES = _JsonEscapes()


def print_error(error: EqatError, *, as_json: bool) -> None:
    """The failure in one line on stderr, and for ``--json`` as an object on stdout too."""
    say(f"error: {one_line(str(error))}")
    if as_json:
        with suppress(OutputError):  # said already, or not worth a second complaint
            print_json({"error": error_fields(error)})


def error_words(error: Exception) -> str:
    """What went wrong, in words where there are some."""
    if isinstance(error, EqatError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def end(code: int) -> NoReturn:
    """End this process with ``code``, once all that was printed is written; with 7 where it cannot be."""
    try:
        finish_output()
    except OutputError as error:
        print_error(error, as_json=False)
        code = code or int(error.exit_code)
    sys.exit(code)


def one_line(text: str) -> str:
    """``text`` with its line ends and rows of blanks as single blanks, cut where nobody reads on."""
    line = printable(" ".join(re.split("[ \t\r\n]+", text[:LONGEST_LINE].strip(" \t\r\n"))))
    return f"{line} …" if len(text) > LONGEST_LINE else line


def error_fields(error: EqatError) -> dict[str, Any]:
    """What scripts get to know about a failure."""
    return {
        "message": error.message,
        "where": error.where,
        "hint": error.hint,
        "exit_code": int(error.exit_code),
    }


def colour_wanted(stream: Any) -> bool:
    """Colour and cursor control only on a real terminal that can do it."""
    return bool(stream.isatty()) and os.environ.get("TERM", "dumb") != "dumb"


def number(value: Any) -> float | None:
    """``value`` as a finite number, or none: logs hold numbers of 400 digits, and sums of what they hold grow
    beyond all that is a number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def share(part: Any, whole: Any) -> float:
    """``part / whole`` between 0 and 1; 0 where that is nothing."""
    above, below = number(part), number(whole)
    return min(1.0, max(0.0, above / below)) if above is not None and below else 0.0


def format_bytes(count: float | None) -> str:
    """``1.23 GiB``: binary units, as configurations and GPU drivers count."""
    size, unit = number(count), "B"
    if size is None:
        return "–"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if abs(size) < 1000:
            break
        size, unit = size / 1024, larger
    if abs(size) >= 1e7:
        return f"{size:.1e} {unit}"
    digits = 0 if unit == "B" or abs(size) >= 100 else 1 if abs(size) >= 10 else 2
    return f"{size:.{digits}f} {unit}"


def format_seconds(seconds: float | None) -> str:
    """``8.2 s``, ``3 min 20 s``, ``5 h 12 min``."""
    found = number(seconds)
    if found is None:
        return "–"
    if abs(found) >= LONGEST_TIME_S:
        return f"{found / 3600:.1e} h"
    if found < 59.95:
        return f"{found:.1f} s"
    minutes, rest = divmod(round(found), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def format_clock(seconds: float | None) -> str:
    """``3:20`` or ``5:12:00``: short enough for a progress line."""
    found = number(seconds)
    if found is None:
        return "–:––"
    if abs(found) >= LONGEST_TIME_S:
        return f"{found / 3600:.0e} h"
    minutes, rest = divmod(round(found), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def format_count(value: float | None) -> str:
    """``81,000``: a whole number with its thousands apart."""
    found = number(value)
    return "–" if found is None else f"{found:,.0f}" if abs(found) < 1e12 else f"{found:.1e}"


def counted(count: int | None, what: str) -> str:
    """``1 run``, ``2 runs``: a number of things of which one is called ``what``."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def format_bits(value: float | None) -> str:
    """Bits per weight: ``3.30``."""
    found = number(value)
    return f"{found:.2f}" if found is not None and abs(found) < 1000 else format_number(value)


def format_parameters(count: float | None) -> str:
    """``6.74 B``, ``134.5 M``."""
    found = number(count)
    if found is None or not 0 <= found < 1e15:
        return format_number(count)
    return f"{found / 1e9:.2f} B" if found >= 1e9 else f"{found / 1e6:.1f} M"


def format_time(t: float, form: str = "%H:%M:%S") -> str:
    """A wall clock time here; dashes for one that no calendar has."""
    try:
        return time.strftime(form, time.localtime(t))
    except (OverflowError, OSError, ValueError):
        return "--:--:--"


def format_number(value: float | None, digits: int = 4) -> str:
    """A measured number with as many digits as mean something: ``18.21``, ``1.353e+05``."""
    found = number(value)
    if found is None:
        return "–"
    if found != 0 and (abs(found) >= 10_000 or abs(found) < 0.001):
        return f"{found:.{digits - 1}e}"
    return f"{found:.{digits}g}"


def cell(text: str, most: int = LONGEST_CELL) -> str:
    """A word or a name as one line of at most ``most`` letters."""
    text = str(text)
    shown = printable(text[: most + 1])
    return shown if len(text) <= most else f"{printable(text[: most - 1])}…"


def table(rows: Sequence[Sequence[str]], *, header: Sequence[str] | None = None, right: str = "") -> str:
    """Rows as aligned columns; ``right`` has a letter a column, ``r`` where it is right-aligned."""
    lines = [list(header)] if header else []
    lines += [[cell(one) for one in row] for row in rows]
    if not lines:
        return ""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = []
    for line in lines:
        cells = [
            one.rjust(width) if i < len(right) and right[i] == "r" else one.ljust(width)
            for i, (one, width) in enumerate(zip(line, widths, strict=True))
        ]
        text.append("  ".join(cells).rstrip())
    return "\n".join(text)


def key_values(pairs: Mapping[str, str], *, indent: str = "  ") -> str:
    """``name   value`` lines with the values aligned; a line end inside of a value makes no line."""
    names = [cell(name) for name in pairs]
    width = max(map(len, names), default=0)
    return "\n".join(
        f"{indent}{name.ljust(width)}   {cell(value, LONGEST_LINE)}"
        for name, value in zip(names, pairs.values(), strict=True)
    )


def agrees(question: str) -> bool:
    """Whether whoever sits at the terminal says yes."""
    say(f"{question} [y/N] ", end="")
    try:
        return input().strip().lower() in ("y", "yes")
    except EOFError:  # Ctrl-D
        say("")
        return False


def ring() -> None:
    """The bell of the terminal that this is told to, if there is one."""
    if sys.stderr.isatty():
        print("\a", end="", file=sys.stderr, flush=True)
