"""Which of a run's generations is continued, and what of it.

CURRENT's, if all of it is intact. Otherwise, of all that lie there, each without what is damaged and what
depends on that (:mod:`engine.run.salvage`), the one from which least is left to do; and whoever asked is
told.
Only where no generation lies is a run taken for one that has nothing yet.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from engine.errors import EqatError, ExitCode, IdentityError, PreflightError
from engine.run.facts import block_entry
from engine.run.generations import Generation, OtherSchema, Ref, candidates, current, read
from engine.run.objects import DamagedCheckpoint, checkpoint_files, object_damage, objects_path
from engine.run.salvage import Salvaged, blocks_of, held, is_chained, leading_blocks, progress, salvage

NEW_RUN = "start a new run; nothing here can be continued"
MISSING = "CURRENT is missing"


@dataclass(frozen=True)
class Usable:
    """A generation of which everything is intact."""

    generation: Generation
    warnings: tuple[str, ...] = ()
    """What is damaged and how much that costs, a sentence each."""
    damage: str = ""
    """What of the newest generation is damaged, for an error; empty where nothing is."""


@dataclass(frozen=True)
class _Candidate:
    ref: Ref
    salvaged: Salvaged
    damage: str
    """What is damaged in it."""

    @property
    def rank(self) -> tuple[tuple[int, ...], bool]:
        """Most progress; among equals, one that is whole."""
        return progress(self.salvaged.generation), not self.damage


@dataclass
class _Search:
    directory: Path
    check: Callable[[Generation], None]
    objects: dict[str, str] = field(default_factory=dict)
    """What is wrong with each object that was looked at: generations share them."""
    damage: dict[Ref, str] = field(default_factory=dict)
    """What is wrong with each generation that was looked at, in that order; empty for one that is whole."""
    refusal: IdentityError | None = None

    def consider(self, ref: Ref, blocks: int | None = None) -> _Candidate | None:
        """What a generation holds that is intact; none where it cannot be used at all. With ``blocks``, only
        so many first blocks are looked at."""
        dropped: list[str] = []
        try:
            found = read(self.directory, ref, dropped)
            self.check(found)
        except OtherSchema as other:
            raise IdentityError(
                f"the checkpoint was made with schema {other.schema}, which a later version writes",
                where="checkpoint schema",
                hint="go on with that version",
            ) from other
        except DamagedCheckpoint as damage:
            self.damage[ref] = str(damage)
            return None
        except IdentityError as refusal:
            # What a digest covers was written so. Of an older schema it may be a flipped bit: then the
            # generation before is another.
            if ref.digest:
                raise
            self.refusal = self.refusal or refusal
            self.damage[ref] = f"{refusal.where}: {refusal.message}"
            return None
        wanted = list(found.entries)
        if blocks is not None:
            wanted = [block_entry(index) for index in blocks_of(found.entries) if index < blocks]
        damaged = {name: self._object_damage(found.entries[name]) for name in wanted}
        damaged = {name: problem for name, problem in damaged.items() if problem}
        parts = [f"{name}: {problem}" for name, problem in sorted(damaged.items())]
        parts += [f"{name} is no such value" for name in dropped]
        words = parts[0] + f" and {len(parts) - 1} more" * (len(parts) > 1) if parts else ""
        self.damage[ref] = words
        return _Candidate(ref, salvage(found, damaged, is_chained(found.identity)), words)

    def _object_damage(self, digest: str) -> str:
        if digest not in self.objects:
            self.objects[digest] = object_damage(self.directory, digest)
        return self.objects[digest]


def newest_usable(directory: Path, check: Callable[[Generation], None] = lambda found: None) -> Usable | None:
    """What is continued; none where nothing was ever committed.

    ``check`` sees a generation before its objects are read and may refuse it with an IdentityError.

    Raises:
        EqatError: (8) when generations lie there and none can be used; PreflightError for a folder that is a
            link or cannot be read. Nothing on the disk is changed.
    """
    lying = candidates(directory)
    order, pointer = _in_order(directory, lying)
    if not lying and (pointer == MISSING or not checkpoint_files(objects_path(directory), directory.parent)):
        return None  # a kill may have come before the first generation
    search = _Search(directory, check)
    found: list[_Candidate] = []
    for ref in order:
        candidate = search.consider(ref)
        if candidate is not None:
            found.append(candidate)
            if not candidate.damage:
                break  # older ones have no more
    if not found:
        _refuse(search, directory, pointer, lying)
    best = max(found, key=lambda candidate: candidate.rank)  # of equals the first, which is the newest
    return _told(best, search, pointer)


def most_blocks(directory: Path, wanted: int) -> Usable:
    """The generation in which most of the first ``wanted`` blocks are intact, without what is not; an empty
    one where nothing lies. Only blocks are looked at: who shares them needs nothing else.

    Raises:
        PreflightError: for a folder that is a link or cannot be read.
    """
    search = _Search(directory, lambda found: None)
    best, most = Usable(Generation(0)), -1
    for ref in _in_order(directory, candidates(directory))[0]:
        candidate = search.consider(ref, wanted)
        blocks = leading_blocks(candidate.salvaged.generation.entries) if candidate else -1
        if candidate is not None and blocks > most:
            best, most = Usable(candidate.salvaged.generation, damage=candidate.damage), blocks
        if most >= wanted:
            break
    return best


def is_damaged(directory: Path) -> bool:
    """Whether generations lie there and CURRENT's is not intact; a run that has none has nothing damaged."""
    try:
        return bool(candidates(directory)) and not current_is_intact(directory)
    except PreflightError:
        return False


