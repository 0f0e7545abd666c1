"""Checkpoints: finished work, published atomically, verified when read.

The layout is :mod:`engine.run.generations`'. A generation is published in three steps, each durable before
the next: objects, generation file, CURRENT. A kill between any two of them leaves the previous generation in
force. Generations share objects, so committing a finished block writes that block and nothing else. Two
generations are kept; an object lives as long as one of them names it.

Reading fails closed: an object whose bytes do not hash to its name makes its generation unusable, the one
before is taken instead (and the caller is told), and a generation made by another model, data set or
configuration is refused with the field that differs. Nothing is ever searched for or guessed. What is damaged
is written anew when its content comes up again.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load as load_safetensors
from torch import Tensor

from engine.run.errors import EqatError, ExitCode, IdentityError
from engine.run.files import atomic_write, disk_error
from engine.run.generations import (
    SCHEMA,
    DamagedCheckpoint,
    Generation,
    candidates,
    generation_path,
    highest,
    object_path,
    objects_path,
    prune,
    read_generation,
)
from engine.tensorfile import safetensors_chunks


@dataclass(frozen=True)
class Committed:
    """What one commit cost."""

    generation: int
    bytes: int
    seconds: float


class CheckpointStore:
    """Entries (named dictionaries of tensors) and facts (small JSON values) of one run.

    ``identity`` is what the checkpoint depends on, by field (``model``, ``data``, ``block_ap.epochs``, ...).
    """

    def __init__(
        self,
        directory: Path,
        identity: Mapping[str, str],
        *,
        on_damage: Callable[[str], None] = lambda message: None,
    ) -> None:
        self.directory = directory
        self.objects = objects_path(directory)
        self.identity = dict(identity)
        try:
            self.objects.mkdir(mode=0o755, parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(error, self.objects) from error
        self._current = self._open(on_damage)
        self._pending_bytes = 0
        self._pending_seconds = 0.0

    # Reading

    def _open(self, on_damage: Callable[[str], None]) -> Generation:
        found = newest_intact(self.directory, on_damage, self._check_identity)
        return found or Generation(0)

    def _check_identity(self, found: Generation) -> None:
        """Refuse to continue what was made from something else; names the first field that differs."""
        stored = {**found.identity, "checkpoint schema": found.schema}
        now = {**self.identity, "checkpoint schema": SCHEMA}
        for name in [*now, *(name for name in stored if name not in now)]:
            if stored.get(name) != now.get(name):
                raise IdentityError(
                    f"the checkpoint was made with {_shown(stored.get(name))}, this run has "
                    f"{_shown(now.get(name))}",
                    where=name,
                    hint="resume with what the run was started with, or start a new run",
                )

    @property
    def generation(self) -> int:
        """Number of the generation that this continues; 0 when nothing was committed yet."""
        return self._current.number

    def __contains__(self, name: str) -> bool:
        return name in self._current.entries

    def get(self, name: str) -> dict[str, Tensor]:
        """The tensors of an entry, on the CPU, in the order of their names."""
        digest = self._current.entries[name]
        try:
            content = _content(object_path(self.directory, digest))
            if hashlib.sha256(content).hexdigest() != digest:
                raise DamagedCheckpoint(f"{digest}: its checksum does not match")
        except DamagedCheckpoint as damage:
            raise EqatError(
                f"a checkpoint object changed while the run was using it: {damage}",
                exit_code=ExitCode.IDENTITY,
                where=name,
                hint="resume the run; it goes back to the generation before",
            ) from damage
        # safetensors returns them in the order of a hash table, which differs from one load to the next; what
        # is written from them (an export) must not.
        return dict(sorted(load_safetensors(content).items()))

    def fact(self, name: str) -> Any:
        """A small value stored beside the entries, or none."""
        return self._current.facts.get(name)

    # Writing

    def put(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write an entry's object. It counts from the next :meth:`commit`. Tensors must be on the CPU."""
        began = time.monotonic()
        hashed = hashlib.sha256()
        size = 0
        for chunk in safetensors_chunks(tensors):
            hashed.update(chunk)
            size += len(chunk)
        digest = hashed.hexdigest()
        if not _is_intact(self.directory, digest):
            atomic_write(object_path(self.directory, digest), safetensors_chunks(tensors))
            self._pending_bytes += size
        self._current.entries[name] = digest
        self._pending_seconds += time.monotonic() - began

    def drop(self, name: str) -> None:
        """Leave an entry out of the next :meth:`commit`."""
        self._current.entries.pop(name, None)

    def forget(self, name: str) -> None:
        """Leave a fact out of the next :meth:`commit`."""
        self._current.facts.pop(name, None)

    def adopt(self, source: Path, generation: Generation, wanted: Callable[[str], bool]) -> None:
        """Share the entries of another run's generation whose names are ``wanted``; its facts too.

        Objects are hard links where the file system can, copies elsewhere. They count from the next
        :meth:`commit`.
        """
        for name, digest in generation.entries.items():
            if wanted(name):
                _share(object_path(source, digest), object_path(self.directory, digest))
                self._current.entries[name] = digest
        for name, value in generation.facts.items():
            if wanted(name):
                self._current.facts[name] = value

    def remember(self, name: str, value: Any) -> None:
        """Store a JSON value with the next :meth:`commit`."""
        self._current.facts[name] = value

    def commit(self) -> Committed:
        """Publish everything put since the last commit as a new generation."""
        began = time.monotonic()
        made = replace(self._current, number=self._current.number + 1, identity=self.identity, schema=SCHEMA)
        encoded = made.encode()
        atomic_write(generation_path(self.directory, made.number), encoded)
        atomic_write(self.directory / "CURRENT", f"{made.number}\n".encode())
        self._current = made
        prune(self.directory)
        committed = Committed(
            made.number,
            self._pending_bytes + len(encoded),
            self._pending_seconds + time.monotonic() - began,
        )
        self._pending_bytes, self._pending_seconds = 0, 0.0
        return committed


