"""``eqat verify`` and ``eqat import``: a quantized checkpoint is looked at by a process that may load torch,
and told of here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from engine.config.formats import FORMATS
from engine.errors import EqatError, ExitCode, UsageError
from engine.run import events
from engine.run.directory import RunDirectory
from engine.run.finding import default_runs_dir, find_run, typed
from engine.run.launch import python_environment
from engine.run.proof import is_run
from engine.run.state import load_state
from engine.system.sums import digests
from eqat_tui.output import cell, counted, format_bytes, say, table

WORST = 5
"""Linears whose error is told one by one."""
MOST_LINES = 20
"""Problems that a person is told; the JSON has more of them."""


def checkpoints_of(ref: str, runs_dir: Path | None) -> list[Path]:
    """What is meant by a path, or by the name of a run: all that the run has exported.

    Raises:
        EqatError: for a name that is neither, and for a run without an export.
    """
    path = Path(os.path.expanduser(ref))
    is_path = os.path.lexists(path) or os.sep in ref
    if is_path and not is_run(path):
        return [path]
    run = RunDirectory(path) if is_path else find_run(default_runs_dir(runs_dir), ref)
    exports = [run.export_dir / name for name in FORMATS.names()]
    found = [folder for folder in exports if folder.is_dir()]
    if not found:
        raise UsageError("it has no export yet", where=run.id, hint=f"eqat export {typed(run)} writes one")
    return found


def judged(path: Path, reference: str | None, heard: Callable[[int, int], None]) -> dict[str, Any]:
    """What ``engine.export.judging`` says of the checkpoint in ``path``; ``heard`` is told how far it is.

    An integer that is another one is as good as the one before. So of an export that lies in its run, every
    file is compared with what was verified when it was written: ``as_written`` is whether all are the same,
    and none where nothing is known of that.

    Raises:
        EqatError: for what is no checkpoint that can be looked at.
    """
    return _compared(said_by("engine.export.judging", "sound", path, reference, heard), path)


def _compared(found: dict[str, Any], path: Path) -> dict[str, Any]:
    """The same with what became of the files of an export."""
    changed = changed_files(path)
    found["as_written"] = None if changed is None else not changed
    if changed:
        found["problems"] += changed
        found["sound"] = False
    return found


def all_judged(
    paths: list[Path], reference: str | None, heard: Callable[[int, int], None]
) -> Iterator[dict[str, Any]]:
    """The same of each; of several, one that cannot be read keeps nobody from looking at the others.

    Raises:
        EqatError: where the only one cannot be looked at, or none of them for what was asked.
    """
    for path in paths:
        try:
            yield judged(path, reference, heard)
        except EqatError as error:
            if len(paths) == 1 or error.exit_code != ExitCode.DATA:
                raise
            yield unread(path, error)


def unread(path: Path, error: EqatError) -> dict[str, Any]:
    """What is said of an export whose files cannot be read, which is what ``error`` says."""
    found: dict[str, Any] = {
        "path": str(path),
        "format": path.name,
        "label": FORMATS[path.name].label,
        "model_type": "",
        **dict.fromkeys(("blocks", "linears", "tensors", "more_problems"), 0),
        "bytes": sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
        "grids": {},
        "problems": [str(error)],
        "notes": [],
        "reference": None,
        "errors": {},
        "sound": False,
    }
    return _compared(found, path)


CARD = "README.md"
"""What anybody may go on writing."""


def changed_files(path: Path) -> list[str] | None:
    """Files of an export that are not what its run verified, each in a sentence; none where ``path`` is no
    export in a run, or one of a version that noted nothing of its files."""
    folder = Path(os.path.abspath(path if path.is_dir() else path.parent))
    run = RunDirectory(folder.parent.parent)
    if folder.parent != run.export_dir or not is_run(run.path):
        return None
    try:
        told = load_state(run, skip=events.BULK).exports.get(folder.name)
    except EqatError:  # of a log that nobody can read
        return None
    if told is None or not told.files:
        return None
    found = digests(folder)
    return [
        f"{name}: {'is not what was verified' if name in found else 'is not there any more'}"
        for name, digest in sorted(told.files.items())
        if found.get(name) != digest and name != CARD
    ]


def importable(path: Path, reference: str | None, heard: Callable[[int, int], None]) -> dict[str, Any]:
    """What ``engine.export.importing`` says of it.

    Raises:
        EqatError: for what cannot be imported.
    """
    return said_by("engine.export.importing", "importable", path, reference, heard)


def said_by(
    module: str, answer: str, path: Path, reference: str | None, heard: Callable[[int, int], None]
) -> dict[str, Any]:
    """What a module that looks at checkpoints says of the one in ``path``: its last line, which has the field
    ``answer``.

    Raises:
        EqatError: what it refuses, in its words.
    """
    more = [] if reference is None else [f"--reference={reference}"]
    last: dict[str, Any] = {}
    with subprocess.Popen(
        [sys.executable, "-P", "-m", module, *more, "--", str(path)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=python_environment(),
        text=True,
        errors="replace",
    ) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        for line in child.stdout:
            last = _object(line) or last
            if "done" in last:
                heard(int(last["done"]), int(last["of"]))
        words = child.stderr.read().strip().splitlines()
    if "error" in last:
        said = last["error"]
        raise EqatError(
            said["message"], exit_code=ExitCode(said["exit_code"]), where=said["where"], hint=said["hint"]
        )
    if answer not in last:
        why = words[-1][:200] if words else f"its process ended with {child.returncode}"
        raise EqatError(f"cannot be judged: {why}", exit_code=ExitCode.BUG, where=str(path))
    return last


def told(moving: bool) -> Callable[[int, int], None]:
    """Says on the terminal how many blocks were looked at, where lines may be written over."""
    return lambda done, of: say(f"\r  block {done + 1} of {of}", end="") if moving else None


def _object(line: str) -> dict[str, Any]:
    """What the line says; nothing for one that a library printed."""
    try:
        tree = json.loads(line)
    except ValueError:
        return {}
    return tree if isinstance(tree, dict) else {}


def judgement_text(found: Mapping[str, Any]) -> str:
    """For a person."""
    several = len(found["grids"]) > 1
    grids = ", ".join(f"{count} of {name}" if several else name for name, count in found["grids"].items())
    grids = f" ({grids})" if grids else ""
    model = f"{cell(found['model_type'])} with {counted(found['blocks'], 'block')}"
    model = model if found["blocks"] else "no model can be made of it"
    lines = [
        f"{cell(found['path'], 200)}: {found['label']}, {model}",
        f"  {found['linears']} quantized linears{grids}, {found['tensors']} tensors, "
        f"{format_bytes(found['bytes'])}",
    ]
    errors = {name: _or_infinite(error) for name, error in found["errors"].items()}
    if errors:
        lines.append(
            f"  relative error of a linear against {cell(found['reference'], 200)}: median "
            f"{median(errors.values()):.4f}, largest {max(errors.values()):.4f}"
        )
        worst = sorted(errors.items(), key=lambda item: -item[1])[:WORST]
        lines += [
            "    " + line for line in table([(name, f"{error:.4f}") for name, error in worst]).splitlines()
        ]
    lines += [f"  note: {cell(note, 300)}" for note in found["notes"]]
    problems = found["problems"]
    if not problems:
        beside = ", and every file is what was verified" if found.get("as_written") else ""
        lines.append(f"  sound: every tensor is there, fits the others and is finite{beside}")
        return "\n".join(lines)
    count = len(problems) + found["more_problems"]
    lines.append(f"  {count} problem{'s' if count > 1 else ''}:")
    lines += [f"    {cell(problem, 300)}" for problem in problems[:MOST_LINES]]
    if count > MOST_LINES:
        lines.append(f"    and {count - min(len(problems), MOST_LINES)} more")
    return "\n".join(lines)


def _or_infinite(error: float | None) -> float:
    """JSON has no infinity."""
    return float("inf") if error is None else error
