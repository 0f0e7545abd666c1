"""Every screen, from recorded logs, at every size that is promised, compared with pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from app_tools import MONOCHROME, PLAIN, app_of, drive, picture, press, settled, until, view_of
from logs import GIB, RECORDED, START, make_run, pure_nonsense
from textual.pilot import Pilot

from engine.plan import plan as planning
from engine.plan.machine import Machine
from engine.run import control, events
from engine.run.directory import RunDirectory
from eqat_tui import hardware
from eqat_tui.app import EqatApp
from eqat_tui.feed import Liveness
from eqat_tui.palette import Terminal
from eqat_tui.screens.memory import MemoryScreen
from eqat_tui.screens.setup import SetupScreen

SIZES = ((80, 24), (100, 30), (200, 50))
LIVENESS: dict[str, Liveness] = {
    "running": "running",
    "finished": "done",
    "stopped": "stopped",
    "resumed": "running",
    "crashed": "crashed",
    "broken": "running",
    "failed": "failed",
}
Same = Callable[[str, str], None]
Recorded = Callable[[str], RunDirectory]


def shot(
    app: EqatApp, size: tuple[int, int], ready: Callable[[str], bool], *keys: str, then: str = ""
) -> str:
    """The screen once ``ready`` holds for it and ``keys`` were pressed."""
    taken: list[str] = []

    async def script(pilot: Pilot[Any], app: EqatApp) -> None:
        await until(pilot, lambda: ready(picture(app)))
        await press(pilot, *keys)
        if then:
            await until(pilot, lambda: then in picture(app))
        taken.append(await settled(pilot))

    drive(app, script, size)
    return taken[0]


def monitor_shot(
    run: RunDirectory, liveness: Liveness, size: tuple[int, int], terminal: Terminal = PLAIN
) -> str:
    eta = 340.0 if liveness == "running" else None
    app = app_of(run, view_of(run, liveness, eta=eta), terminal=terminal)
    return shot(app, size, lambda text: "tiny-llama" in text and "machine" in text)


@pytest.mark.parametrize("name", RECORDED)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_the_monitor_shows_every_state_of_a_run(
    name: str, size: tuple[int, int], recorded: Recorded, same_picture: Same
) -> None:
    same_picture(f"monitor-{name}-{size[0]}x{size[1]}", monitor_shot(recorded(name), LIVENESS[name], size))


def test_a_hung_engine_has_its_picture(recorded: Recorded, same_picture: Same) -> None:
    run = recorded("running")
    app = app_of(run, view_of(run, "hung", eta=340.0, log_tail=("Traceback", "  nothing")))
    same_picture("monitor-hung-80x24", shot(app, (80, 24), lambda text: "no sign of life" in text))


def test_losses_that_were_never_finite_have_their_picture(tmp_path: Path, same_picture: Same) -> None:
    run = make_run(tmp_path / "runs", pure_nonsense, name="20251124-1600-tiny-llama-w4g32-nans")
    same_picture("monitor-never-finite-80x24", monitor_shot(run, "running", (80, 24)))


def test_a_request_is_shown_as_asked_and_then_as_accepted(recorded: Recorded, same_picture: Same) -> None:
    run = recorded("running")
    asked = control.Request(id="00000000000000000001-00000000", request="stop", t=START, pid=1)
    view = view_of(run, "running", eta=340.0)
    text = shot(
        app_of(run, msgspec.structs.replace(view, requests=(asked,))), (80, 24), lambda text: "asked" in text
    )
    assert "stop: asked ✓ → accepted … → done …" in text
    ack = events.ControlAck(attempt=1, request="stop", id=asked.id)
    state = msgspec.structs.replace(view.state, acknowledged=(ack,))
    text = shot(
        app_of(run, msgspec.structs.replace(view, state=state)), (80, 24), lambda text: "asked" in text
    )
    assert "stop: asked ✓ → accepted ✓ → done …" in text
    same_picture("monitor-accepted-80x24", text)


def test_a_vanished_directory_has_its_picture(recorded: Recorded, same_picture: Same) -> None:
    run = recorded("running")
    view = view_of(run, "gone", problem="the run's directory is gone")
    text = shot(app_of(run, view), (80, 24), lambda text: "is gone" in text)
    same_picture("monitor-gone-80x24", text)


def test_a_run_without_a_gpu_has_its_picture(recorded: Recorded, same_picture: Same) -> None:
    run = recorded("running")
    view = view_of(run, "running", eta=340.0)
    nothing = {name: None for name in events.Memory.__struct_fields__ if name.startswith("gpu")}
    memory = msgspec.structs.replace(view.state.memory, **nothing)
    state = msgspec.structs.replace(
        view.state, memory=memory, device="cpu (x86_64)", plan={**(view.state.plan or {}), "device": "cpu"}
    )
    app = app_of(run, msgspec.structs.replace(view, state=state))
    same_picture("monitor-cpu-80x24", shot(app, (80, 24), lambda text: "none used" in text))


def test_a_small_terminal_is_legible(recorded: Recorded, same_picture: Same) -> None:
    same_picture("monitor-running-60x20", monitor_shot(recorded("running"), "running", (60, 20)))


def test_a_small_terminal_shows_the_blocks_instead_of_the_chart(
    recorded: Recorded, same_picture: Same
) -> None:
    run = recorded("running")
    app = app_of(run, view_of(run, "running", eta=340.0))
    text = shot(app, (60, 20), lambda text: "tiny-llama" in text, "b", then="initial")
    same_picture("monitor-blocks-60x20", text)


@pytest.mark.parametrize("name", ["running", "broken", "finished"])
def test_ascii_without_colour(name: str, recorded: Recorded, same_picture: Same) -> None:
    text = monitor_shot(recorded(name), LIVENESS[name], (80, 24), MONOCHROME)
    assert text.isascii()
    same_picture(f"monitor-{name}-ascii-80x24", text)


def result_app(recorded: Recorded, terminal: Terminal = PLAIN) -> EqatApp:
    run = recorded("finished")
    view = view_of(run, "done")
    texts = {
        stage: events.Sample(stage=stage, prompt="The capital of France is", text=text, tokens=9, seconds=1.5)
        for stage, text in (("fp", " Paris, a city on the Seine."), ("e2e_qp", " Paris."))
    }
    state = msgspec.structs.replace(view.state, samples=texts)
    view = msgspec.structs.replace(view, state=state, path=f"/home/ada/runs/{run.id}")
    return app_of(run, view, mode="result", terminal=terminal)


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_the_result(size: tuple[int, int], recorded: Recorded, same_picture: Same) -> None:
    text = shot(result_app(recorded), size, lambda text: "E2E-QP" in text)
    same_picture(f"result-{size[0]}x{size[1]}", text)


def test_the_result_in_ascii(recorded: Recorded, same_picture: Same) -> None:
    text = shot(result_app(recorded, MONOCHROME), (80, 24), lambda text: "E2E-QP" in text)
    assert text.isascii()
    same_picture("result-ascii-80x24", text)


@pytest.fixture
def some_runs(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> list[RunDirectory]:
    """A finished, a stopped, a failed and a crashed run, looked at a day later."""
    monkeypatch.setattr("time.time", lambda: START + 86_400)
    return [recorded(name) for name in ("finished", "stopped", "failed", "crashed")]


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_the_list_of_runs(size: tuple[int, int], some_runs: list[RunDirectory], same_picture: Same) -> None:
    text = shot(app_of(mode="runs"), size, lambda text: "4 of 4" in text)
    same_picture(f"runs-{size[0]}x{size[1]}", text)


@pytest.mark.parametrize("size", [*SIZES, (60, 20)], ids=lambda size: f"{size[0]}x{size[1]}")
def test_a_comparison(size: tuple[int, int], some_runs: list[RunDirectory], same_picture: Same) -> None:
    text = shot(
        app_of(mode="runs"),
        size,
        lambda text: "4 of 4" in text,
        "space",
        "space",
        "equals_sign",
        then="what differs",
    )
    same_picture(f"compare-{size[0]}x{size[1]}", text)


def test_the_list_of_runs_in_ascii(some_runs: list[RunDirectory], same_picture: Same) -> None:
    text = shot(app_of(mode="runs", terminal=MONOCHROME), (80, 24), lambda text: "4 of 4" in text)
    assert text.isascii()
    same_picture("runs-ascii-80x24", text)


@pytest.fixture
def fixed_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans are made for the same machine everywhere."""
    machine = Machine(
        gpu_name="NVIDIA H200",
        gpu_free=120 * GIB,
        gpu_total=141 * GIB,
        host_free=200 * GIB,
        disk_free=900 * GIB,
        cpus=16,
    )
    monkeypatch.setattr(planning, "detect", lambda *_: machine)


