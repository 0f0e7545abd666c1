"""How checkpoints lie on the disk, for those who only look at or clean them: no tensors, no torch.

    checkpoints/
      CURRENT                               number and SHA-256 of the newest generation
      generation-000012-<sha256>.json       what that generation consists of: entry name -> object, and facts
      spare-000012-<sha256>.json            a copy of the generation, while there is no other to fall back to
      objects/<sha256>.safetensors          content-addressed, written once, never changed

Every byte that decides is covered by a digest: CURRENT names one that only an intact generation file has, a
generation's own name is the digest of its bytes, and it names its objects by theirs. Whatever bit flips in
any of them, something no longer fits, and :mod:`engine.run.usable` goes on with what does.

Schema 2 had no digest of its generations (``generation-000012.json``, and a bare number in CURRENT). It can
still be read, checked as far as types reach, and becomes schema 3 with the next commit. The form of a name
says which schema its content has to have, so no flip turns one into the other.

``engine.checkpoints.store`` reads and writes them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec

from engine.errors import EqatError, PreflightError
from engine.run import contents
from engine.run import facts as known_facts
from engine.run.objects import DamagedCheckpoint, checkpoint_files, object_path, objects_path, write_over
from engine.run.removal import remove_file
from engine.system.guarded import BadFile, NoFile, opened_folder, parsed, read_bytes

SCHEMA = 3
GENERATIONS_KEPT = 2
LIMIT = 64 << 20
"""Bytes of a generation file: a thousand times what that of a model of 200 blocks has."""

_POINTER = re.compile(rb"([1-9][0-9]{0,8})(?: ([0-9a-f]{64}))?\n")
_ENTRY = re.compile(r"(block|scales)-[0-9]{3,4}|training")
"""Of schema 2, which knew these stages and no others."""


class OtherSchema(DamagedCheckpoint):
    """A generation that is whole, and of a schema that this version does not know."""

    def __init__(self, schema: int) -> None:
        super().__init__(f"it has schema {schema}, and this version reads {SCHEMA}")
        self.schema = schema


class Ref(NamedTuple):
    """Which generation file: its number and the SHA-256 of its bytes, empty for one of schema 2."""

    number: int
    digest: str

    @property
    def name(self) -> str:
        """The file's name."""
        return f"generation-{self.number:06d}{'-' * bool(self.digest)}{self.digest}.json"

    @property
    def spare(self) -> str:
        """The name of its copy."""
        return self.name.replace("generation-", "spare-")


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


class _File(msgspec.Struct, forbid_unknown_fields=True):
    """The content of a generation file."""

    schema: Annotated[int, msgspec.Meta(ge=1)]
    generation: Annotated[int, msgspec.Meta(ge=1)]
    identity: dict[str, str]
    entries: dict[str, str]
    facts: dict[str, Any]


# -- which there are -----------------------------------------------------------------------------------


def current(directory: Path) -> Ref | None:
    """What CURRENT names; none where there is no such file.

    Raises:
        DamagedCheckpoint: where it names nothing.
    """
    path = directory / "CURRENT"
    try:
        content = read_bytes(path, 1000, root=directory.parent)
    except NoFile:
        return None
    except BadFile as error:
        raise DamagedCheckpoint(f"CURRENT {error.message}") from error
    match = _POINTER.fullmatch(content)
    if match is None:
        raise DamagedCheckpoint("CURRENT is damaged")
    return Ref(int(match[1]), (match[2] or b"").decode())


def candidates(directory: Path) -> list[Ref]:
    """All generation files that lie there, newest first.

    Raises:
        PreflightError: where the folder is a link or cannot be looked into.
    """
    names = checkpoint_files(directory, directory.parent)
    matches = (contents.GENERATION.fullmatch(name) or contents.SPARE.fullmatch(name) for name in names)
    return sorted({Ref(int(match[1]), match[2] or "") for match in matches if match}, reverse=True)


def newest(directory: Path) -> int:
    """The number in CURRENT; 0 when it says nothing."""
    try:
        ref = current(directory)
    except DamagedCheckpoint:
        return 0
    return 0 if ref is None else ref.number


def highest(directory: Path) -> int:
    """The largest number of a generation file that lies there, whatever CURRENT says; 0 without any."""
    return max((ref.number for ref in candidates(directory)), default=0)


