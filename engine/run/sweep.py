"""A sweep is a folder beside its runs: ``sweep.json`` says which runs belong to it and what they are made of.

The runs are ordinary ones in the same folder of runs, and know nothing of it. The configuration of each is
kept from the beginning, so that one which is made tomorrow is what was asked for today. The id of a run is
written before the run is made: a kill at any instant leaves no run that the sweep does not know.

One process carries a sweep out at a time; it holds ``lock``. Everybody else reads.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec

from engine.config.loading import from_toml
from engine.config.run import RunConfig
from engine.config.sweeps import Combination
from engine.config.writing import to_toml
from engine.errors import EqatError, PreflightError, UsageError
from engine.run.directory import RunDirectory, make_new, slug, stamp
from engine.run.finding import full
from engine.run.lock import RunLock, holder
from engine.run.members import GONE, UNREADABLE, WAITING, Failure, RunId, state_of
from engine.run.proof import is_run
from engine.run.shown import show_run
from engine.system.files import atomic_write_json, disk_error
from engine.system.guarded import read_struct
from engine.system.ownership import require_own_folders

FILE = "sweep.json"
SCHEMA = 1
"""Of what this version writes down of sweeps and of the queue."""
PREFIX = "sweep-"
"""Begins the name of a sweep's folder."""
LOG = "sweep.log"
"""What a sweep without a terminal has told."""
LARGEST = 64 << 20
"""Bytes of the file."""


class Member(msgspec.Struct, kw_only=True):
    """One run of a sweep."""

    settings: dict[str, Any]
    """The value of each swept field."""
    config: str
    """The whole configuration, as TOML."""
    run: RunId | None = None
    """The id of the run, written before the run is made."""
    error: Failure | None = None
    share: str = ""
    """What of the machine it was given, where several are made at a time; a label."""

    def configuration(self) -> RunConfig:
        """What the run is made with."""
        return from_toml(self.config, earlier=True)

    @property
    def unmade(self) -> str:
        """What has become of it, where there is no run."""
        return "failed" if self.error is not None else GONE if self.run is not None else WAITING


class _File(msgspec.Struct, kw_only=True):
    schema: int = SCHEMA
    target: str
    """The preset or the file that it was made from; a label."""
    made: float
    """Seconds since 1970."""
    members: list[Member]


