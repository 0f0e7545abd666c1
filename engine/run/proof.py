"""What proves that a folder is a run of ours.

Two questions. :func:`is_run` is asked by whoever looks for runs: it is quick, and being wrong costs a line in
a list. :func:`prove_run` is asked before something is deleted, where being wrong costs somebody's data: a
folder with a ``config.toml`` is what half of all projects are.
"""

from __future__ import annotations

import os
import stat
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from engine.config.base import Section, field_types, is_section
from engine.config.loading import from_toml
from engine.config.run import RunConfig, run_config
from engine.errors import EqatError, PreflightError
from engine.run import contents
from engine.system.guarded import bad_file, kind_of, names_in, opened_folder, opened_inner, parsed, read_text
from engine.system.ownership import is_ours, user_name
from engine.system.printable import printable

MADE_WITH_A_RUN = tuple(name for name in contents.FOLDERS if name != "cache")
"""Folders that every version made with a run, and that nothing removes from it."""
SECTIONS = tuple(
    name
    for name, kind in field_types(RunConfig).items()
    if is_section(kind) and name not in RunConfig.younger()
)
"""Sections that every version wrote into a run's configuration."""

_BY_HAND = "if it is a run all the same, delete the folder by hand"


class NotProven(PreflightError):
    """What should be deleted is not proven to be ours; the message says which proof is missing."""


class FolderIdentity(NamedTuple):
    """Which folder it is: another one may get its name in the meantime."""

    device: int
    inode: int

    @classmethod
    def of(cls, status: os.stat_result) -> FolderIdentity:
        return cls(status.st_dev, status.st_ino)

    @classmethod
    def at(cls, path: Path) -> FolderIdentity | None:
        """The one that has this name now; none where there is none."""
        try:
            return cls.of(os.lstat(path))
        except OSError:
            return None


def is_run(path: Path) -> bool:
    """Whether ``path`` looks like a run; false, not an error, for what may not be looked into.

    A ``config.toml`` alone would make a run of every project, and of the folder above an export. So there
    are also to be either ``control``, which is made with a run, or the event log, which a copy still has
    after a program that leaves out empty folders; and another folder of a run. Only the names count: a run
    that lost its checkpoints, or whose configuration is a link, is still listed, though it is not deleted.
    """
    if not os.path.lexists(path / contents.CONFIG):
        return False
    known = any(os.path.lexists(path / name) for name in ("control", "events.jsonl"))
    return known and any(os.path.lexists(path / name) for name in ("checkpoints", "logs", "export"))


def prove_run(path: Path) -> FolderIdentity:
    """Prove that ``path`` is a run of ours with nothing in it that is not; reads, and changes nothing.

    Proof is all of this: the path is a real folder of this user's, not a link to one; ``config.toml`` reads
    as the configuration of a run and has every section; the folders that are made with a run are there; and
    neither at its top nor in one of these folders lies anything that no run has. What lies deeper, in an
    export, is part of the run, unless it is another run.

    Raises:
        PreflightError: names the first proof that is missing.
    """
    with _folder_of_ours(path) as folder:
        names = _prove_making(folder, path)
        _prove_top(folder, names, path)
        _prove_folders(path)
        inner = next(_runs_inside(path), None)
        if inner is not None:
            raise NotProven(
                "holds another run",
                where=str(inner.parent),
                hint=f"delete {inner.name} first, or move it away",
            )
        return FolderIdentity.of(os.fstat(folder))


def prove_made_here(path: Path) -> None:
    """Prove that ``path`` was made as a run, whatever somebody has put into it since.

    Raises:
        PreflightError: names the first proof that is missing.
    """
    with _folder_of_ours(path) as folder:
        _prove_making(folder, path)


def prove_removed(path: Path) -> FolderIdentity:
    """Prove that ``path`` is what a deletion of ours left when it was cut off.

    A deletion takes the configuration last, so either it is there, or nothing is.

    Raises:
        PreflightError: names the first proof that is missing.
    """
    if not contents.is_removed_run(path.name):
        raise NotProven("is not called as a deletion calls what it removes", where=str(path))
    with _folder_of_ours(path) as folder:
        names = os.listdir(folder)
        if names:
            _prove_config(path)
            _prove_top(folder, names, path)
            _prove_folders(path)
        return FolderIdentity.of(os.fstat(folder))


def shown(names: Sequence[str]) -> str:
    """Some names in a sentence, without what a terminal would obey."""
    words = [printable(name) for name in sorted(names)]
    more = f" and {len(words) - 3} more" if len(words) > 3 else ""
    return ", ".join(words[:3]) + more


