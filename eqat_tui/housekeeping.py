"""``eqat rm`` and ``eqat gc``: what they ask and what they say."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.errors import EqatError, ExitCode, PreflightError, UsageError
from engine.run import contents, housekeeping
from engine.run.directory import RunDirectory
from engine.run.events import BULK
from engine.run.finding import default_runs_dir, find_run
from engine.run.liveness import run_state
from engine.run.proof import shown
from engine.run.state import load_state
from engine.system.user_cache import token_cache
from eqat_tui.measured import newest
from eqat_tui.output import agrees, counted, format_bytes, format_number, print_error, print_json, say, show

# -- deleting ------------------------------------------------------------------------------------------


def delete(refs: Sequence[str], runs_dir: Path | None, *, yes: bool) -> int:
    """Delete the runs that ``refs`` name, after asking; all of them or, where one may not be, none."""
    runs, refused = _deletable(refs, default_runs_dir(runs_dir))
    if len(refused) == 1 and not runs:
        raise refused[0]
    if refused:
        for error in refused:
            print_error(error, as_json=False)
        say("nothing was deleted")
        return int(refused[0].exit_code)
    if not yes and not _agreed(runs):
        say("nothing was deleted")
        return ExitCode.DONE
    for run in runs:
        freed = housekeeping.delete_run(run)
        say(f"deleted {run.id} ({format_bytes(freed)})")
    return ExitCode.DONE


def _deletable(refs: Sequence[str], place: Path) -> tuple[list[RunDirectory], list[EqatError]]:
    """The runs to delete, each once however often it was named, and why others may not be."""
    runs: list[RunDirectory] = []
    refused: list[EqatError] = []
    for ref in refs:
        try:
            if ref.rstrip("/").rpartition("/")[2] in (".", ".."):
                raise UsageError(
                    "a run is deleted by its name, not by the place one is in",
                    where=ref,
                    hint="eqat runs lists the names",
                )
            run = find_run(place, ref)
            housekeeping.require_deletable(run)
            runs.append(run)
        except EqatError as error:
            refused.append(error)
    return list({run.path: run for run in runs}.values()), refused


def _agreed(runs: Sequence[RunDirectory]) -> bool:
    sizes = [housekeeping.size_of(run.path) for run in runs]
    described = [(str(run.path), what_is_in(run, size)) for run, size in zip(runs, sizes, strict=True)]
    what = "it" if len(runs) == 1 else f"these {len(runs)} runs"
    if not sys.stdin.isatty():
        raise UsageError(
            f"would delete {'; '.join(f'{path} ({words})' for path, words in described)}, and there is no "
            "terminal to ask on",
            where="eqat rm",
            hint="--yes deletes without asking",
        )
    for path, words in described:
        say(path)
        say(f"  {words}")
    return agrees(f"Delete {what} with everything inside ({format_bytes(sum(sizes))})?")


def what_is_in(run: RunDirectory, size: int) -> str:
    """What deleting a run would take: ``done, perplexity 21.7, export gptq_v2, 512 MiB``."""
    words: list[str] = []
    try:
        words.append(run_state(run))
        words += _achieved(run)
    except (EqatError, OSError):
        words.append("its log cannot be read")
    there = [name for name in housekeeping.exports(run) if not name.endswith(contents.LEFTOVERS)]
    if there:
        words.append(f"export{'s' if len(there) > 1 else ''} {shown(there)}")
    return ", ".join([*words, format_bytes(size)])


def _achieved(run: RunDirectory) -> list[str]:
    """The perplexity that was reached, else how many blocks are finished."""
    state = load_state(run, skip=BULK | {"block.started"})
    measured = state.perplexity()
    best = newest(measured)
    if best is not None:
        return [f"perplexity {format_number(best)}"]
    finished = sum(row.finished for row in state.trained_blocks())
    blocks = (state.plan or {}).get("blocks")
    if not finished:
        return ["no block finished"]
    every = f"{finished} of {counted(blocks, 'block')}" if isinstance(blocks, int) else ""
    return [f"{every or counted(finished, 'block')} finished"]


# -- freeing -------------------------------------------------------------------------------------------


def clean(runs: Sequence[RunDirectory], runs_dir: Path, *, tokens: bool, dry_run: bool, as_json: bool) -> int:
    """Free what can be made again, and say how much that was and what was left alone."""
    rows = [_cleaned(run, dry_run) for run in {run.path: run for run in runs}.values()]
    swept = housekeeping.clean_leftovers(runs_dir, dry_run=dry_run)
    cached = housekeeping.clean_tokens(token_cache(), dry_run=dry_run) if tokens else 0
    total = sum(row["freed"] for row in rows) + swept.freed + cached
    for error in swept.left_alone:
        say(f"left alone: {error}")
    for row in rows:
        if row["skipped"]:
            say(f"{row['id']}: left alone, {row['skipped']}")
        if row["foreign"]:
            say(f"{row['id']}: left alone in cache, since no run makes it: {shown(row['foreign'])}")
    if as_json:
        left = [{"path": error.where, "why": error.message} for error in swept.left_alone]
        print_json(
            {"runs": rows, "leftovers": swept.freed, "left_alone": left, "tokens": cached, "freed": total}
        )
        return ExitCode.DONE
    for row in rows:
        if row["freed"]:
            show(f"{row['id']}: {format_bytes(row['freed'])}")
    if swept.freed:
        show(f"deleted runs: {format_bytes(swept.freed)}")
    if cached:
        show(f"tokens: {format_bytes(cached)}")
    show(f"{'would free' if dry_run else 'freed'} {format_bytes(total)}")
    return ExitCode.DONE


def _cleaned(run: RunDirectory, dry_run: bool) -> dict[str, Any]:
    """A row of ``eqat gc --json``."""
    row: dict[str, Any] = {"id": run.id, "freed": 0, "skipped": None, "foreign": []}
    try:
        row["freed"] = housekeeping.clean_run(run, dry_run=dry_run)
        row["foreign"] = housekeeping.foreign_in_cache(run)
    except PreflightError as error:
        row["skipped"] = error.message if error.where == run.id else str(error)
    return row
