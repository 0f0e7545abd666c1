"""Which files of a model's folder may be read, judged before anything reads one.

A model's folder is somebody else's. Its files are read by us and by transformers, and some are copied into an
export that is handed on: a ``chat_template.jinja`` that links to a private key would be published, and a FIFO
called ``tokenizer.json`` would be waited for for ever. So every entry that might be read has to be a regular
file that lies, once links are followed, inside the folder or in a hub cache::

    …/models--OWNER--NAME/blobs/HASH             what the links of every snapshot lead to
    …/models--OWNER--NAME/snapshots/COMMIT/FILE  of the same repository

Everything else is refused by its name. What was judged is stamped (:mod:`engine.system.stamps`), so that
what is read later is what was judged.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import msgspec

from engine.errors import PreflightError
from engine.system.guarded import LARGE, SMALL, BadFile, bad_file, kind_of, parse_object
from engine.system.stamps import StampedFile

SUFFIXES = (
    ".json",
    ".safetensors",
    ".jinja",
    ".model",
    ".txt",
    ".tiktoken",
    ".bpe",
    ".spm",
    ".py",
)
"""Endings of files that transformers or the engine may read."""
TEMPLATES = "additional_chat_templates"
"""The one sub-folder that transformers reads."""
ASSETS = (
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tekken.json",
    "chat_template.json",
    "generation_config.json",
    "*.model",
    "*.tiktoken",
    "*.bpe",
    "*.spm",
    "*.jinja",
)
"""What decides, besides configuration and weights, what a model does: tokenizer, templates, generation."""
BESIDE = (
    "tokenizer.model.*",
    "vocab.*",
    "*.vocab",
    "merges.*",
    "encoder.json",
    "dict.txt",
    "bpe.codes",
    "normalizer.json",
)
"""Files of older or other tokenizers, which some loaders read. An export copies them with :data:`ASSETS`, but
they do not decide what a model does here, so they are no part of its identity."""
NO_TEXTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".py", ".lock")
"""What none of these files ends in, whatever it is called before that."""
HAND_WRITTEN = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.json",
    "*.jinja",
)
"""Files of at most :data:`SMALL` bytes; other assets may have :data:`LARGE`."""

DOWNLOAD_AGAIN = "download or copy this file again"
"""What to do about a file that is damaged."""


class ModelFolder(msgspec.Struct, frozen=True):
    """A model's folder whose readable files were judged and stamped."""

    path: Path
    files: dict[str, StampedFile]
    """By name; those of the sub-folder with templates have its name before theirs."""

    @classmethod
    def judge(cls, path: Path) -> ModelFolder:
        """The folder's files, each looked at and none opened.

        Raises:
            BadFile: naming the first file that may not be read, and why.
        """
        real = Path(os.path.realpath(path))
        files = {}
        for name in _names(path):
            file = _judged(path / name, real)
            if _is_copied(name) or name == "config.json":
                _refuse_size(file)
            files[name] = file
        return cls(path, files)

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def file(self, name: str) -> StampedFile:
        """NoFile where it was not there when the folder was judged."""
        return self.files[name] if name in self.files else StampedFile.of(self.path / name)

    def named(self, pattern: str) -> list[str]:
        """Names directly in the folder that match a shell pattern, sorted."""
        return sorted(name for name in self.files if "/" not in name and fnmatch(name, pattern))

    def read_object(self, name: str, limit: int = SMALL) -> dict[str, Any]:
        """One of its files as a JSON object."""
        file = self.file(name)
        return parse_object(file.read(limit), file.path)

    def assets(self) -> list[str]:
        """Names of tokenizer files, chat templates and ``generation_config.json``, sorted."""
        return sorted(filter(_is_asset, self.files))

    def copied(self) -> list[str]:
        """Names of what an export copies, sorted: :meth:`assets`, and what other loaders of the tokenizer
        read."""
        return sorted(filter(_is_copied, self.files))

    def assets_digest(self) -> str:
        """SHA-256 over names and content of :meth:`assets`."""
        digest = hashlib.sha256()
        for name in self.assets():
            content = self.files[name].read()
            digest.update(f"{name}:{len(content)};".encode(errors="surrogateescape") + content)
        return digest.hexdigest()

    def check_small_files(self) -> None:
        """IdentityError when a file other than the weights is no longer what was judged."""
        for name, file in self.files.items():
            if name == "config.json" or name.endswith(".py") or _is_copied(name):
                file.check()