def current_is_intact(directory: Path) -> bool:
    """Whether the generation that CURRENT names is there with all that it holds."""
    try:
        named = current(directory)
        return named is not None and not any(
            object_damage(directory, digest) for digest in set(read(directory, named).entries.values())
        )
    except (DamagedCheckpoint, PreflightError):
        return False


def _in_order(directory: Path, lying: list[Ref]) -> tuple[list[Ref], str]:
    """The generations that lie there, CURRENT's first; and what is wrong with CURRENT, if anything is."""
    try:
        named, problem = current(directory), MISSING
    except DamagedCheckpoint as damage:
        named, problem = None, str(damage)
    if named is not None and named not in lying:
        problem = f"CURRENT names generation {named.number}, which does not lie there"
    if named not in lying:
        return lying, problem
    return [named, *(ref for ref in lying if ref != named)], ""


def _refuse(search: _Search, directory: Path, pointer: str, lying: list[Ref]) -> None:
    if search.refusal is not None:
        raise search.refusal
    reason = next(iter(search.damage.values()), "") or f"{pointer}, and no generation lies there"
    raise EqatError(
        f"no usable checkpoint generation is left{' (damaged)' * bool(lying)}: {reason}",
        exit_code=ExitCode.IDENTITY,
        where=str(directory),
        hint=NEW_RUN,
    )


def _told(best: _Candidate, search: _Search, pointer: str) -> Usable:
    """``best``, with a warning for everything before it in the order that is not as it should be."""
    warnings = []
    number, has = best.ref.number, held(best.salvaged.generation)
    if pointer:
        warnings.append(f"{pointer}; going on with generation {number}, which has {has}")
    for ref, damage in search.damage.items():
        if ref == best.ref:
            break
        warnings.append(
            f"checkpoint generation {ref.number} is damaged ({damage}); going back to generation {number}, "
            f"which has {has}"
        )
    if best.damage:
        lost = best.salvaged.lost or "nothing that was trained"
        warnings.append(
            f"checkpoint generation {number} is damaged ({best.damage}); to be done again: {lost}"
        )
    damage = next((words for words in search.damage.values() if words), pointer)
    return Usable(best.salvaged.generation, tuple(warnings), damage)
