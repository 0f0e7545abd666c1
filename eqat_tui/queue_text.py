"""The queue as a table, from the dictionary that ``--json`` prints."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.errors import EqatError
from engine.run.finding import typed_path
from engine.run.queue import Queue
from eqat_tui.output import cell, one_line, table
from eqat_tui.run_text import DISK_FULL, ago
from eqat_tui.words import model_name

Tree = Mapping[str, Any]


def queue_text(shown: Tree) -> str:
    """What becomes of it, the table, and what is to be said of single entries."""
    rows = shown["entries"]
    parts = [head(shown)]
    if rows:
        cells = [_cells(row, time.time()) for row in rows]
        header = ["#", "state", "model", "grid", "preset", "added", "run"]
        parts.append(table(cells, header=header, right="r"))
    notes = [note for row in rows if (note := note_of(row))]
    return "\n\n".join([*parts, *(["\n".join(notes)] if notes else [])])


def head(shown: Tree) -> str:
    """How far it is, and who works on it."""
    rows = shown["entries"]
    over = sum(row["turn"] == "over" for row in rows)
    words = (
        f"queue of {cell(shown['machine'])} · {over} of {len(rows)} over" if rows else "the queue is empty"
    )
    return f"{words}{state_words(shown)}"


def state_words(shown: Tree) -> str:
    """That it is paused, or that nobody works on it though something waits, and what to do."""
    left = any(row["turn"] != "over" for row in shown["entries"])
    now = any(row["turn"] == "now" for row in shown["entries"])
    if shown["paused"]:
        return " · paused" + (", after the run at work" if now else "") + ": eqat queue resume goes on"
    if shown["worker"] is not None:
        return f" · at work (process {shown['worker']})" if shown["worker"] else " · at work"
    return " · nobody works on it: eqat queue resume goes on" if left else ""


def left_alone() -> str:
    """That runs wait in the queue and nobody works on it, as after a restart; empty where that is not so."""
    try:
        queue = Queue()
        if queue.paused or queue.worker is not None or not queue.has_work:
            return ""
    except EqatError:  # which the commands of the queue tell
        return ""
    return "runs wait in the queue, and nobody works on it: eqat queue resume goes on"


def note_of(row: Tree) -> str:
    """What an entry that did not end well needs said: why, and how it goes on."""
    error, number = row["error"], row["number"]
    if row["turn"] == "waiting" and row["state"] == "crashed":
        return f"{number}: was cut off, and goes on when the queue does"
    if row["turn"] != "over" or row["state"] == "done":
        return ""
    again = f"eqat queue resume {number} gives it another turn"
    if row["state"] in ("stopped", "aborted"):
        return f"{number}: was {row['state']} and stays so; {again}"
    if not error:
        return f"{number}: {row['state']}; {again}"
    where = f"{error['where']}: " if error["where"] else ""
    hint = f" ({error['hint']})" if error["hint"] else ""
    return one_line(f"{number}: {where}{error['message']}{hint}")


def _cells(row: Tree, now: float) -> list[str]:
    group = "channel" if row["group_size"] == -1 else f"g{row['group_size']}"
    return [
        str(row["number"]),
        DISK_FULL if (row["summary"] or {}).get("waiting") else cell(row["state"]),
        cell(model_name(row["model"]), 40),
        f"w{row['bits']}{group}",
        cell(row["name"], 40),
        ago(row["added"], now),
        cell(typed_path(Path(row["path"])) if row["path"] else "–"),
    ]
