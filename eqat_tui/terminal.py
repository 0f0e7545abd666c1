"""Opening the app, where there is a terminal for it, and leaving that as it was found."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path
from typing import NamedTuple

from engine.config.user import load_user_config, user_config_path
from engine.errors import PreflightError, UsageError
from engine.run.directory import RunDirectory
from engine.run.finding import default_runs_dir
from eqat_tui.output import show
from eqat_tui.which_run import working


class Look(NamedTuple):
    """What was said about how the app is to look and what it may do."""

    ascii_only: bool = False
    read_only: bool = False


def can_open_app() -> bool:
    """Whether somebody sits at a terminal that can show the app, which Textual draws on stderr."""
    streams = (sys.stdin, sys.stdout, sys.__stderr__)
    there = all(stream is not None and stream.isatty() for stream in streams)
    return there and os.environ.get("TERM", "dumb") not in ("dumb", "")


def require_terminal(command: str, *, hint: str) -> None:
    """For commands that are nothing without the app."""
    if not can_open_app():
        raise PreflightError("needs a terminal", where=command, hint=hint)


def open_app(
    runs_dir: Path | None,
    *,
    look: Look,
    run: RunDirectory | None = None,
    mode: str | None = None,
    replay_speed: float | None = None,
) -> int:
    """Run the app to its end; the exit code.

    It opens on ``run``, else on ``mode``, else on the newest run that is working, else on the setup.
    """
    # Importing makes objects by the hundred thousand and no garbage, and so does reading a long log; the app
    # turns collection on again when it shows something.
    gc.disable()
    from eqat_tui.app import EqatApp
    from eqat_tui.palette import THEMES, look_at_terminal

    user = load_user_config()
    theme = os.environ.get("EQAT_THEME") or user.theme or None
    if theme is not None and theme not in THEMES:
        where = "EQAT_THEME" if os.environ.get("EQAT_THEME") else f"{user_config_path()}: theme"
        raise UsageError(f"there is no theme {theme!r}", where=where, hint=", ".join(THEMES))
    place = default_runs_dir(runs_dir)
    if run is None and mode is None:
        run = working(place)
    app = EqatApp(
        runs_dir=place,
        terminal=look_at_terminal(ascii_only=look.ascii_only, theme=theme),
        run=run,
        mode=mode or ("monitor" if run is not None else "setup"),
        read_only=look.read_only,
        replay_speed=replay_speed,
        bell=user.notify.bell,
    )
    message = app.run()
    if message:
        show(message)
    return app.exit_code or app.return_code or 0
