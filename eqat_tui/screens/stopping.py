"""The question before an engine is stopped, wherever somebody presses the key for it."""

from __future__ import annotations

from engine.errors import EqatError
from engine.run import control
from engine.run.directory import RunDirectory
from eqat_tui.feed import RunView
from eqat_tui.screens.base import WorkScreen
from eqat_tui.screens.dialogs import Confirm
from eqat_tui.screens.table import key_of
from eqat_tui.views.monitor import SIDE_TASKS


def ask_to_stop(screen: WorkScreen, view: RunView) -> None:
    """Stop what the engine does, once the user agrees."""
    run = screen.eqat.current()
    screen.app.push_screen(question(view), lambda yes: ask_engine(screen, run, "stop") if yes else None)


def question(view: RunView) -> Confirm:
    """Whether to stop, and what comes of it."""
    doing = SIDE_TASKS.get(view.state.task)
    if doing is None:
        return Confirm(
            "Stop the run?",
            "The engine writes a checkpoint at its next step and ends; memory and GPU are free then. Nothing "
            f"is lost: r on {key_of('monitor')} goes on exactly there.",
            "stop it",
        )
    return Confirm(
        f"Stop the {doing}?",
        "What it has done so far is not kept. The run itself stays as it is.",
        "stop it",
    )


def ask_engine(screen: WorkScreen, run: RunDirectory, request: control.Action) -> None:
    """Leave a request for the engine of ``run``."""
    try:
        control.request(run, request)
    except (EqatError, OSError) as error:
        screen.eqat.tell(error)
    screen.eqat.look_now()
