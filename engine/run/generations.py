"""How checkpoints lie on the disk, for those who only look at or clean them: no tensors, no torch.

    checkpoints/
      CURRENT                      the number of the newest generation
      generation-000012.json       what that generation consists of: entry name -> object
      objects/<sha256>.safetensors content-addressed, written once, never changed

``engine.checkpoint`` reads and writes them.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.run.contents import is_unfinished_checkpoint, is_unfinished_object

SCHEMA = 2
GENERATIONS_KEPT = 2

_DIGEST = re.compile(r"[0-9a-f]{64}")
_GENERATION = re.compile(r"generation-([0-9]{6,9})\.json")


class DamagedCheckpoint(Exception):
    """A generation that cannot be used; the message says which file and why."""


@dataclass
class Generation:
    """A generation file: names of objects by entry, small values by name, and what all of it depends on."""

    number: int
    entries: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    identity: dict[str, str] = field(default_factory=dict)
    schema: int = SCHEMA

    def encode(self) -> bytes:
        """Its bytes on the disk: equal content gives equal bytes."""
        content: dict[str, Any] = {
            "schema": self.schema,
            "generation": self.number,
            "identity": self.identity,
            "entries": self.entries,
            "facts": self.facts,
        }
        return json.dumps(content, indent=1, sort_keys=True).encode()


def generation_path(directory: Path, number: int) -> Path:
    return directory / f"generation-{number:06d}.json"


def objects_path(directory: Path) -> Path:
    return directory / "objects"


def object_path(directory: Path, digest: str) -> Path:
    """Where an object lies. A name that is no digest, from a file that was tampered with, is refused."""
    if not _DIGEST.fullmatch(digest):
        raise DamagedCheckpoint(f"{digest[:80]!r} is not the name of an object")
    return objects_path(directory) / f"{digest}.safetensors"


def newest(directory: Path) -> int:
    """The number in CURRENT; 0 when it says nothing."""
    try:
        return max(0, int((directory / "CURRENT").read_text()))
    except (OSError, ValueError):
        return 0


def highest(directory: Path) -> int:
    """The largest number of a generation file that lies there, whatever CURRENT says; 0 without any."""
    names = (_GENERATION.fullmatch(path.name) for path in directory.glob("generation-*.json"))
    return max((int(name[1]) for name in names if name), default=0)


def candidates(directory: Path) -> range:
    """Numbers of the generations that may be continued, newest first."""
    last = newest(directory)
    return range(last, max(0, last - GENERATIONS_KEPT), -1)


def read_generation(directory: Path, number: int) -> Generation:
    """The content of a generation file; its objects are not looked at.

    Raises:
        DamagedCheckpoint: for a file that is missing, is no generation or names no objects.
    """
    path = generation_path(directory, number)
    try:
        content = json.loads(path.read_bytes())
        found = Generation(
            number,
            dict(content["entries"]),
            dict(content["facts"]),
            dict(content["identity"]),
            content["schema"],
        )
    except OSError as error:
        raise DamagedCheckpoint(f"{path.name}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(f"{path.name} is not a generation file") from error
    for digest in found.entries.values():
        if not isinstance(digest, str):
            raise DamagedCheckpoint(f"{path.name} is not a generation file")
        object_path(directory, digest)
    return found


def prune(directory: Path, *, keep: int = GENERATIONS_KEPT, dry_run: bool = False) -> int:
    """Remove generations beyond the newest ``keep``, objects that no remaining one names, and files that a
    kill left half written; returns the bytes that became free.

    Only whoever holds the run's lock may do this.
    """
    last = newest(directory)
    if not last:
        return 0
    named: set[str] = set()
    garbage: list[Path] = []
    readable = True
    for path in directory.glob("generation-*.json"):
        match = _GENERATION.fullmatch(path.name)
        if match is None:
            continue  # not ours
        if not last - keep < int(match[1]) <= last:
            garbage.append(path)
            continue
        try:
            named.update(read_generation(directory, int(match[1])).entries.values())
        except DamagedCheckpoint:
            # A disk that hiccups for a moment must not cost the objects of a generation that is whole.
            readable = False
    objects = objects_path(directory)
    if objects.is_symlink():
        return 0  # nothing of ours makes links; what lies there may be somebody's model
    if readable:
        garbage += [
            path
            for path in objects.glob("*.safetensors")
            if _DIGEST.fullmatch(path.stem) and path.stem not in named
        ]
    garbage += [path for path in directory.glob(".*.tmp") if is_unfinished_checkpoint(path.name)]
    garbage += [path for path in objects.glob(".*.tmp") if is_unfinished_object(path.name)]
    return sum(_remove(path, dry_run) for path in garbage)


def _remove(path: Path, dry_run: bool) -> int:
    """Bytes that come free; an object that another run shares frees none."""
    try:
        status = path.lstat()
        if not dry_run:
            path.unlink()
    except OSError:
        return 0
    return status.st_size if status.st_nlink == 1 else 0