def newest_intact(
    directory: Path,
    on_damage: Callable[[str], None] = lambda message: None,
    check: Callable[[Generation], None] = lambda found: None,
) -> Generation | None:
    """The newest generation whose objects are all there and intact; none where nothing was ever committed.

    ``check`` sees a generation before its objects are read and may refuse it by raising.
    """
    if not (directory / "CURRENT").exists():
        return None
    damages: list[str] = []
    for number in candidates(directory):
        try:
            found = read_generation(directory, number)
            check(found)
            for digest in found.entries.values():
                _verify(directory, digest)
        except DamagedCheckpoint as damage:
            damages.append(f"checkpoint generation {number} is damaged ({damage})")
            continue
        for message in damages:
            on_damage(f"{message}; going back to the one before")
        return found
    there = highest(directory)
    raise EqatError(
        "no usable checkpoint generation is left"
        + (f": {damages[0]}" if damages else ": CURRENT is damaged"),
        exit_code=ExitCode.IDENTITY,
        where=str(directory),
        hint="start a new run; nothing here can be continued"
        if damages or not there
        else f"generation {there} is the last one that lies there: "
        f"echo {there} > {shlex.quote(str(directory / 'CURRENT'))}, then resume",
    )


def _verify(directory: Path, digest: str) -> None:
    path = object_path(directory, digest)
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DamagedCheckpoint(f"{path.name}: {error.strerror}") from error
    if found != digest:
        raise DamagedCheckpoint(f"{path.name}: its checksum does not match")


def _is_intact(directory: Path, digest: str) -> bool:
    """Whether the object is there; a damaged one, left by a generation that was given up, is not."""
    if not object_path(directory, digest).exists():
        return False
    try:
        _verify(directory, digest)
    except DamagedCheckpoint:
        return False
    return True


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DamagedCheckpoint(f"{path.name}: {error.strerror}") from error


def _share(source: Path, target: Path) -> None:
    if target.exists():
        return
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        atomic_write(target, _content(source))


def _shown(value: Any) -> str:
    """A value of an identity, short enough for a message."""
    text = "none" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."
