"""What the parts of a run are called when they are shown to a person."""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

from engine.errors import EqatError
from eqat_tui.output import format_clock

OVER = 0.1
"""A phase that has taken longer than planned is worth a word from this part of what is left on."""


def model_name(source: Any) -> str:
    """The last part of a model's source, as people say it."""
    name = source.rstrip("/").rsplit("/", 1)[-1] if isinstance(source, str) else ""
    return name.removesuffix(".gguf") or "?"


def block_place(block: int, blocks: int) -> str:
    """``3 of 0–5``: a block among those there are.

    Blocks are counted from 0, as in the names of their tensors and as ``--from-block`` takes them.
    """
    return f"{block} of 0–{blocks - 1}" if blocks > 1 else f"{block}"


def time_left(eta_s: float | None, over_s: float | None, *, measured: bool = True) -> str:
    """``1:23 left``, and what that goes by where nothing is measured. A phase that outlasts its plan says so
    and counts up."""
    if over_s is not None and over_s >= max(1.0, OVER * (eta_s or 0.0)):
        rest = f", then about {format_clock(eta_s)}" if eta_s is not None and eta_s >= 1 else ""
        return f"{format_clock(over_s)} longer than planned{rest}"
    if eta_s is None:
        return ""
    return f"{format_clock(eta_s)} left" if measured else f"about {format_clock(eta_s)} left by the plan"


def within_run(where: str, run: str) -> str:
    """A file of the run whose folder is ``run``, by its place in there; anything else as it is.

    The folder is known by its name: a run may have been moved since, or be on another machine.
    """
    _, found, inside = where.partition(f"/{PurePath(run).name}/")
    return inside if found and inside and where.startswith("/") else where


def hint_for_app(hint: str) -> str:
    """A hint in brackets; one that speaks of flags and commands is of no use where there are keys."""
    return f" ({hint})" if hint and "--" not in hint and not hint.startswith("eqat ") else ""


def error_for_app(error: EqatError) -> str:
    """Where, what, and what to do about it there."""
    where = f"{error.where}: " if error.where else ""
    return f"{where}{error.message}{hint_for_app(error.hint)}"