@contextmanager
def _folder_of_ours(path: Path) -> Iterator[int]:
    """A descriptor of ``path``, once it is known to be a real folder of this user's."""
    try:
        status = os.lstat(path)
        if stat.S_ISLNK(status.st_mode):
            raise NotProven(
                f"is a link to {os.path.realpath(path)}",
                where=str(path),
                hint="delete the run itself, or remove the link with rm",
            )
        if not stat.S_ISDIR(status.st_mode):
            raise NotProven(f"is {kind_of(status.st_mode)}, not a run", where=str(path))
        if not is_ours(path, status.st_uid):
            owner = user_name(status.st_uid)
            raise NotProven(f"belongs to {owner}", where=str(path), hint=f"only {owner} can delete it")
        with opened_folder(path) as folder:
            if FolderIdentity.of(os.fstat(folder)) != FolderIdentity.of(status):
                raise NotProven("was exchanged for something else just now", where=str(path))
            yield folder
    except OSError as error:
        raise bad_file(error, path) from error


def _prove_making(folder: int, path: Path) -> list[str]:
    """The names in a folder that has the configuration and the folders with which a run is made."""
    names = os.listdir(folder)
    missing = [name for name in MADE_WITH_A_RUN if name not in names]
    if contents.CONFIG not in names or missing:
        what = f"the folder {missing[0]}" if missing else contents.CONFIG
        raise NotProven(f"is no run of ours: {what} is missing", where=str(path), hint=_BY_HAND)
    _prove_config(path)
    return names


def _prove_config(run: Path) -> None:
    """Prove that the folder ``run`` holds the configuration of a run."""
    path = run / contents.CONFIG
    text = read_text(path, root=run)
    tree = parsed(tomllib.loads, text, path, "TOML")
    missing = [name for name in SECTIONS if not isinstance(tree.get(name), dict)]
    if missing or "extends" in tree:
        why = f"it has no section {missing[0]}" if missing else "it extends another file"
        raise NotProven(f"is not the configuration of a run: {why}", where=str(path), hint=_BY_HAND)
    unknown = next(_unknown_fields(tree, run_config()), "")
    if unknown:
        raise NotProven(
            f"has a field that this version does not know, {shown([unknown])}",
            where=str(path),
            hint="a newer version wrote it: use that one, or delete the folder by hand",
        )
    try:
        from_toml(text)
    except EqatError as error:
        raise NotProven(
            f"is not the configuration of a run: {error.where}: {error.message}",
            where=str(path),
            hint=_BY_HAND,
        ) from error


def _prove_top(folder: int, names: Sequence[str], path: Path) -> None:
    """Nothing but a run's files and folders lies at the top, and each is what its name says."""
    _refuse_foreign([name for name in names if not contents.belongs_at_top(name)], path)
    device = os.fstat(folder).st_dev
    for name in names:
        try:
            status = os.stat(name, dir_fd=folder, follow_symlinks=False)
        except FileNotFoundError:  # a temporary file that got its name meanwhile
            continue
        wrong = _wrong_kind(folder, name, status)
        if not wrong and status.st_dev != device:
            wrong = "the root of another file system"
        if wrong:
            raise NotProven(
                f"is {wrong}, which no run has",
                where=str(path / name),
                hint="move it away, or delete the run's folder by hand",
            )


def _prove_folders(run: Path) -> None:
    """Nothing but what the engine makes lies in a run's folders, such as a model that was trained further.

    Only of ``cache`` it is promised that all of it may go. A link is only a name: what it leads to stays.
    """
    for name in (*MADE_WITH_A_RUN, "checkpoints/objects"):
        try:
            inside = names_in(run / name, run)
        except (FileNotFoundError, NotADirectoryError):
            continue
        _refuse_foreign([one for one in inside if not contents.belongs_in(name, one)], run / name)


def _refuse_foreign(names: Sequence[str], place: Path) -> None:
    if names:
        them = "it" if len(names) == 1 else "them"
        raise NotProven(
            f"holds what no run has: {shown(names)}",
            where=str(place),
            hint=f"move {them} away, or delete the folder by hand",
        )


def _runs_inside(path: Path) -> Iterator[Path]:
    """Other runs in the folders of a run, made while somebody was in one of them; links are not followed."""
    waiting = [path / name for name in contents.FOLDERS]
    while waiting:
        place = waiting.pop()
        try:
            with os.scandir(place) as entries:
                folders = [place / entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
        except OSError:  # gone meanwhile
            continue
        yield from filter(is_run, folders)
        waiting += folders


def _wrong_kind(folder: int, name: str, status: os.stat_result) -> str:
    """What an entry is, in words, where it is not what its name says; else empty.

    A folder in the place of a file is what some accident left; as long as it is empty nobody misses it.
    """
    if stat.S_ISDIR(status.st_mode) if name in contents.FOLDERS else stat.S_ISREG(status.st_mode):
        return ""
    if stat.S_ISDIR(status.st_mode):
        with opened_inner(name, folder) as inner:
            return "a folder" if os.listdir(inner) else ""
    return kind_of(status.st_mode)


def _unknown_fields(tree: Mapping[str, Any], section: type[Section], prefix: str = "") -> Iterator[str]:
    fields = field_types(section)
    for key, value in tree.items():
        if key not in fields:
            yield prefix + key
        elif is_section(fields[key]) and isinstance(value, Mapping):
            yield from _unknown_fields(value, fields[key], f"{prefix}{key}.")
