"""``eqat rm`` and ``eqat gc``: what they ask and what they say."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.run import housekeeping
from engine.run.directory import RunDirectory
from engine.run.errors import ExitCode, PreflightError, UsageError
from eqat_tui.output import format_bytes, print_json, say


def delete(runs: Sequence[RunDirectory], *, yes: bool) -> int:
    """Delete ``runs``, after asking."""
    runs = _distinct(runs)
    for run in runs:
        housekeeping.refuse_busy(run)
    if not yes and not _agreed(runs):
        say("nothing was deleted")
        return ExitCode.DONE
    for run in runs:
        freed = housekeeping.delete_run(run)
        say(f"deleted {run.id} ({format_bytes(freed)})")
    return ExitCode.DONE


def _agreed(runs: Sequence[RunDirectory]) -> bool:
    total = sum(housekeeping.size_of(run.path) for run in runs)
    what = runs[0].id if len(runs) == 1 else f"{len(runs)} runs"
    if not sys.stdin.isatty():
        raise UsageError(
            f"would delete {what} ({format_bytes(total)}) and there is no terminal to ask on",
            where="eqat rm",
            hint="--yes deletes without asking",
        )
    for run in runs if len(runs) > 1 else ():
        say(f"  {run.id}")
    say(f"Delete {what} ({format_bytes(total)})? [y/N] ", end="")
    try:
        return input().strip().lower() in ("y", "yes")
    except EOFError:  # Ctrl-D
        say("")
        return False


def _distinct(runs: Sequence[RunDirectory]) -> list[RunDirectory]:
    """Each run once, however often it was named."""
    return list({run.path: run for run in runs}.values())


def clean(runs: Sequence[RunDirectory], runs_dir: Path, *, tokens: bool, dry_run: bool, as_json: bool) -> int:
    """Free what can be made again, and say how much that was."""
    rows: list[dict[str, Any]] = []
    for run in _distinct(runs):
        try:
            rows.append(
                {"id": run.id, "freed": housekeeping.clean_run(run, dry_run=dry_run), "skipped": None}
            )
        except PreflightError as error:
            rows.append({"id": run.id, "freed": 0, "skipped": error.message})
    leftovers = housekeeping.clean_leftovers(runs_dir, dry_run=dry_run)
    cached = _clean_tokens(dry_run) if tokens else 0
    total = sum(row["freed"] for row in rows) + leftovers + cached
    if as_json:
        print_json({"runs": rows, "leftovers": leftovers, "tokens": cached, "freed": total})
        return ExitCode.DONE
    for row in rows:
        if row["skipped"]:
            say(f"{row['id']}: left alone, {row['skipped']}")
        elif row["freed"]:
            print(f"{row['id']}: {format_bytes(row['freed'])}")
    if leftovers:
        print(f"deleted runs: {format_bytes(leftovers)}")
    if cached:
        print(f"tokens: {format_bytes(cached)}")
    print(f"{'would free' if dry_run else 'freed'} {format_bytes(total)}")
    return ExitCode.DONE


def _clean_tokens(dry_run: bool) -> int:
    """The tokenized texts outside of runs; they are made again when a run needs them."""
    freed = 0
    for path in token_cache().glob("*.safetensors"):
        freed += housekeeping.size_of(path)
        if not dry_run:
            path.unlink(missing_ok=True)
    return freed


def token_cache() -> Path:
    """Where the engine keeps them (``engine.data.tokens``, which this process must not import)."""
    from platformdirs import user_cache_dir

    root = os.environ.get("EQAT_CACHE_DIR")
    return Path(root).expanduser() / "tokens" if root else Path(user_cache_dir("eqat")) / "tokens"
