"""What happened in a run: a closed set of events, one JSON object a line, appended and never changed.

Every line carries the same envelope: format version ``v``, sequence number ``seq`` (continues over
attempts; a gap means that lines were lost), ``attempt``, wall clock ``t`` and monotonic clock ``mono`` in
seconds (comparable within one attempt only), and the ``kind`` that selects the payload.

The log outlives crashes, full disks and newer programs, so the two sides are unequal on purpose. The
writer never raises into a training loop: what cannot be written is counted. The reader never fails on what
it finds: it stops at the last newline, skips bad lines and unknown kinds, and ignores unknown fields.
"""

from __future__ import annotations

import errno
import functools
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import msgspec

from engine.run.events import (
    VERSION,
    AnyEvent,
    Event,
    Metric,
)
from engine.system.files import disk_error
from engine.system.guarded import open_regular
from engine.system.log_bytes import tail, whole_lines

METRIC_INTERVAL_S = 0.25
"""Metrics of one phase and block come at most this often, apart from its first and last."""

TAIL_BYTES = 1 << 16
"""Of the end of a log: enough to know how the last attempt ended, unless a line in it is longer."""
LONGEST_TAIL_BYTES = 1 << 26

_decoder: msgspec.json.Decoder[AnyEvent] = msgspec.json.Decoder(AnyEvent)
_BEGINNINGS = (b'{"kind":"attempt.starting"', b'{"kind":"run.started"')
_E = TypeVar("_E", bound=Event)
_S = TypeVar("_S", bound=msgspec.Struct)


# -- writing -------------------------------------------------------------------------------------------


def encode(event: Event) -> bytes:
    """One line without its newline. NaN and infinities become null and set the ``non_finite`` flag."""
    try:
        return _encoder.encode(_finite(event))
    except UnicodeEncodeError:
        # A file name that is not UTF-8 reaches Python as lone surrogates, which JSON cannot carry.
        return _encoder.encode(_printable(msgspec.to_builtins(event, enc_hook=_plain)))


def _plain(value: Any) -> Any:
    """Numbers of numpy or torch as Python's; anything else by its text, rather than losing the line."""
    item = getattr(value, "item", None)
    if callable(item):
        try:
            return item()
        except (TypeError, ValueError, RuntimeError):
            pass
    return str(value)


_encoder = msgspec.json.Encoder(enc_hook=_plain)


_fields = functools.cache(msgspec.structs.fields)


def _finite(event: _E) -> _E:
    """``event`` with numbers that JSON cannot hold replaced, so that every reader can decode the line."""
    changes: dict[str, Any] = {}
    for field in _fields(type(event)):
        value = getattr(event, field.name)
        if isinstance(value, float) and not math.isfinite(value):
            changes[field.name] = 0.0 if field.type is float else None
        elif field.type == dict[str, float]:
            kept = {name: number for name, number in value.items() if math.isfinite(number)}
            if len(kept) < len(value):
                changes[field.name] = kept
        elif isinstance(value, msgspec.Struct):
            held = _held(value)
            if held is not value:
                changes[field.name] = held
        elif isinstance(value, tuple | list) and any(isinstance(one, msgspec.Struct) for one in value):
            parts = [_held(one) for one in value]
            if any(part is not one for part, one in zip(parts, value, strict=True)):
                changes[field.name] = type(value)(part for part in parts if part is not None)
    if not changes:
        return event
    if isinstance(event, Metric):
        changes["non_finite"] = True
    return msgspec.structs.replace(event, **changes)


def _held(part: _S) -> _S | None:
    """A part of an event, without what of it JSON cannot hold; none where it must have such a number: it says
    nothing without it, and 0 would say what is not so."""
    changes: dict[str, Any] = {}
    for field in _fields(type(part)):
        value = getattr(part, field.name)
        if field.type is float and not math.isfinite(value):
            return None
        if isinstance(value, msgspec.Struct):
            held = _held(value)
            if held is not value:
                changes[field.name] = held
    return msgspec.structs.replace(part, **changes) if changes else part


