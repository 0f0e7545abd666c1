"""The whole way in a real terminal, with the keyboard only.

Set up, watch, lose the connection, come back, stop, go on, finish, export: the result is that of a run
without any of it.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tmux_app import Tmux
from waiting import PATIENCE, wait_until

from engine.config.derived import resolve
from engine.config.loading import load
from engine.config.overrides import apply_overrides
from engine.run.directory import RunDirectory
from engine.run.finding import list_runs
from engine.run.launch import launch
from engine.run.liveness import look, run_state
from engine.run.state import load_state

pytestmark = pytest.mark.skipif(shutil.which("tmux") is None, reason="needs tmux")
EPOCHS = 16


@pytest.fixture
def tmux(tmp_path: Path) -> Iterator[Tmux]:
    terminal = Tmux(tmp_path)
    yield terminal
    terminal("kill-server")
    for run in list_runs(tmp_path / "runs"):
        for _ in range(200):
            if look(run).work is None:
                break
            time.sleep(0.1)


def weights(run: RunDirectory) -> dict[str, str]:
    """SHA-256 of every file of the packed checkpoint that holds tensors."""
    folder = run.export_dir / "gptq_v2"
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}


def headless(folder: Path) -> RunDirectory:
    """The same settings without a terminal and without an interruption."""
    changes = {"block_ap.epochs": EPOCHS, "runtime.device": "cpu"}
    config = resolve(apply_overrides(load("smoke"), changes))
    run = RunDirectory.create(folder, config)
    launch(run)
    wait_until(lambda: look(run).work is None, seconds=2 * PATIENCE)
    assert run_state(run) == "done"
    return run


def test_a_run_from_setup_to_export_with_the_keyboard_only(tmux: Tmux, tmp_path: Path) -> None:
    tmux.open()
    tmux.sees("a new run")
    tmux.press("Down", "Enter")
    tmux.sees("Start from a preset")
    tmux.type("smoke")
    tmux.press("Enter")
    tmux.sees("eqat run smoke")
    tmux.press(*["Down"] * 5, "Left")
    tmux.sees("eqat run smoke --device cpu")  # where a run repeats itself to the byte
    tmux.press("/")
    tmux.type("block_ap.epochs")
    tmux.press("Enter")
    tmux.press_until("Enter", "leave it as it was")
    tmux.type(str(EPOCHS))
    tmux.press("Enter")
    tmux.sees(f"--set block_ap.epochs={EPOCHS}")
    tmux.press("Escape")
    tmux.sees("ready: r runs it")
    tmux.press("r")
    tmux.sees("loss of block")
    tmux.sees("▶ running")

    tmux.lose()
    (run,) = list_runs(tmp_path / "runs")
    tmux.is_gone()
    assert run_state(run) == "running"

    tmux.open("attach", "latest")
    tmux.sees("loss of block")
    tmux.sees("▶ running")
    tmux.press("x")
    tmux.sees("Stop the run?")
    tmux.press("y")
    tmux.sees("■ stopped")
    assert load_state(run).exit_code == 75
    assert any(row.finished for row in load_state(run).phases if row.name == "evaluate_fp")
    tmux.press("r")
    tmux.sees("attempt 2")
    tmux.sees("finished", seconds=2 * PATIENCE)  # a whole training

    tmux.press("3")
    tmux.sees("quality")
    tmux.press("e")
    tmux.sees("Write packed checkpoints")
    tmux.press("Tab")
    tmux.type("mine")
    tmux.press("Enter")
    wait_until((tmp_path / "mine").is_dir)
    tmux.sees("copied to")
    tmux.press("q")
    tmux.is_gone()

    other = headless(tmp_path / "headless")
    assert weights(run) == weights(other)
    copied = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (tmp_path / "mine").glob("*.safetensors")
    }
    assert copied == weights(other)
