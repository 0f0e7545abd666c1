"""Words and numbers on a terminal: data goes to stdout, narration and errors to stderr.

Tables are laid out here rather than by rich: a table in a pipe must not be cut to 80 columns, and a listing
should not pay for importing a renderer.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from engine.run.errors import EqatError


def say(text: str, end: str = "\n") -> None:
    """Narration: for the person watching, never part of the data."""
    print(text, end=end, file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    """One JSON document on stdout; a NaN is a bug, since JSON has none."""
    print(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def print_error(error: EqatError, *, as_json: bool) -> None:
    """The failure in one line on stderr, and for ``--json`` as an object on stdout too."""
    line = " ".join(str(error).split())
    say(f"error: {line}")
    if as_json:
        print_json({"error": error_fields(error)})


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


def format_bytes(count: float | None) -> str:
    """``1.23 GiB``: binary units, as configurations and GPU drivers count."""
    if count is None:
        return "–"
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if abs(size) < 1000:
            break
        size, unit = size / 1024, larger
    digits = 0 if unit == "B" or abs(size) >= 100 else 1 if abs(size) >= 10 else 2
    return f"{size:.{digits}f} {unit}"


def format_seconds(seconds: float | None) -> str:
    """``8.2 s``, ``3 min 20 s``, ``5 h 12 min``."""
    if seconds is None:
        return "–"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def format_clock(seconds: float | None) -> str:
    """``3:20`` or ``5:12:00``: short enough for a progress line."""
    if seconds is None:
        return "–:––"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def format_number(value: float | None, digits: int = 4) -> str:
    """A measured number with as many digits as mean something: ``18.21``, ``1.353e+05``."""
    if value is None:
        return "–"
    if value != 0 and (abs(value) >= 10_000 or abs(value) < 0.001):
        return f"{value:.{digits - 1}e}"
    return f"{value:.{digits}g}"


def table(rows: Sequence[Sequence[str]], *, header: Sequence[str] | None = None, right: str = "") -> str:
    """Rows as aligned columns; ``right`` has a letter a column, ``r`` where it is right-aligned."""
    lines = ([list(header)] if header else []) + [list(row) for row in rows]
    if not lines:
        return ""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = []
    for line in lines:
        cells = [
            cell.rjust(width) if i < len(right) and right[i] == "r" else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        text.append("  ".join(cells).rstrip())
    return "\n".join(text)


def key_values(pairs: Mapping[str, str], *, indent: str = "  ") -> str:
    """``name   value`` lines with the values aligned."""
    width = max((len(name) for name in pairs), default=0)
    return "\n".join(f"{indent}{name.ljust(width)}   {value}" for name, value in pairs.items())
