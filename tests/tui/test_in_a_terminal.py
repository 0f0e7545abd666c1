"""The whole way in a real terminal, with the keyboard only.

Set up, watch, lose the connection, come back, stop, go on, finish, export: the result is that of a run
without any of it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pty_app import NOT_OURS, REPOSITORY
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
EPOCHS = 24


class Tmux:
    """A tmux server of our own with one session."""

    def __init__(self, cwd: Path) -> None:
        self.cwd = cwd
        self.socket = f"eqat-keyboard-{os.getpid()}"

    def __call__(self, *arguments: str) -> str:
        kept = {name: value for name, value in os.environ.items() if name not in NOT_OURS}
        environment = {**kept, "PYTHONPATH": str(REPOSITORY), "LC_ALL": "C.UTF-8", "LANG": "C.UTF-8"}
        return subprocess.run(
            ["tmux", "-L", self.socket, "-f", "/dev/null", *arguments],
            cwd=self.cwd,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        ).stdout

    def open(self, *arguments: str) -> None:
        """A new terminal of 80×24 that runs ``eqat``."""
        self(
            "new-session",
            "-d",
            "-s",
            "one",
            "-x",
            "80",
            "-y",
            "24",
            sys.executable,
            "-m",
            "eqat_tui",
            *arguments,
        )

    def lose(self) -> None:
        """The terminal is gone, as when a connection is lost."""
        self("kill-session", "-t", "one")

    def is_gone(self) -> None:
        """The session has ended, and with it whatever ran in it."""
        wait_until(lambda: "one" not in self("list-sessions"))

    def press(self, *keys: str) -> None:
        for key in keys:
            self("send-keys", "-t", "one", key)
            time.sleep(0.15)

    def type(self, text: str) -> None:
        """Letters, which are on the screen before the next key."""
        self("send-keys", "-t", "one", "-l", text)
        self.sees(text)

    def press_until(self, key: str, words: str) -> None:
        """Press ``key`` until it has its effect: the one before it may still have been at work."""
        for _ in range(5):
            self.press(key)
            deadline = time.monotonic() + PATIENCE / 6
            while time.monotonic() < deadline:
                if words in self.screen():
                    return
                time.sleep(0.1)
        self.sees(words, 0.0)

    def screen(self) -> str:
        return self("capture-pane", "-t", "one", "-p")

    def until(self, condition: Callable[[str], bool], seconds: float = PATIENCE) -> str:
        """The screen, once ``condition`` holds for it."""
        deadline = time.monotonic() + seconds
        while True:
            screen = self.screen()
            if condition(screen):
                return screen
            assert time.monotonic() < deadline, f"did not happen in time; the screen shows\n{screen}"
            time.sleep(0.1)

    def sees(self, words: str, seconds: float = PATIENCE) -> str:
        return self.until(lambda screen: words in screen, seconds)


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
    tmux.press("p")
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
