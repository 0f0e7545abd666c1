"""What the app's tests share: a fixed clock and working directory, recorded runs, and pictures to compare."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from app_tools import SNAPSHOTS
from logs import RECORDED, make_run

from engine.run.directory import RunDirectory


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory of its own, UTC, and none of the user's variables."""
    monkeypatch.chdir(tmp_path)
    for name in ("NO_COLOR", "COLORTERM", "COLORFGBG", "EQAT_RUNS_DIR", "EQAT_THEME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield tmp_path
    monkeypatch.undo()
    time.tzset()


@pytest.fixture
def recorded(tmp_path: Path) -> Callable[[str], RunDirectory]:
    """A run on disk with the recorded log of that name."""
    return lambda name: make_run(
        tmp_path / "runs", RECORDED[name], name=f"20251124-1600-tiny-llama-w4g32-{name[:4]}"
    )


@pytest.fixture
def same_picture(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compare a picture with the one in ``snapshots/``; ``EQAT_UPDATE_SNAPSHOTS=1`` writes it instead."""

    def compare(name: str, picture: str) -> None:
        path = SNAPSHOTS / f"{name}.txt"
        text = picture.rstrip("\n") + "\n"
        if os.environ.get("EQAT_UPDATE_SNAPSHOTS"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert path.exists(), f"no snapshot {path.name}: EQAT_UPDATE_SNAPSHOTS=1 makes it, look at it"
        assert text == path.read_text(encoding="utf-8")

    return compare