def setup_app(terminal: Terminal = PLAIN) -> EqatApp:
    app = app_of(mode="setup", terminal=terminal)

    def smoke() -> None:
        assert isinstance(app.screen, SetupScreen)
        app.screen.start_from("smoke")

    app.call_later(lambda: app.call_after_refresh(smoke))
    return app


@pytest.mark.parametrize("size", [*SIZES, (60, 20)], ids=lambda size: f"{size[0]}x{size[1]}")
def test_the_setup(size: tuple[int, int], fixed_machine: None, same_picture: Same) -> None:
    text = shot(setup_app(), size, lambda text: "eqat run smoke" in text and "ready: r" in text)
    same_picture(f"setup-{size[0]}x{size[1]}", text)


def test_the_setup_in_ascii(fixed_machine: None, same_picture: Same) -> None:
    text = shot(setup_app(MONOCHROME), (80, 24), lambda text: "eqat run smoke" in text and "ready: r" in text)
    assert text.isascii()
    same_picture("setup-ascii-80x24", text)


def reading(gpus: int, t: float) -> hardware.Reading:
    """Two busy GPUs, one of them ours and shared; or none."""
    ours = hardware.Process(
        pid=4242, name="eqat engine", user="ada", bytes=3 * GIB, engine=True, run="20251124-1600-tiny-llama"
    )
    other = hardware.Process(pid=999, bytes=40 * GIB)
    devices = tuple(
        hardware.Gpu(
            index=index,
            name="NVIDIA H200",
            used=(44 - 20 * index) * GIB,
            total=141 * GIB,
            free=(97 + 20 * index) * GIB,
            utilization=97.0,
            temperature=61.0,
            power=512.0 if index == 0 else None,
            power_limit=700.0 if index == 0 else None,
            processes=(other, ours) if index == 0 else (),
        )
        for index in range(gpus)
    )
    host = hardware.Host(
        used=30 * GIB,
        total=256 * GIB,
        available=226 * GIB,
        swap_used=0,
        cpu=12.0,
        cores=16,
        load=2.5,
        disk_free=900 * GIB,
        disk_total=1800 * GIB,
    )
    problem = "" if gpus else "no NVIDIA driver on this machine"
    return hardware.Reading(t=t, gpus=devices, gpu_problem=problem, host=host, engines=(ours,))


@pytest.mark.parametrize("gpus", [0, 2])
@pytest.mark.parametrize("size", [*SIZES, (60, 20)], ids=lambda size: f"{size[0]}x{size[1]}")
def test_the_memory_screen(
    gpus: int, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch, same_picture: Same
) -> None:
    monkeypatch.setattr(MemoryScreen, "_sample", lambda self: None)
    app = app_of(mode="memory")

    def feed() -> None:
        for second in range(30):
            app.screen.post_message(MemoryScreen.Read(reading(gpus, START + second)))

    app.call_later(lambda: app.call_after_refresh(feed))
    text = shot(app, size, lambda text: "last 29 s" in text)
    same_picture(f"memory-{gpus}-gpus-{size[0]}x{size[1]}", text)
