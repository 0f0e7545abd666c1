"""``eqat attach``: a run that was started before, shown again, of this machine or of another."""

from __future__ import annotations

from pathlib import Path

from engine.errors import UsageError
from engine.run.directory import RunDirectory
from engine.run.sight import sight_of
from engine.run.status import read_launched
from eqat_tui import actions
from eqat_tui.terminal import Look, can_open_app, open_app


def attach(run: RunDirectory, runs_dir: Path | None, *, app: Look | None, as_json: bool) -> int:
    """Show ``run`` in the app, where that is wanted and there is a terminal for it, else in lines."""
    if sight_of(run).look().state == "created" and read_launched(run) is None:
        starts = actions.types(run, "resume")
        raise UsageError("was never started", where=run.id, hint=f"{starts} starts it")
    if app is not None and can_open_app():
        return open_app(runs_dir, run=run, look=app)
    return actions.follow(run, engine=None, as_json=as_json)
