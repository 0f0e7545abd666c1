"""Putting something else where a file or a folder was: a link, a FIFO, a socket, a folder, nothing."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from random import Random

import hostile
from hostile import short
from odd_files import make_socket
from world import World, remove

FOR_FILES = (
    "a link to a secret",
    "a link to a secret",
    "a dangling link",
    "a link to /dev/zero",
    "a link to a FIFO",
    "a link to itself",
    "a hard link to somebody's file",
    "a FIFO",
    "a socket",
    "a folder",
    "nothing",
)
FOR_FOLDERS = (
    "a link to somebody's folder",
    "a link to somebody's folder",
    "a link to somebody's folder",
    "a dangling link",
    "a link to itself",
    "a link to /",
    "a FIFO",
    "a file",
    "nothing",
)


def displace(path: Path, world: World, chance: Random) -> str:
    """Replace ``path`` by something of another kind; what it is now, in words."""
    kinds = FOR_FOLDERS if path.is_dir() and not path.is_symlink() else FOR_FILES
    return put(chance.choice(kinds), path, world, chance)


def put(kind: str, path: Path, world: World, chance: Random) -> str:
    """Put something of this kind under the name ``path``, replacing what is there."""
    if os.path.lexists(path):
        remove(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    targets = {
        "a link to a secret": hostile.secret_for(world, path, chance),
        "a dangling link": world.home / "made-through-a-link",
        "a link to /dev/zero": Path("/dev/zero"),
        "a link to a FIFO": world.work / "fifo",
        "a link to itself": path,
        "a link to somebody's folder": world.elsewhere,
        "a link to /": Path("/"),
    }
    if kind == "a link to a FIFO" and not targets[kind].exists():
        os.mkfifo(targets[kind])
    if kind in targets:
        path.symlink_to(targets[kind])
    elif kind == "a hard link to somebody's file":
        os.link(world.elsewhere / "data.txt", path)
    elif kind == "a FIFO":
        os.mkfifo(path)
    elif kind == "a socket":
        make_socket(path)
    elif kind == "a folder":
        path.mkdir()
    elif kind == "a file":
        path.write_bytes(b"{}")
    return f"{path.relative_to(world.root)} is {kind}"


def exchange(first: Path, second: Path, world: World) -> str:
    """Swap two files."""
    between = first.with_name("between")
    first.rename(between)
    second.rename(first)
    between.rename(second)
    return f"{first.relative_to(world.root)} and {second.name} are swapped"


def misname(path: Path, world: World, chance: Random) -> str:
    """Give a file another name, or put a copy beside it under one."""
    name = chance.choice(hostile.names(world))
    if path.is_dir() or chance.random() < 0.5:
        path.rename(path.with_name(name))
        return f"{path.name} is called {short(name)}"
    shutil.copyfile(path, path.with_name(name))
    return f"a copy of {path.name} is called {short(name)}"


def entries(folder: Path) -> list[Path]:
    """Everything below ``folder``, in order; links are not followed."""
    found = []
    for place, folders, files in os.walk(folder, followlinks=False):
        folders.sort()
        found += [Path(place, name) for name in sorted((*folders, *files))]
    return found


def regular_files(folder: Path) -> list[Path]:
    """Regular files below ``folder``, in order."""
    return [path for path in entries(folder) if path.is_file() and not path.is_symlink()]
