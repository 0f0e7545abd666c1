"""The most memory that processes have held: of several that compute a run together, each one's."""

from __future__ import annotations

from engine.run.events import Memory, RankPeaks


def larger(*values: int | None) -> int | None:
    """The largest that is known; none where nothing is."""
    return max((value for value in values if value is not None), default=None)


def larger_of_each(one: tuple[RankPeaks, ...], other: tuple[RankPeaks, ...]) -> tuple[RankPeaks, ...]:
    """Of every process, in their order."""
    found: dict[int, RankPeaks] = {}
    for peaks in (*one, *other):
        before = found.get(peaks.rank, peaks)
        found[peaks.rank] = RankPeaks(
            rank=peaks.rank,
            peak_gpu_bytes=larger(before.peak_gpu_bytes, peaks.peak_gpu_bytes),
            peak_host_bytes=larger(before.peak_host_bytes, peaks.peak_host_bytes),
        )
    return tuple(found[rank] for rank in sorted(found))


def of_reading(reading: Memory) -> tuple[RankPeaks, ...]:
    """Those that a reading of several processes tells."""
    return tuple(
        RankPeaks(rank=one.rank, peak_gpu_bytes=one.gpu_peak, peak_host_bytes=one.host_peak)
        for one in reading.ranks
    )
