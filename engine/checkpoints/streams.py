"""Activation streams on the disk, so that a resumed run need not compute them again.

After a block both streams stand at a border between two blocks. There they can be written down, each into one
raw file whose SHA-256 goes into the checkpoint; the pair of the border before is deleted once that checkpoint
is published. A stream that is read back has the bits it had. One that cannot be (deleted, damaged, another
dtype) is no loss: the streams are computed from the text again, by the code that computed them first, and
come out the same.

Whether writing is worth its time and its disk is the plan's to say (``engine.plan.recovery_model``): a fast
GPU computes faster than a disk writes.
"""

from __future__ import annotations

import errno
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.checkpoints.tensorfile import tensor_bytes
from engine.data.activations import ActivationStore
from engine.run.contents import is_stream
from engine.run.removal import remove_file
from engine.system.files import atomic_write, disk_error
from engine.system.guarded import BadFile, open_regular, opened_folder

PIECE_BYTES = 64 << 20


@dataclass(frozen=True)
class StoredStreams:
    """Streams that were written at one border: what the checkpoint remembers of them."""

    border: int
    """Blocks that they have passed."""
    shape: list[int]
    dtype: str
    sha256: dict[str, str]
    """By the stream's name."""
    bytes: int
    seconds: float

    @classmethod
    def from_fact(cls, fact: Any) -> StoredStreams | None:
        """None for a run that has none. The types were checked when the checkpoint was read."""
        return None if fact is None else cls(**fact)

    def file(self, folder: Path, name: str) -> Path:
        """Where a stream lies."""
        return folder / f"streams-{self.border:03d}-{name}.raw"


def write_streams(
    folder: Path, border: int, streams: Mapping[str, ActivationStore], poll: Callable[[], None] = lambda: None
) -> StoredStreams:
    """Write ``streams``, all of one shape, as they stand at ``border``; durable when this returns.

    ``poll`` is called between two pieces and may raise. Whatever is raised, nothing is left behind.
    """
    began = time.monotonic()
    first = next(iter(streams.values()))
    stored = StoredStreams(border, list(first.shape), str(first.dtype), {}, 0, 0.0)
    total = 0
    try:
        for name, stream in streams.items():
            digest = hashlib.sha256()
            atomic_write(stored.file(folder, name), _hashed(_pieces(stream, poll), digest))
            stored.sha256[name] = digest.hexdigest()
            total += stream.nbytes
    except BaseException:
        for name in streams:
            stored.file(folder, name).unlink(missing_ok=True)
        raise
    return StoredStreams(border, stored.shape, stored.dtype, stored.sha256, total, time.monotonic() - began)


def read_streams(
    folder: Path,
    stored: StoredStreams,
    streams: Mapping[str, ActivationStore],
    poll: Callable[[], None] = lambda: None,
) -> str:
    """Fill ``streams`` with what was written; empty when they have it, else why they do not.

    A stream that was not read whole holds anything: it has to be computed.
    """
    for name, stream in streams.items():
        if [list(stream.shape), str(stream.dtype)] != [stored.shape, stored.dtype]:
            return f"{name}: it was stored as {stored.dtype} {stored.shape}"
        path = stored.file(folder, name)
        digest = hashlib.sha256()
        try:
            with os.fdopen(open_regular(path), "rb") as file:
                for start, rows in _slices(stream):
                    poll()
                    data = bytearray(stream.nbytes // len(stream) * rows)
                    if file.readinto(data) != len(data):
                        return f"{path.name} is too short"
                    digest.update(data)
                    values = torch.frombuffer(data, dtype=stream.dtype).view(rows, *stream.shape[1:])
                    stream.write(start, values)
        except OSError as error:
            return f"{path.name}: {error.strerror}"
        except BadFile as error:
            return f"{path.name}: {error.message}"
        if digest.hexdigest() != stored.sha256.get(name):
            return f"{path.name}: its checksum does not match"
    return ""


def delete_streams(folder: Path, *, keep: StoredStreams | None = None) -> None:
    """Remove the files of all borders but one.

    ``folder`` lies in a run; where it is a link that leads out of there, nothing is removed.
    """
    kept = set() if keep is None else {keep.file(folder, name).name for name in keep.sha256}
    try:
        with opened_folder(folder, folder.parent) as opened:
            for name in os.listdir(opened):
                if is_stream(name) and name not in kept:
                    remove_file(opened, name)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            raise disk_error(error, folder) from error


def _slices(stream: ActivationStore) -> Iterator[tuple[int, int]]:
    """First row and number of rows of pieces that are neither tiny nor huge."""
    rows = max(1, PIECE_BYTES * len(stream) // stream.nbytes)
    for start in range(0, len(stream), rows):
        yield start, min(rows, len(stream) - start)


def _pieces(stream: ActivationStore, poll: Callable[[], None]) -> Iterator[memoryview]:
    for start, rows in _slices(stream):
        poll()
        yield tensor_bytes(stream.read(slice(start, start + rows)))


def _hashed(pieces: Iterator[memoryview], digest: Any) -> Iterator[memoryview]:
    for piece in pieces:
        digest.update(piece)
        yield piece
