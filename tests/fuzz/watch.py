"""Who looks at what lies outside: every opening of a file in the watched folders, seen by the kernel.

Python's audit hooks would miss readers written in Rust or C++ (safetensors, tokenizers, Arrow); inotify sees
them all.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterable
from pathlib import Path

_IN_OPEN, _IN_ISDIR = 0x20, 0x40000000
_NONBLOCK = os.O_NONBLOCK | os.O_CLOEXEC
_libc = ctypes.CDLL(None, use_errno=True)


class Openings:
    """Files below some folders that were opened since it was made."""

    def __init__(self, folders: Iterable[Path]) -> None:
        self._fd = _libc.inotify_init1(_NONBLOCK)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "inotify is not there")
        self._places: dict[int, str] = {}
        for folder in folders:
            for place, _, _ in os.walk(folder):
                watch = _libc.inotify_add_watch(self._fd, os.fsencode(place), _IN_OPEN)
                self._places[watch] = place

    def take(self) -> list[str]:
        """What was opened since the last call; folders that were only listed are left out."""
        found = set()
        while True:
            try:
                data = os.read(self._fd, 1 << 16)
            except BlockingIOError:
                return sorted(found)
            while data:
                watch, mask, _, length = struct.unpack_from("iIII", data)
                name = data[16 : 16 + length].rstrip(b"\0")
                if name and not mask & _IN_ISDIR:
                    found.add(os.path.join(self._places.get(watch, "?"), os.fsdecode(name)))
                data = data[16 + length :]

    def close(self) -> None:
        os.close(self._fd)
