"""A progress that listens: what a method reported, and switches to make it due or stop."""

from __future__ import annotations

from typing import Any

from engine.run.errors import StopRequested


class Heard:
    def __init__(self, due: bool = False, stop_at: int | None = None) -> None:
        self.metrics: list[dict[str, Any]] = []
        self.warnings: list[tuple[str, str]] = []
        self.boundaries = 0
        self._due, self._stop_at = due, stop_at

    def due(self) -> bool:
        return self._due

    def metric(self, **values: Any) -> None:
        self.metrics.append(values)

    def warning(self, code: str, message: str, hint: str = "") -> None:
        self.warnings.append((code, message))

    def checkpoint_requested(self) -> None:
        self.boundaries += 1
        if self.boundaries == self._stop_at:
            raise StopRequested
