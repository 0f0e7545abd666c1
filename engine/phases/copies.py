"""Copies of exports for the user: of one that was verified, without writing and verifying it again.

The event that told of an export keeps the digest of each of its files. An export whose files still have them
is what was verified; one that was changed since, or that was made before there were digests, is made again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import msgspec

from engine.errors import EqatError, ExitCode
from engine.reporter import Reporter
from engine.run import events
from engine.run.directory import RunDirectory
from engine.run.state import load_state
from engine.system.copying import check_target, copy_whole
from engine.system.sums import digests

COPY_SILENCE = 1800
"""Seconds that another disk may take unheard for what was copied to it."""


def targets_of(names: Sequence[str], copy_to: Path | None) -> dict[str, Path]:
    """Where the copy of each format goes: of several formats a folder each."""
    if copy_to is None:
        return {}
    return {name: copy_to / name if len(names) > 1 else copy_to for name in names}


def hear(report: Reporter) -> None:
    """Between two pieces of a copy."""
    report.leave_if_asked()
    report.expect_silence(COPY_SILENCE)


def verified_exports(
    run: RunDirectory, names: Sequence[str], report: Reporter
) -> Mapping[str, events.Export] | None:
    """What was told of the exports of these formats, where the run is done and all of them are still what was
    verified; else none, and a warning of what has changed."""
    state = load_state(run, skip=events.BULK)
    told = state.exports
    if (
        state.outcome != "done"
        or not names
        or not all(name in told and told[name].verified and told[name].files for name in names)
    ):
        return None
    for name in names:
        folder = run.inside(told[name].path)
        try:
            found = digests(folder, run.path, partial(hear, report))
        except EqatError:
            found = {}
        changed = sorted(set(found.items()) ^ set(told[name].files.items()))
        if changed:
            what = f"{changed[0][0]} is not what was verified" if found else "it is not there any more"
            report.warning("export", f"the export {name} is made again: {what}")
            return None
    return {name: told[name] for name in names}


def copy_verified(
    run: RunDirectory, exports: Mapping[str, events.Export], copy_to: Path, report: Reporter
) -> None:
    """Copy ``exports`` to the folder of the user's, and compare what lies there."""
    targets = targets_of(list(exports), copy_to)
    for target in targets.values():
        check_target(target, run.path)
    for name, told in exports.items():
        report.doing = f"copying to {targets[name]}"
        copy_whole(run.inside(told.path), targets[name], run=run.path, poll=partial(hear, report))
        require_same(targets[name], told.files, report)
        report.emit(msgspec.structs.replace(told, copied_to=str(targets[name]), t=0.0, mono=0.0))


def require_same(copy: Path, files: Mapping[str, str], report: Reporter) -> None:
    """EqatError unless a copy holds what was copied."""
    report.doing = "comparing the copy"
    changed = sorted(set(digests(copy, poll=partial(hear, report)).items()) ^ set(files.items()))
    if changed:
        raise EqatError(
            f"the copy differs from the export: {changed[0][0]}",
            exit_code=ExitCode.PREFLIGHT,
            where=str(copy),
            hint="the disk it lies on is at fault; delete the copy and choose another folder",
        )
