"""Checkpoints: finished work, published atomically, verified when read.

    checkpoints/
      CURRENT                      the number of the newest generation
      generation-000012.json       what that generation consists of: entry name -> object
      objects/<sha256>.safetensors content-addressed, written once, never changed

A generation is published in three steps, each durable before the next: objects, generation file, CURRENT. A
kill between any two of them leaves the previous generation in force. Generations share objects, so committing
a finished block writes that block and nothing else. Two generations are kept; an object lives as long as one
of them names it.

Reading fails closed: an object whose bytes do not hash to its name makes its generation unusable, the one
before is taken instead (and the caller is told), and a generation made by another model, data set or
configuration is refused with the field that differs. Nothing is ever searched for or guessed. What is damaged
is written anew when its content comes up again.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from engine.run.errors import EqatError, ExitCode, IdentityError
from engine.run.files import atomic_write, disk_error

SCHEMA = 1
GENERATIONS_KEPT = 2


@dataclass(frozen=True)
class Committed:
    """What one commit cost."""

    generation: int
    bytes: int
    seconds: float


@dataclass
class _Generation:
    number: int
    entries: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


class DamagedCheckpoint(Exception):
    """A generation that cannot be used; the message says which file and why."""


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
        self.objects = directory / "objects"
        self.identity = dict(identity)
        try:
            self.objects.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(error, self.objects) from error
        self._current = self._open(on_damage)
        self._pending_bytes = 0
        self._pending_seconds = 0.0

    # Reading

    def _open(self, on_damage: Callable[[str], None]) -> _Generation:
        pointer = self.directory / "CURRENT"
        if not pointer.exists():
            return _Generation(0)
        damages: list[str] = []
        for number in self._generations(pointer):
            try:
                found = self._read_generation(number)
            except DamagedCheckpoint as damage:
                damages.append(f"checkpoint generation {number} is damaged ({damage})")
                continue
            for message in damages:
                on_damage(f"{message}; going back to the one before")
            return found
        raise EqatError(
            "no usable checkpoint generation is left"
            + (f": {damages[0]}" if damages else f": {pointer.name} is damaged"),
            exit_code=ExitCode.IDENTITY,
            where=str(self.directory),
            hint="start a new run; nothing here can be continued",
        )

    @staticmethod
    def _generations(pointer: Path) -> range:
        """Numbers of the generations kept, newest first; empty when the pointer says nothing."""
        try:
            newest = int(pointer.read_text())
        except (OSError, ValueError):
            return range(0)
        return range(newest, max(0, newest - GENERATIONS_KEPT), -1)

    def _read_generation(self, number: int) -> _Generation:
        path = self._generation_path(number)
        try:
            content = json.loads(path.read_bytes())
            schema, identity = content["schema"], dict(content["identity"])
            found = _Generation(number, dict(content["entries"]), dict(content["facts"]))
        except OSError as error:
            raise DamagedCheckpoint(f"{path.name}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedCheckpoint(f"{path.name} is not a generation file") from error
        self._check_identity({**identity, "checkpoint schema": schema})
        for digest in found.entries.values():
            self._read_object(digest)
        return found

    def _check_identity(self, stored: Mapping[str, Any]) -> None:
        """Refuse to continue what was made from something else; names the first field that differs."""
        now = {**self.identity, "checkpoint schema": SCHEMA}
        for name in [*now, *(name for name in stored if name not in now)]:
            if stored.get(name) != now.get(name):
                raise IdentityError(
                    f"the checkpoint was made with {_shown(stored.get(name))}, this run has "
                    f"{_shown(now.get(name))}",
                    where=name,
                    hint="resume with what the run was started with, or start a new run",
                )

    def _read_object(self, digest: str) -> bytes:
        path = self._object_path(digest)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DamagedCheckpoint(f"{path.name}: {error.strerror}") from error
        if hashlib.sha256(content).hexdigest() != digest:
            raise DamagedCheckpoint(f"{path.name}: its checksum does not match")
        return content

    def _is_intact(self, digest: str) -> bool:
        """Whether the object is there; a damaged one, left by a generation that was given up, is not."""
        if not self._object_path(digest).exists():
            return False
        try:
            self._read_object(digest)
        except DamagedCheckpoint:
            return False
        return True

    def __contains__(self, name: str) -> bool:
        return name in self._current.entries

    def get(self, name: str) -> dict[str, Tensor]:
        """The tensors of an entry, on the CPU, in the order of their names."""
        try:
            tensors = load_safetensors(self._read_object(self._current.entries[name]))
        except DamagedCheckpoint as damage:
            raise EqatError(
                f"a checkpoint object changed while the run was using it: {damage}",
                exit_code=ExitCode.IDENTITY,
                where=name,
                hint="resume the run; it goes back to the generation before",
            ) from damage
        # safetensors returns them in the order of a hash table, which differs from one load to the next; what
        # is written from them (an export) must not.
        return dict(sorted(tensors.items()))

    def fact(self, name: str) -> Any:
        """A small value stored beside the entries, or none."""
        return self._current.facts.get(name)

    # Writing

    def put(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write an entry's object. It counts from the next :meth:`commit`."""
        began = time.monotonic()
        content = save_safetensors(dict(tensors))
        digest = hashlib.sha256(content).hexdigest()
        if not self._is_intact(digest):
            atomic_write(self._object_path(digest), content)
            self._pending_bytes += len(content)
        self._current.entries[name] = digest
        self._pending_seconds += time.monotonic() - began

    def remember(self, name: str, value: Any) -> None:
        """Store a JSON value with the next :meth:`commit`."""
        self._current.facts[name] = value

    def commit(self) -> Committed:
        """Publish everything put since the last commit as a new generation."""
        began = time.monotonic()
        number = self._current.number + 1
        content = {
            "schema": SCHEMA,
            "generation": number,
            "identity": self.identity,
            "entries": self._current.entries,
            "facts": self._current.facts,
        }
        encoded = json.dumps(content, indent=1, sort_keys=True).encode()
        atomic_write(self._generation_path(number), encoded)
        atomic_write(self.directory / "CURRENT", f"{number}\n".encode())
        self._current.number = number
        self._prune(number)
        committed = Committed(
            number,
            self._pending_bytes + len(encoded),
            self._pending_seconds + time.monotonic() - began,
        )
        self._pending_bytes, self._pending_seconds = 0, 0.0
        return committed

    def _prune(self, newest: int) -> None:
        """Remove generations beyond the last two, objects that no remaining one names, and files that a
        kill left half written."""
        named: set[str] = set(self._current.entries.values())
        for path in self.directory.glob("generation-*.json"):
            number = int(path.stem.removeprefix("generation-"))
            if newest - GENERATIONS_KEPT < number <= newest:
                try:
                    named.update(json.loads(path.read_text())["entries"].values())
                except (OSError, ValueError, KeyError, TypeError, AttributeError):
                    continue
            else:
                path.unlink(missing_ok=True)
        for path in self.objects.glob("*.safetensors"):
            if path.stem not in named:
                path.unlink(missing_ok=True)
        for path in (*self.directory.glob(".*.tmp"), *self.objects.glob(".*.tmp")):
            path.unlink(missing_ok=True)

    def _generation_path(self, number: int) -> Path:
        return self.directory / f"generation-{number:06d}.json"

    def _object_path(self, digest: str) -> Path:
        return self.objects / f"{digest}.safetensors"


def _shown(value: Any) -> str:
    """A value of an identity, short enough for a message."""
    text = "none" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."