def _printable(tree: Any) -> Any:
    if isinstance(tree, str):
        return tree.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(tree, dict):
        return {_printable(key): _printable(value) for key, value in tree.items()}
    return [_printable(value) for value in tree] if isinstance(tree, list) else tree


class EventWriter:
    """Appends events of one attempt to ``events.jsonl``; safe to use from several threads.

    Opening may raise what :func:`disk_error` makes of an :class:`OSError`, or :class:`BadFile` (nothing has
    been computed yet); after that, nothing does.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        attempt: int,
        *,
        rank: int = 0,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.path = Path(path)
        self.attempt = attempt
        self.rank = rank
        self.dropped = 0
        self._clock = clock
        self._monotonic = monotonic
        # A telemetry thread and the training loop write to the same log; re-entrant, because a signal
        # may interrupt an emit and its handler's cleanup may want to say so.
        self._lock = threading.RLock()
        self._waiting: Metric | None = None
        self._series: tuple[str, int | None] | None = None
        self._last_metric = -math.inf
        try:
            self._seq, self._torn = _log_end(self.path)
            self._fd = open_regular(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        except OSError as error:
            raise disk_error(error, self.path) from error

    def emit(self, event: Event) -> None:
        """Write ``event``; of metrics that come faster than four a second, the latest.

        Of several processes that train together only the first (rank 0) speaks.
        """
        if self.rank:
            return
        with self._lock:
            if isinstance(event, Metric):
                self._emit_metric(event)
            else:
                self._write_waiting()
                self._write(event)

    def flush(self) -> None:
        """Write the metric that was held back, if there is one."""
        with self._lock:
            self._write_waiting()

    def close(self) -> None:
        """Flush and close; emitting afterwards counts as dropped."""
        with self._lock:
            if self._fd >= 0:
                self._write_waiting()
                os.close(self._fd)
                self._fd = -1

    def __enter__(self) -> EventWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _emit_metric(self, metric: Metric) -> None:
        series = (metric.phase, metric.block)
        first = series != self._series
        if first:
            self._write_waiting()
        elif self._waiting is not None and self._waiting.non_finite:
            metric = msgspec.structs.replace(metric, non_finite=True)
        now = self._monotonic()
        self._series = series
        # A validation loss comes once an epoch; the step after it must not take its place.
        if first or metric.val_loss is not None or now - self._last_metric >= METRIC_INTERVAL_S:
            self._waiting = None
            self._last_metric = now
            self._write(metric)
        else:
            # The clocks of a metric that is written later are those of its step.
            self._waiting = msgspec.structs.replace(_finite(metric), t=self._clock(), mono=now)

    def _write_waiting(self) -> None:
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            self._last_metric = self._monotonic()
            self._write(waiting)

    def _write(self, event: Event) -> None:
        self._seq += 1
        try:
            line = encode(
                msgspec.structs.replace(
                    event,
                    v=VERSION,
                    seq=self._seq,
                    attempt=self.attempt,
                    t=event.t or self._clock(),
                    mono=event.mono or self._monotonic(),
                )
            )
            data = (b"\n" if self._torn else b"") + line + b"\n"
            written = os.write(self._fd, data) if self._fd >= 0 else 0
        except (OSError, TypeError, ValueError, OverflowError, RecursionError):
            self.dropped += 1
            return
        if written < len(data):
            # A disk that fills up takes the beginning of a line. The next line starts on a new one.
            self._torn = self._torn if written == 0 else True
            # One that lacks only its newline gets it with the next line, and is read like any other.
            self.dropped += written < len(data) - 1
        else:
            self._torn = False


def _log_end(path: Path) -> tuple[int, bool]:
    """The last sequence number in a log, and whether its last line is torn."""
    window = TAIL_BYTES
    while True:
        try:
            end, whole = tail(path, window)
        except FileNotFoundError:
            return 0, False
        events = parse_lines(end)
        if events or whole or window >= LONGEST_TAIL_BYTES:
            last = max((event.seq for event in events), default=0)
            return last, bool(end) and not end.endswith(b"\n")
        window *= 16


# -- reading -------------------------------------------------------------------------------------------


def parse_lines(data: bytes, skip: frozenset[str] = frozenset(), *, last: bool = False) -> list[AnyEvent]:
    """The events in ``data``, which may hold anything. ``skip`` names kinds that are not wanted.

    The writer puts ``kind`` first, so unwanted lines (metrics are nine in ten) are passed over undecoded.
    With ``last`` the one is wanted after which ``data`` ends or an attempt begins: only its clock tells how
    long an attempt worked that was cut off there.
    """
    unwanted = tuple(f'{{"kind":"{kind}"'.encode() for kind in sorted(skip))
    events: list[AnyEvent] = []
    passed = b""
    for line in data.split(b"\n"):
        if not line:
            continue
        if unwanted and line.startswith(unwanted):
            passed = line
            continue
        if passed and last and line.startswith(_BEGINNINGS):
            events += _decoded(passed)
        passed = b""
        events += _decoded(line)
    return [*events, *_decoded(passed)] if passed and last else events


def _decoded(line: bytes) -> tuple[AnyEvent, ...]:
    """An event; none of half a line, another program's line, or a kind from the future."""
    try:
        return (_decoder.decode(line),)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return ()


