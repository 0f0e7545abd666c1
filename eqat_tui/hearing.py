"""Signals that are heard for a while by somebody, and afterwards by whoever heard them before."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


@contextmanager
def hearing(handlers: Mapping[int, Any]) -> Iterator[None]:
    """Inside, each of these signals goes to its handler; the last one is set last."""
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