NO_ASSETS = hashlib.sha256().hexdigest()
"""The digest of a model that has no such files: one in a single file, or a random one."""


def _is_asset(name: str) -> bool:
    folder, _, base = name.rpartition("/")
    return folder == TEMPLATES or any(fnmatch(base, pattern) for pattern in ASSETS)


def _is_beside(name: str) -> bool:
    return not name.endswith(NO_TEXTS) and any(fnmatch(name, pattern) for pattern in BESIDE)


def _is_copied(name: str) -> bool:
    return _is_asset(name) or _is_beside(name)


def copied_bytes(path: Path) -> int:
    """What an export copies from the folder takes so many bytes; what cannot be looked at counts nothing."""
    total = 0
    with suppress(OSError, ValueError, PreflightError):
        for name in filter(_is_copied, _names(path)):
            total += (path / name).stat().st_size
    return total


def _refuse_size(file: StampedFile) -> None:
    limit = SMALL if any(fnmatch(file.path.name, pattern) for pattern in HAND_WRITTEN) else LARGE
    if file.size > limit:
        raise BadFile(
            f"is larger than the {limit} bytes that such a file can have",
            where=str(file.path),
            hint=DOWNLOAD_AGAIN,
        )


def _names(path: Path) -> Iterator[str]:
    """Entries that may be read, the additional templates among them."""
    for name in _listed(path):
        if (name.endswith(SUFFIXES) or _is_beside(name)) and not _is_real_folder(path / name):
            yield name
        elif name == TEMPLATES:
            templates = path / name
            if not _is_real_folder(templates):
                raise _refused(templates, "is no real folder")
            yield from (f"{name}/{one}" for one in _listed(templates) if one.endswith(".jinja"))


def _listed(path: Path) -> list[str]:
    try:
        return sorted(os.listdir(path))
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError):
            raise BadFile("is no name of a folder", where=str(path)) from error
        raise bad_file(error, path) from error


def _is_real_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _judged(path: Path, folder: Path) -> StampedFile:
    """``path`` as a stamped file, if it is a regular one in a permitted place."""
    if not os.path.islink(path):
        return StampedFile.of(path)
    try:
        target = Path(os.path.realpath(path, strict=True))
    except FileNotFoundError:
        raise BadFile(
            "is a link to nothing", where=str(path), hint="put the file there, or finish the model's download"
        ) from None
    except OSError as error:
        raise bad_file(error, path) from error
    if not target.is_file():
        kind = kind_of(os.stat(target).st_mode)
        raise _refused(path, f"is a link to {kind}, not to a regular file")
    if not (target.is_relative_to(folder) or _in_hub_cache(target, folder)):
        raise _refused(path, f"is a link to a file outside of the model's folder, {target}")
    return StampedFile.of(path)


def unlinked(path: Path) -> Path:
    """The blob of a hub cache that ``path``, an entry of a snapshot there, leads to; ``path`` itself where it
    is no such link, for whoever follows no others."""
    if not os.path.islink(path):
        return path
    folder, target = Path(os.path.realpath(path.parent)), Path(os.path.realpath(path))
    snapshots = folder.parent
    is_snapshot = snapshots.name == "snapshots" and _is_repository(snapshots.parent)
    return target if is_snapshot and target.parent == snapshots.parent / "blobs" else path


def _in_hub_cache(target: Path, folder: Path) -> bool:
    """A blob of a hub cache, or a file of a snapshot of the repository that ``folder`` is one of."""
    if target.parent.name == "blobs" and _is_repository(target.parent.parent):
        return True
    snapshots = folder.parent
    return (
        snapshots.name == "snapshots"
        and _is_repository(snapshots.parent)
        and target.is_relative_to(snapshots)
    )


def _is_repository(path: Path) -> bool:
    return path.name.startswith("models--")


def _refused(path: Path, why: str) -> PreflightError:
    return BadFile(why, where=str(path), hint="copy the file itself into the folder, or remove the link")
