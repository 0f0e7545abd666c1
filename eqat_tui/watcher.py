"""The thread that reads the current run for the app, and tells it when something has changed."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from textual.message import Message

from eqat_tui.feed import Feed, RunView

POLL_S = 0.5
"""Files are looked at twice a second, and never more is drawn."""


class Looked(Message):
    """The reading thread has a new view of the current run."""

    def __init__(self, feed: Feed, view: RunView) -> None:
        self.feed, self.view = feed, view
        super().__init__()


class Watcher(threading.Thread):
    """Reads the current run. A daemon: a network file system that hangs must not keep the app from ending."""

    def __init__(self, feed: Feed, post: Callable[[Looked], Any]) -> None:
        super().__init__(name="watcher", daemon=True)
        self._feed, self._post = feed, post
        self._wake = threading.Event()
        self._over = False

    def look_now(self) -> None:
        """Read at once and not at the next turn."""
        self._wake.set()

    def end(self) -> None:
        """Read no more."""
        self._over = True
        self._wake.set()

    def run(self) -> None:
        last: RunView | None = None
        while not self._over:
            with without_collection() if last is None else nullcontext():
                view = self._feed.poll()
            if last is None or not _same(last, view):
                self._post(Looked(self._feed, view))
            last = view
            self._wake.wait(POLL_S)
            self._wake.clear()


@contextmanager
def without_collection() -> Iterator[None]:
    """A long log makes events by the hundred thousand and no garbage; to look for it costs a fifth."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _same(one: RunView, other: RunView) -> bool:
    """Whether nothing has happened; the clock alone is nothing, except for an engine that is silent or that
    has not begun with anything yet."""
    return (
        (
            one.state is other.state
            or (one.state.event_count, one.at_work.status) == (other.state.event_count, other.at_work.status)
        )
        and (one.liveness, one.place, one.job, one.requests, one.replay, one.problem, one.trouble)
        == (
            other.liveness,
            other.place,
            other.job,
            other.requests,
            other.replay,
            other.problem,
            other.trouble,
        )
        and not one.hung
    )