class Sweep:
    """A sweep's folder. Construct with :meth:`create` or :meth:`open`."""

    def __init__(self, path: Path, file: _File) -> None:
        self.path = path
        self.id = path.name
        self.runs_dir = path.parent
        self.lock_path = path / "lock"
        self._file = file

    @property
    def members(self) -> list[Member]:
        """Its runs, in the order in which they are made."""
        return self._file.members

    @classmethod
    def create(cls, runs_dir: Path, target: str, combinations: Sequence[Combination]) -> Sweep:
        """Make the folder of a new sweep, none of whose runs is made yet."""
        found = [Member(settings=one.settings, config=to_toml(one.config)) for one in combinations]
        try:
            path = make_new(runs_dir, f"{PREFIX}{stamp()}-{slug(target.removesuffix('.toml'))}")
        except OSError as error:
            raise disk_error(error, runs_dir) from error
        sweep = cls(path, _File(target=target, made=time.time(), members=found))
        try:
            sweep.write()
        except EqatError:
            with suppress(OSError):
                path.rmdir()
            raise
        return sweep

    @classmethod
    def open(cls, path: Path) -> Sweep:
        """The sweep at ``path``; :class:`UsageError` where there is none."""
        if not is_sweep(path):
            raise UsageError(
                "is not the folder of a sweep",
                where=str(path),
                hint=f"it has no {FILE}; eqat sweep makes one",
            )
        place = path.resolve()
        return cls(place, _read(place))

    def write(self) -> None:
        """Write down what is known of its runs."""
        atomic_write_json(self.path / FILE, self._file, root=self.path)

    def reread(self) -> None:
        """Take in what another process has written since."""
        self._file = _read(self.path)

    def run_of(self, member: Member) -> RunDirectory | None:
        """The run of a member; none where it is not made, or not there any more."""
        path = self.runs_dir / member.run if member.run is not None else None
        return RunDirectory(path.resolve()) if path is not None and is_run(path) else None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Carry the sweep out, alone, with what is written down of it read anew.

        Raises:
            PreflightError: where another process does, or the folder is not this user's.
        """
        require_own_folders(self.path, ())
        self._refuse_second()
        lock = RunLock(self.lock_path)
        try:
            lock.acquire()
        except PreflightError:
            self._refuse_second()
            raise
        try:
            self.reread()
            yield
        finally:
            lock.release()

    def _refuse_second(self) -> None:
        if (pid := holder(self.lock_path)) is not None:
            raise PreflightError(
                f"is being carried out by {f'process {pid}' if pid else 'another process'} already",
                where=self.id,
                hint=f"eqat sweep show {shlex.quote(str(self.path))} shows how far it is",
            )

    @property
    def at_work(self) -> bool:
        """Whether a process carries it out now."""
        return holder(self.lock_path) is not None


def _read(place: Path) -> _File:
    found = read_struct(place / FILE, _File, LARGEST, root=place)
    refuse_later(found.schema, place / FILE)
    return found


def refuse_later(schema: int, path: Path) -> None:
    """Raise :class:`PreflightError` for what a later version has written, of which this one would write down
    again only what it knows."""
    if schema > SCHEMA:
        raise PreflightError(
            f"was written by a later version of eqat (schema {schema}, and this one reads {SCHEMA})",
            where=str(path),
            hint="use that version",
        )


def is_sweep(path: Path) -> bool:
    """Whether ``path`` looks like the folder of a sweep."""
    return os.path.lexists(path / FILE)


def list_sweeps(runs_dir: Path) -> list[Path]:
    """The folders of sweeps in ``runs_dir``, newest first."""
    try:
        found = [path for path in runs_dir.iterdir() if path.name.startswith(PREFIX) and is_sweep(path)]
        return sorted(found, key=lambda path: (path.name[: len(PREFIX) + 13], _made(path)), reverse=True)
    except OSError:
        return []


def _made(path: Path) -> float:
    """Sorts sweeps of one minute."""
    try:
        return read_struct(path / FILE, _File, LARGEST, root=path).made
    except EqatError:
        return 0.0


def find_sweep(runs_dir: Path, ref: str) -> Sweep:
    """The sweep that ``ref`` means: a path, ``latest``, or what only one has in its name."""
    if not ref:
        raise UsageError("names no sweep", where="sweep", hint="latest, a name, or a folder")
    place = Path(os.path.expanduser(ref))
    if "/" in ref or ref in (".", "..") or is_sweep(place):
        return Sweep.open(place)
    sweeps = list_sweeps(runs_dir)
    if ref == "latest":
        found = sweeps[:1]
    else:
        exact = [path for path in sweeps if path.name == ref]
        found = exact or [path for path in sweeps if ref.lower() in path.name.lower()]
    if len(found) > 1:
        names = ", ".join(path.name for path in found[:12])
        raise UsageError(f"{ref!r} means {len(found)} sweeps", where="sweep", hint=names)
    if not found:
        known = ", ".join(path.name for path in sweeps[:12])
        hint = f"there are {known}" if known else "eqat sweep PRESET --sweep grid.bits=2,3,4 makes one"
        raise UsageError(f"there is no sweep {ref!r} in {full(runs_dir)}", where="sweep", hint=hint)
    return Sweep.open(found[0])


# -- what has become of it -----------------------------------------------------------------------------


def show_sweep(sweep: Sweep) -> dict[str, Any]:
    """What ``eqat sweep show --json`` prints: a row a run, whether it is made, at work or over."""
    rows = [_row(sweep, number, member) for number, member in enumerate(sweep.members, 1)]
    return {
        **_head(sweep),
        "done": sum(row["outcome"] == "done" for row in rows),
        "runs": rows,
    }


def summarize_sweep(sweep: Sweep) -> dict[str, Any]:
    """One row of ``eqat sweep list --json``: what is swept, and how many of its runs are in each state."""
    states: dict[str, int] = {}
    for member in sweep.members:
        run = sweep.run_of(member)
        state = state_of(run) if run is not None else member.unmade
        states[state] = states.get(state, 0) + 1
    return {**_head(sweep), "runs": len(sweep.members), "done": states.get("done", 0), "states": states}


def _head(sweep: Sweep) -> dict[str, Any]:
    return {
        "id": sweep.id,
        "path": str(sweep.path),
        "target": sweep._file.target,
        "made": sweep._file.made,
        "at_work": sweep.at_work,
        "swept": list(sweep.members[0].settings) if sweep.members else [],
    }


def _row(sweep: Sweep, number: int, member: Member) -> dict[str, Any]:
    failure = msgspec.to_builtins(member.error) if member.error is not None else None
    row: dict[str, Any] = {
        "number": number,
        "settings": member.settings,
        "id": None,
        "outcome": member.unmade,
        "perplexity": {},
        "accuracy": {},
        "bits_per_weight": None,
        "size_bytes": {"fp": None, "quantized": None},
        "seconds": None,
        "peak_gpu_bytes": None,
        "peak_host_bytes": None,
        "batch": None,
        "node": None,
        "waiting": None,
        "error": failure,
    }
    run = sweep.run_of(member)
    if run is None:
        return row
    row["id"] = run.id
    try:
        shown = show_run(run)
    except EqatError as error:
        told = {"message": error.message, "where": error.where, "hint": error.hint}
        return {**row, "outcome": UNREADABLE, "error": {**told, "exit_code": int(error.exit_code)}}
    kept = ("perplexity", "accuracy", "bits_per_weight", "size_bytes", "seconds", "batch", "node", "waiting")
    return {
        **row,
        **{name: shown[name] for name in kept},
        **{name: _peak(shown["phases"], name) for name in ("peak_gpu_bytes", "peak_host_bytes")},
        "outcome": shown["state"],
        "error": None if shown["state"] == "done" else _error(shown) or failure,
    }


def _peak(phases: list[dict[str, Any]], name: str) -> int | None:
    """The most memory that any phase took."""
    return max((phase[name] for phase in phases if phase[name] is not None), default=None)


def _error(shown: dict[str, Any]) -> dict[str, Any] | None:
    """Why a run is not done, where that is known."""
    error = shown["error"]
    if error is not None:
        return {name: error[name] for name in ("message", "where", "hint", "exit_code")}
    if shown["why_gone"]:
        return {"message": shown["why_gone"], "where": "", "hint": "", "exit_code": None}
    return None
