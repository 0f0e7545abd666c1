"""A whole terminal of its own (tmux): its keyboard, and what it shows."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from pty_app import NOT_OURS, REPOSITORY
from waiting import PATIENCE, wait_until


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
        self.open_for(sys.executable, "-m", "eqat_tui", *arguments)

    def open_for(self, *command: str) -> None:
        """A new terminal of 80×24 that runs ``command``."""
        self("new-session", "-d", "-s", "one", "-x", "80", "-y", "24", *command)

    def resize(self, columns: int, rows: int) -> None:
        """Another size."""
        self("resize-window", "-t", "one", "-x", str(columns), "-y", str(rows))

    def scribble(self, words: str) -> None:
        """What another program writes over the screen."""
        Path(self("display-message", "-p", "-t", "one", "#{pane_tty}").strip()).write_text(words)

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
