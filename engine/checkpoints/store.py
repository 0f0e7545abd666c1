"""Checkpoints: finished work, published atomically, verified when read.

The layout is :mod:`engine.run.generations`'. A generation is published in three steps, each durable before
the next: objects, generation file, CURRENT. A kill between any two of them leaves the previous generation in
force. Generations share objects, so committing a finished block writes that block and nothing else. Two
generations are kept; an object lives as long as one of them names it.

Whatever is damaged is seen, since a digest covers it, and left out with what depends on it
(:mod:`engine.run.usable`): the caller is told, and it is trained again. A generation made by another model,
data set or configuration is refused with the field that differs (:mod:`engine.checkpoints.identity`). What is
damaged is written anew when its content comes up again.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load as load_safetensors
from torch import Tensor

from engine.checkpoints.identity import counts_as, differing_field
from engine.checkpoints.tensorfile import safetensors_chunks
from engine.config.runtime import GPUS
from engine.errors import DamagedRun, IdentityError
from engine.run.generations import SCHEMA, Generation, highest, prune, publish
from engine.run.objects import (
    DamagedCheckpoint,
    object_damage,
    object_path,
    objects_path,
    read_object,
    share_object,
    write_over,
)
from engine.run.usable import newest_usable
from engine.system.files import make_folder

ADDED_SINCE_SCHEMA_2 = ("tokenizer",)
"""Fields of the identity that a generation of schema 2 cannot have: it is accepted without them."""


@dataclass(frozen=True)
class Committed:
    """What one commit cost."""

    generation: int
    bytes: int
    seconds: float


class CheckpointStore:
    """Entries (named dictionaries of tensors) and facts (small JSON values) of one run.

    ``identity`` is what the checkpoint depends on, by field (``model``, ``data``, ``block_ap.epochs``, ...);
    ``defaults`` is what a field counts as that the identity of an older checkpoint lacks. A field that
    ``may_differ`` is taken over from the run.
    """

    def __init__(
        self,
        directory: Path,
        identity: Mapping[str, str],
        *,
        defaults: Mapping[str, str] | None = None,
        may_differ: Container[str] = (),
        on_damage: Callable[[str], None] = lambda message: None,
    ) -> None:
        self.directory = directory
        self.identity = dict(identity)
        self.defaults, self._may_differ = dict(defaults or {}), may_differ
        if not os.path.lexists(directory):
            make_folder(directory)
        make_folder(objects_path(directory), root=directory.parent)
        found = newest_usable(directory, self._check_identity)
        for message in found.warnings if found else ():
            on_damage(message)
        self.damage = found.damage if found else ""
        """What of the newest generation is damaged and was left out here; empty where all of it is whole."""
        self._current = found.generation if found else Generation(0)
        # Above whatever lies there: a generation that a kill left unpublished keeps its number.
        self._last = highest(directory)
        self._pending_bytes = 0
        self._pending_seconds = 0.0

    # Reading

    def _check_identity(self, found: Generation) -> None:
        """Refuse to continue what was made from something else; names the first field that differs."""
        defaults = self.defaults
        if found.schema < SCHEMA:
            added = {name: self.identity[name] for name in ADDED_SINCE_SCHEMA_2 if name in self.identity}
            defaults = added | defaults
        there = {name: value for name, value in found.identity.items() if name not in self._may_differ}
        here = {name: value for name, value in self.identity.items() if name not in self._may_differ}
        name = differing_field(there, here, defaults)
        if name == GPUS:
            raise IdentityError(
                f"the checkpoint was made on {_counted(counts_as(there, name, defaults))}, and on "
                f"{counts_as(here, name, defaults)} the result would have other last bits",
                where=name,
                hint=f"eqat resume --gpus {counts_as(there, name, defaults)}, or --allow-world-size-change",
            )
        if name is not None:
            raise IdentityError(
                f"the checkpoint was made with {_shown(counts_as(found.identity, name, defaults))}, "
                f"this run has {_shown(counts_as(self.identity, name, defaults))}",
                where=name,
                hint="resume with what the run was started with, or start a new run",
            )

    @property
    def generation(self) -> int:
        """Number of the generation that this continues; 0 when nothing was committed yet."""
        return self._current.number

    @property
    def current(self) -> Generation:
        """What the next commit publishes, as far as it is put."""
        return self._current

    def __contains__(self, name: str) -> bool:
        return name in self._current.entries

    def get(self, name: str) -> dict[str, Tensor]:
        """The tensors of an entry, on the CPU, in the order of their names."""
        try:
            content = read_object(self.directory, self._current.entries[name])
        except DamagedCheckpoint as damage:
            raise DamagedRun(
                f"a checkpoint object changed while the run was using it: {damage}",
                where=name,
                hint="resume the run; what is damaged is trained again",
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
        if object_damage(self.directory, digest):
            path = object_path(self.directory, digest)
            write_over(path, safetensors_chunks(tensors), self.directory.parent)
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

        Raises:
            DamagedCheckpoint: for an object that is not what its name says; nothing of it is taken over.
        """
        for name, digest in generation.entries.items():
            if not wanted(name):
                continue
            if object_damage(self.directory, digest) and not share_object(source, self.directory, digest):
                path = object_path(self.directory, digest)
                write_over(path, read_object(source, digest), self.directory.parent)
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
        made = replace(self._current, number=self._last + 1, identity=self.identity, schema=SCHEMA)
        encoded_bytes = publish(self.directory, made)
        self._current, self._last = made, made.number
        prune(self.directory)
        committed = Committed(
            made.number,
            self._pending_bytes + encoded_bytes,
            self._pending_seconds + time.monotonic() - began,
        )
        self._pending_bytes, self._pending_seconds = 0, 0.0
        return committed


def _shown(value: Any) -> str:
    """A value of an identity, short enough for a message."""
    text = "none" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."


def _counted(gpus: str | None) -> str:
    return f"{gpus} GPU{'' if gpus == '1' else 's'}"
