"""The app on a run of another machine: a stand-in for ssh runs here what is to be run there."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from app_tools import app_of, drive, picture, press, settled, shown, told, until, view_of
from remote_tools import EQAT_THERE, Elsewhere
from textual.pilot import Pilot

from engine.run import control
from engine.run.directory import RunDirectory
from engine.run.lock import RunLock
from engine.run.status import Status, write_status
from eqat_tui.app import EqatApp
from eqat_tui.feed import RunView
from eqat_tui.remote import mirror as mirrors
from eqat_tui.remote.mirror import attached
from eqat_tui.remote.ssh import Destination

GPU1 = Destination("gpu1", (), EQAT_THERE)
Recorded = Callable[[str], RunDirectory]


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Elsewhere:
    made = Elsewhere(tmp_path / "elsewhere")
    for name, value in made.variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("EQAT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(mirrors, "PAUSES_S", (0.1,))
    return made


def test_a_stop_is_asked_for_passed_on_and_seen_and_a_lost_connection_is_no_crash(
    elsewhere: Elsewhere, recorded: Recorded
) -> None:
    run = recorded("running")
    write_status(run, Status(phase="block_ap", heartbeat=time.time()))

    async def script(pilot: Pilot[Any], app: EqatApp) -> None:
        await shown(pilot)
        screen = await settled(pilot)
        assert "▶ running" in screen
        assert f"gpu1:{run.id}" in screen
        await press(pilot, "x", "y")
        await until(pilot, lambda: bool(control.pending(run)))
        await until(pilot, lambda: "gpu1 was asked to stop it" in told(app))
        await until(pilot, lambda: app.view is not None and app.view.asked == "stop")
        elsewhere.down(True)
        app.current().sight.hang_up()  # type: ignore[attr-defined]
        await until(pilot, lambda: "? no connection" in picture(app))
        assert "crashed" not in picture(app)
        await press(pilot, "a")
        assert "connection to gpu1 lost, trying again" in told(app)[-1]
        elsewhere.down(False)
        await until(pilot, lambda: "▶ running" in picture(app))
        await press(pilot, "3", "e")
        assert told(app)[-1] == "its files are on gpu1: ssh there for it"
        await press(pilot, "q")

    with RunLock(run.lock_path), attached(GPU1, str(run.path)) as found:
        app = app_of(found)
        drive(app, script)
        assert app.return_value == f"{run.id} goes on;\neqat attach gpu1:{run.path} shows it again"


def test_a_read_only_viewer_passes_nothing_on(elsewhere: Elsewhere, recorded: Recorded) -> None:
    run = recorded("running")

    async def script(pilot: Pilot[Any], app: EqatApp) -> None:
        await shown(pilot)
        await press(pilot, "x", "y", "a", "y", "K", "y")
        assert "--read-only" in told(app)[-1]

    with RunLock(run.lock_path), attached(GPU1, str(run.path)) as found:
        drive(app_of(found, read_only=True), script)
    assert len(elsewhere.asked()) == 1
    assert control.pending(run) == []


@pytest.mark.parametrize("size", [(80, 24), (60, 20)])
def test_a_lost_connection_says_since_when_and_what_happens_next(
    recorded: Recorded, size: tuple[int, int]
) -> None:
    run = recorded("running")
    trouble = "connection to gpu1 lost, trying again in 4 s; seen last at 18:59:02 (ssh: No route to host)"

    def view(**changes: Any) -> RunView:
        return msgspec.structs.replace(view_of(run, "running"), host="gpu1", **changes)

    async def script(pilot: Pilot[Any], app: EqatApp) -> None:
        await shown(pilot)
        screen = await settled(pilot)
        words = " ".join(screen.split())
        assert trouble in words
        assert "? no connection" in screen
        assert "▶ running" not in screen

    drive(app_of(run, view(trouble=trouble)), script, size)
