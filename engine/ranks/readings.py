"""What the machine is doing for every process of a run: each says it where all meet, and the first one writes
it into the run with its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from engine.run.events import Memory, RankReading

FIELDS = tuple(name for name in RankReading.__struct_fields__ if name not in ("rank", "waited"))
"""Of a reading, those that differ between ranks."""


def reading_key(rank: int) -> str:
    """Under which a process says it."""
    return f"eqat/reading/{rank}"


def of_rank(reading: Memory, rank: int, waited: float | None) -> RankReading:
    """A process's own reading, as one of several; ``waited`` is how long it last waited for the others."""
    values = {name: getattr(reading, name) for name in FIELDS}
    return RankReading(rank=rank, waited=waited, **values)


def telling(store: Any, rank: int, waited: Callable[[], float | None]) -> Callable[[Memory], None]:
    """What another process than the first does with its readings."""

    def tell(reading: Memory) -> None:
        said = msgspec.json.encode(of_rank(reading, rank, waited())).decode()
        try:
            store.set(reading_key(rank), said)
        except RuntimeError:
            pass  # the first process is gone, which another thread notices

    return tell


def hearing(
    store: Any, size: int, waited: Callable[[], float | None], emit: Callable[[Memory], None]
) -> Callable[[Memory], None]:
    """What the first process does with its readings: the others' go along. One that has said nothing yet is
    left out."""

    def hear(reading: Memory) -> None:
        ranks = [of_rank(reading, 0, waited())]
        for rank in range(1, size):
            try:
                if store.check([reading_key(rank)]):
                    ranks.append(msgspec.json.decode(store.get(reading_key(rank)), type=RankReading))
            except (RuntimeError, msgspec.MsgspecError):
                continue  # it ends, which another thread notices
        emit(msgspec.structs.replace(reading, ranks=tuple(ranks)))

    return hear