def generation_path(directory: Path, number: int) -> Path:
    """The file of generation ``number``: CURRENT's, if that has the number, else one that lies there."""
    return directory / _ref(directory, number).name


def _ref(directory: Path, number: int) -> Ref:
    try:
        named = current(directory)
    except DamagedCheckpoint:
        named = None
    if named is not None and named.number == number:
        return named
    return next((ref for ref in candidates(directory) if ref.number == number), Ref(number, ""))


# -- reading -------------------------------------------------------------------------------------------


def read_generation(directory: Path, number: int) -> Generation:
    """:func:`read`, by the number alone."""
    return read(directory, _ref(directory, number))


def read(directory: Path, ref: Ref, dropped: list[str] | None = None) -> Generation:
    """The content of a generation file; its objects are not looked at.

    A fact that nothing depends on and that is not what it should be is left out, and ``dropped`` is told.

    Raises:
        DamagedCheckpoint: for a file that is missing, is not what its name says, is no generation or names
            no objects; :class:`OtherSchema` for one that a later version wrote.
    """
    try:
        content = _content(directory, ref)
        tree = parsed(json.loads, content, directory / ref.name)
        _check_schema(tree, ref)
        file = parsed(lambda tree: msgspec.convert(tree, _File), tree, directory / ref.name)
    except BadFile as error:
        raise DamagedCheckpoint(f"{ref.name} {error.message}") from error
    if file.generation != ref.number:
        raise DamagedCheckpoint(f"{ref.name} says that it is generation {file.generation}")
    for digest in file.entries.values():
        object_path(directory, digest)
    found = Generation(ref.number, file.entries, file.facts, file.identity, file.schema)
    _check_facts(found, [] if dropped is None else dropped)
    if not ref.digest:
        _check_unverified(found)
    return found


def _content(directory: Path, ref: Ref) -> bytes:
    """The bytes of a generation file that are what its name says, of its copy if need be."""
    for name in (ref.name, ref.spare) if ref.digest else ():
        try:
            content = read_bytes(directory / name, LIMIT, root=directory.parent)
        except BadFile:
            continue
        if hashlib.sha256(content).hexdigest() == ref.digest:
            return content
    content = read_bytes(directory / ref.name, LIMIT, root=directory.parent)
    if ref.digest:
        raise DamagedCheckpoint(f"{ref.name}: its checksum does not match")
    return content


def _check_schema(tree: Any, ref: Ref) -> None:
    schema = tree.get("schema") if isinstance(tree, dict) else None
    if ref.digest and isinstance(schema, int) and schema > SCHEMA:
        raise OtherSchema(schema)  # its digest is right, so that is what somebody wrote
    if schema == 1 and not ref.digest:
        raise DamagedCheckpoint(
            f"{ref.name} is of a version whose checkpoints this one does not read (schema 1)"
        )
    if schema != (SCHEMA if ref.digest else 2):
        raise DamagedCheckpoint(f"{ref.name} is not a generation file of its schema")


def _check_facts(found: Generation, dropped: list[str]) -> None:
    for name, value in list(found.facts.items()):
        problem = known_facts.problem_of(name, value)
        if problem and known_facts.decides(name):
            raise DamagedCheckpoint(f"{name} in generation {found.number}: {problem}")
        if problem:
            del found.facts[name]
            dropped.append(name)


def _check_unverified(found: Generation) -> None:
    """Of schema 2: without a digest, only names that do not exist and parts that do not fit show damage. What
    it names was fixed when schema 3 came, so no table is asked."""
    strange = [name for name in found.entries if not _ENTRY.fullmatch(name)]
    strange += [name for name in found.facts if not known_facts.is_known(name)]
    blocks, scales = (
        {name.partition("-")[2] for name in found.entries if name.startswith(kind)}
        for kind in ("block-", "scales-")
    )
    training = found.facts.get(known_facts.TRAINING)
    if strange:
        raise DamagedCheckpoint(f"generation {found.number} holds {strange[0]!r}, which does not exist")
    if (training is None) == (known_facts.TRAINING in found.entries):
        raise DamagedCheckpoint(f"generation {found.number} has half the state of a training")
    if scales != (blocks if "e2e_qp_done" in found.facts else set()):
        raise DamagedCheckpoint(f"generation {found.number} has scales of other blocks than it holds")
    if blocks != {f"{index:03d}" for index in range(len(blocks))}:
        raise DamagedCheckpoint(f"generation {found.number} lacks a block before one that it holds")
    if training and not training["restarts"] and training["steps_done"] != training["sampler"]["step"]:
        raise DamagedCheckpoint(f"generation {found.number} stands at two steps of one training")