def read_events(
    path: str | os.PathLike[str],
    offset: int = 0,
    *,
    skip: frozenset[str] = frozenset(),
    last: bool = False,
) -> tuple[list[AnyEvent], int]:
    """Events in the complete lines from byte ``offset`` on, and the offset to continue from; ``skip`` and
    ``last`` as :func:`parse_lines` takes them."""
    events: list[AnyEvent] = []
    try:
        for found, behind in event_pieces(path, offset, skip=skip, last=last):
            events += found
            offset = behind
    except FileNotFoundError:
        pass
    return events, offset


def event_pieces(
    path: str | os.PathLike[str],
    offset: int = 0,
    *,
    skip: frozenset[str] = frozenset(),
    last: bool = False,
) -> Iterator[tuple[list[AnyEvent], int]]:
    """The same piece by piece, for whoever need not have all events at once; :class:`FileNotFoundError` where
    there is no log."""
    for lines, behind in whole_lines(Path(path), offset):
        yield parse_lines(lines, skip, last=last), behind


def tail_events(
    path: str | os.PathLike[str],
    until: Callable[[list[AnyEvent]], bool] = bool,
    *,
    skip: frozenset[str] = frozenset(),
) -> list[AnyEvent]:
    """Events at the end of the log: so many, in ever larger pieces of it, that ``until`` is content.

    By default there is one. Where the log has no such end, the last 64 MiB of it are looked at.
    """
    window = TAIL_BYTES
    while True:
        try:
            end, whole = tail(Path(path), window)
        except FileNotFoundError:
            return []
        events = parse_lines(end[: end.rfind(b"\n") + 1], skip)
        if whole or window >= LONGEST_TAIL_BYTES or until(events):
            return events
        window *= 16


class EventFollower:
    """Reads a log as it grows: each :meth:`poll` returns what is new since the last."""

    def __init__(self, path: str | os.PathLike[str], offset: int = 0) -> None:
        self.path = Path(path)
        self.offset = offset

    def poll(self) -> list[AnyEvent]:
        """New complete events; an empty list when there are none, or no log yet."""
        try:
            events, self.offset = read_events(self.path, self.offset)
        except OSError as error:
            if error.errno in (errno.ESTALE, errno.EIO):  # a network file system that hiccups
                return []
            raise
        return events
