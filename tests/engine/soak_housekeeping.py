"""``gc`` and ``rm`` that are killed, and ``gc`` beside a run that trains: nothing of value is lost."""

from __future__ import annotations

import itertools
import random
import shutil
import signal
from pathlib import Path

from engine_runs import exported, make_run, of, output, start
from soak_runs import SETTINGS, Whole, finish
from soak_tools import Row, contents, eqat

from engine.run import events
from engine.run.directory import RunDirectory
from engine.run.finding import list_runs

COMMITS = 6
"""Checkpoints after which the run that is cleaned is killed: old generations and a cache are there."""


def soak_gc(folder: Path, whole: Whole, kills: int, seed: int) -> Row:
    """``eqat gc`` on a run that was killed, itself killed before one of its deletions; then again; then the
    run is resumed to its end."""
    row = Row("gc, killed, then resumed")
    if not kills:
        return row
    chance = random.Random(f"gc {seed}")
    crashed = _crashed(folder / "template")
    for number in itertools.count():
        runs = folder / f"gc-{number}"
        run = RunDirectory(Path(shutil.copytree(crashed.path, runs / crashed.id, symlinks=True)))
        code = eqat("gc", "--runs-dir", str(runs), die_at=chance.randint(1, 7))
        row.tries += 1
        row.struck += code == -signal.SIGKILL
        row.check(eqat("gc", "--runs-dir", str(runs)) == 0, f"try {row.tries}: gc does not end well")
        finish(run)
        row.check(exported(run) == whole.export, f"try {row.tries}: another export")
        shutil.rmtree(runs)
        if row.struck >= kills or row.tries >= 4 * kills:
            return row
    raise AssertionError("unreachable")


def _crashed(folder: Path) -> RunDirectory:
    run = make_run(folder, {**SETTINGS, "runtime.streams": "stored"})
    child = start(run)
    child.until(lambda: len(of(run, events.CheckpointCommitted)) >= COMMITS)
    child.kill()
    child.code()
    # What kills inside a write leave behind.
    objects = run.checkpoints_dir / "objects"
    for name in ("a" * 64, "b" * 64, "c" * 64):
        (objects / f".{name}.safetensors.1.0000abcd.tmp").write_bytes(bytes(1000))
    (run.path / ".status.json.1.0000abcd.tmp").write_bytes(b"{")
    (run.checkpoints_dir / ".CURRENT.1.0000abcd.tmp").write_bytes(b"1")
    (run.export_dir / "gptq_v2.partial").mkdir(exist_ok=True)
    (run.export_dir / "gptq_v2.partial" / "model-00001.safetensors.writing").write_bytes(bytes(1000))
    return run


def soak_gc_beside(folder: Path, whole: Whole, runs: int) -> Row:
    """``eqat gc`` over and over while a run trains; a deletion that was cut off lies beside it."""
    row = Row("gc beside a run that trains")
    for _ in range(runs):
        run = make_run(folder, SETTINGS)
        hidden = folder / f".removed-{whole.run.id}-0000abcd"
        shutil.copytree(whole.run.path, hidden)
        child = start(run)
        while child.alive():
            row.struck += 1
            row.check(eqat("gc", "--runs-dir", str(folder)) == 0, f"{run.id}: gc does not end well")
        row.tries += 1
        row.check(child.code() == 0, f"{run.id}: the run ended with {child.code()}; {output(run)[-300:]}")
        row.check(exported(run) == whole.export, f"{run.id}: another export")
        row.check(not hidden.exists(), f"{run.id}: gc did not finish a deletion")
    row.note = "struck: times that gc ran"
    return row


def soak_rm(folder: Path, whole: Whole, kills: int, seed: int) -> Row:
    """``eqat rm`` killed before one of its deletions: the run is whole, or ``eqat gc`` finishes the deletion;
    what lies beside it stays."""
    row = Row("rm, killed, finished by gc")
    chance = random.Random(f"rm {seed}")
    place = folder / "rm"
    while row.struck < kills and row.tries < 4 * kills:
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(whole.run.path, place / "neighbour")
        assert eqat("gc", "--runs-dir", str(place)) == 0  # so that gc finds nothing in it afterwards
        (place / "notes").mkdir()
        (place / "notes" / "plan.txt").write_text("mine")
        (place / ".hidden").write_text("mine too")
        beside = contents(place)
        run = RunDirectory(Path(shutil.copytree(whole.run.path, place / whole.run.id)))
        inside = contents(run.path)
        code = eqat("rm", "--yes", run.id, "--runs-dir", str(place), die_at=chance.randint(1, 40))
        row.tries += 1
        row.struck += code == -signal.SIGKILL
        where = f"try {row.tries}"
        listed = [found.id for found in list_runs(place)]
        if run.path.exists():
            row.check(
                contents(run.path) == inside, f"{where}: a part of the run is gone, and it has its name"
            )
            row.check(eqat("rm", "--yes", run.id, "--runs-dir", str(place)) == 0, f"{where}: rm fails")
        else:
            row.check(listed == ["neighbour"], f"{where}: there are {listed}")
        row.check(eqat("gc", "--runs-dir", str(place)) == 0, f"{where}: gc fails")
        left = [path.name for path in place.iterdir() if path.name not in ("neighbour", "notes", ".hidden")]
        row.check(not left, f"{where}: {left} is left")
        row.check(contents(place) == beside, f"{where}: what lies beside has changed")
    shutil.rmtree(place, ignore_errors=True)
    return row