# -- writing -------------------------------------------------------------------------------------------


def publish(directory: Path, made: Generation) -> int:
    """Write a generation, whose objects are durable already, and make it the current one; its bytes.

    Raises what :func:`engine.system.files.disk_error` makes of an :class:`OSError`.
    """
    encoded = made.encode()
    ref = Ref(made.number, hashlib.sha256(encoded).hexdigest())
    write_over(directory / ref.name, encoded, directory.parent)
    write_over(directory / "CURRENT", f"{ref.number} {ref.digest}\n".encode(), directory.parent)
    return len(encoded)


# -- cleaning ------------------------------------------------------------------------------------------


def prune(directory: Path, *, keep: int = GENERATIONS_KEPT, dry_run: bool = False) -> int:
    """Remove generations beyond the newest ``keep``, objects that no remaining one names, and files that a
    kill left half written; returns the bytes that became free.

    Only generations that could be read count as kept. Where CURRENT names none of them, or one that may be
    needed cannot be read, only half-written files go: what a disk that hiccups for a moment did not show must
    not be lost.

    Only whoever holds the run's lock may do this.
    """
    root = directory.parent
    try:
        lying, objects = checkpoint_files(directory, root), checkpoint_files(objects_path(directory), root)
    except PreflightError:
        return 0  # nothing of ours makes links; what lies there may be somebody's model
    garbage = [name for name in lying if contents.is_unfinished_checkpoint(name)]
    rubbish = [name for name in objects if contents.is_unfinished_object(name)]
    kept = _kept(directory, keep)
    if kept is not None:
        named = {digest for generation in kept.values() for digest in generation.entries.values()}
        names = {ref.name for ref in kept}
        if len(kept) == 1:
            names |= _with_spare(directory, next(iter(kept)), dry_run)
        garbage += [name for name in lying if contents.is_generation(name) and name not in names]
        matches = map(contents.OBJECT.fullmatch, objects)
        rubbish += [match[0] for match in matches if match and match[1] not in named]
    freed = _remove(directory, root, garbage, dry_run)
    return freed + _remove(objects_path(directory), root, rubbish, dry_run)


def _kept(directory: Path, keep: int) -> dict[Ref, Generation] | None:
    """The generations that stay: CURRENT's, whatever is newer (a kill came before CURRENT), and the newest
    before it that can be read; none where that is not enough to be sure of."""
    try:
        named = current(directory)
        if named is None:
            return None
        kept = {named: read(directory, named)}
    except DamagedCheckpoint:
        return None
    older, unreadable = 1, False
    for ref in candidates(directory):
        if ref == named or (ref.number < named.number and older == keep):
            continue
        try:
            kept[ref] = read(directory, ref)
            older += ref.number < named.number
        except DamagedCheckpoint:
            unreadable = True
    return None if unreadable and older < keep else kept


def _with_spare(directory: Path, only: Ref, dry_run: bool) -> set[str]:
    """The names of the only generation and of its copy, which is made where it is missing: it lies beside the
    file itself, so that one flipped bit cannot cost the run."""
    if not only.digest:
        return {only.name}
    try:
        content = _content(directory, only)
        for name in (only.name, only.spare):
            if not dry_run and not _holds(directory / name, content):
                write_over(directory / name, content, directory.parent)
    except EqatError:
        pass  # a full disk: what is there is whole
    return {only.name, only.spare}


def _holds(path: Path, content: bytes) -> bool:
    try:
        return read_bytes(path, LIMIT, root=path.parent.parent) == content
    except BadFile:
        return False


def _remove(folder: Path, root: Path, names: list[str], dry_run: bool) -> int:
    """Bytes that come free. What cannot be removed is in nobody's way."""
    if not names:
        return 0
    freed = 0
    with opened_folder(folder, root) as opened:
        for name in names:
            with contextlib.suppress(OSError):
                freed += remove_file(opened, name, dry_run=dry_run)
    return freed
