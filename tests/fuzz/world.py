"""What surrounds a victim: the user's other files, a secret, and a place where nothing may ever appear.

    world/
      home/        the user's home folder, with the start-up files of a shell
      secret/      files with a token that no output and no other file may ever hold
      elsewhere/   a folder of somebody else's, which a link may lead to
      runs/        the victim, a finished run beside it, and a folder that is no run
      models/  texts/  configs/  cache/  work/
      CANARY       made by any command that is hidden in a victim: it must not exist

Everything but the victim is compared before and after every operation: content, times, what a folder lists.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

TOKEN = "TOKEN-b7c1f09e5d3a4c"
"""Stands for a private key."""
VICTIM = "20260102-0000-tiny-llama-w3g32-cafe"
NEIGHBOUR = "20260101-0000-tiny-llama-w3g32-beef"
VICTIMS = ("finished", "stopped", "crashed")
"""States of the run that is mutated."""


@dataclass(frozen=True)
class World:
    """The paths of one world."""

    root: Path

    @property
    def home(self) -> Path:
        return self.root / "home"

    @property
    def secret(self) -> Path:
        return self.root / "secret"

    @property
    def elsewhere(self) -> Path:
        return self.root / "elsewhere"

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    @property
    def run(self) -> Path:
        return self.runs / VICTIM

    @property
    def model(self) -> Path:
        return self.root / "models" / "tiny"

    @property
    def gguf(self) -> Path:
        return self.root / "models" / "tiny.gguf"

    @property
    def texts(self) -> Path:
        return self.root / "texts"

    @property
    def configs(self) -> Path:
        return self.root / "configs"

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    @property
    def work(self) -> Path:
        return self.root / "work"

    @property
    def canary(self) -> Path:
        return self.root / "CANARY"

    def reset(self, template: Path, victim: str) -> None:
        """A fresh world whose victim is the run in the state ``victim``."""
        remove(self.root)
        shutil.copytree(template / "world", self.root, symlinks=True)
        shutil.copytree(template / victim, self.run, symlinks=True)

    def untouchable(self) -> list[Path]:
        """What no operation on the victim may change."""
        return [self.home, self.secret, self.elsewhere, self.runs / NEIGHBOUR, self.runs / "notes"]

    def environment(self) -> dict[str, str]:
        """Of a user who lives here; without a network, a terminal or anything of ours."""
        kept = {
            name: os.environ[name] for name in ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH") if name in os.environ
        }
        return {
            **kept,
            "HOME": str(self.home),
            "EQAT_CACHE_DIR": str(self.cache),
            "HF_HOME": str(self.cache / "hub"),
            "TERM": "dumb",
            "LANG": "C.UTF-8",
            "OMP_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }


def furnish(world: World) -> None:
    """Make everything that is no victim."""
    for folder in (
        world.home,
        world.secret,
        world.elsewhere,
        world.runs / "notes",
        world.texts,
        world.configs,
    ):
        folder.mkdir(parents=True)
    for folder in (world.cache, world.work):
        folder.mkdir()
    (world.home / ".bashrc").write_text("umask 022\n")
    (world.home / ".profile").write_text("export EDITOR=vi\n")
    (world.secret / "key").write_text(f"-----BEGIN PRIVATE KEY-----\n{TOKEN}\n-----END PRIVATE KEY-----\n")
    (world.secret / "key.json").write_text(f'{{"name": "{TOKEN}", "id": "{TOKEN}", "text": "{TOKEN}"}}\n')
    (world.secret / "key.jsonl").write_text(f'{{"text": "{TOKEN}"}}\n' * 3)
    (world.secret / "key.toml").write_text(f'name = "{TOKEN}"\ndescription = "{TOKEN}"\n')
    (world.runs / "notes" / "plan.txt").write_text("what was tried, and why\n")
    (world.runs / "notes" / ".hidden").write_text("not a run\n")
    place = world.elsewhere
    for name in ("config.toml", "CURRENT", "data.txt", "x.tmp", "model.safetensors", "events.jsonl"):
        (place / name).write_text(f"somebody else's {name}\n")
    for name in (".CURRENT.1.0000abcd.tmp", f"{'a' * 64}.safetensors", "generation-000001.json", "full.bin"):
        (place / name).write_text(f"somebody else's {name}\n")
    (place / "gptq_v2.partial").mkdir()
    (place / "gptq_v2.partial" / "model.safetensors").write_text("somebody else's half a model")
    (place / "objects").mkdir()
    (place / "objects" / f"{'b' * 64}.safetensors").write_text("somebody else's weights\n")


# -- comparing -----------------------------------------------------------------------------------------


def snapshot(places: Iterable[Path]) -> dict[str, tuple[object, ...]]:
    """Every entry below ``places``: its kind, its times, its content. A lock's time tells only who looked."""
    found: dict[str, tuple[object, ...]] = {}
    for place in places:
        for folder, names, files in os.walk(place, followlinks=False):
            for name in (".", *names, *files):
                path = Path(folder, name)
                if name != "lock":
                    found[str(path)] = _entry(path)
    return found


def _entry(path: Path) -> tuple[object, ...]:
    status = path.lstat()
    if stat.S_ISREG(status.st_mode):
        content: str = hashlib.sha256(path.read_bytes()).hexdigest()
    else:
        content = os.readlink(path) if stat.S_ISLNK(status.st_mode) else ""
    return status.st_mode, status.st_mtime_ns, content


def differences(before: dict[str, tuple[object, ...]], after: dict[str, tuple[object, ...]]) -> list[str]:
    """Paths that appeared, vanished or changed."""
    return sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))


def holding_token(world: World) -> list[str]:
    """Files outside of the secret that hold the token."""
    found = []
    for folder, names, files in os.walk(world.root, followlinks=False):
        if Path(folder) == world.root:
            names.remove("secret")
        for path in (Path(folder, name) for name in files):
            try:
                if stat.S_ISREG(path.lstat().st_mode) and TOKEN.encode() in path.read_bytes():
                    found.append(str(path))
            except OSError:
                continue
    return found


def remove(folder: Path) -> None:
    """Delete a world, whatever lies in it; links are not followed."""
    if folder.is_symlink() or not folder.is_dir():
        folder.unlink(missing_ok=True)
        return
    shutil.rmtree(folder)
