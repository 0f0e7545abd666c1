"""The question before an engine is stopped, wherever somebody presses the key for it."""

from __future__ import annotations

from engine.errors import EqatError
from engine.run import control
from engine.run.directory import RunDirectory
from engine.run.sight import SeenFromAfar
from engine.run.stopping import ask_to_end
from engine.run.task import job_name
from eqat_tui.feed import RunView
from eqat_tui.screens.base import WorkScreen
from eqat_tui.screens.dialogs import Confirm
from eqat_tui.screens.table import key_of


def ask_to(request: control.Action, screen: WorkScreen, view: RunView) -> None:
    """Stop or abort what the engine does, once the user agrees."""
    run = screen.eqat.current()
    name = job_name(view.job.task) if view.job is not None else "run"
    question = Confirm(f"{request.capitalize()} the {name}?", _consequence(request, view), f"{request} it")
    screen.app.push_screen(question, lambda yes: ask_engine(screen, run, request) if yes else None)


def _consequence(request: control.Action, view: RunView) -> str:
    if view.job is not None:
        return f"What it has done so far is not kept. The run stays {view.liveness}."
    if view.liveness == "waiting":
        return "The job is taken out of Slurm; eqat resume with --on slurm gives it the run again."
    if request == "abort":
        return (
            "The engine ends at once; what it trained after its last checkpoint is lost. x stops it instead, "
            "at its next step, and loses nothing."
        )
    return (
        "The engine writes a checkpoint at its next step and ends; memory and GPU are free then. Nothing is "
        f"lost: r on {key_of('monitor')} goes on exactly there."
    )


def ask_engine(screen: WorkScreen, run: RunDirectory, request: control.Action) -> None:
    """Leave a request for the engine of ``run``, or take its job out of its cluster."""
    if isinstance(run, SeenFromAfar):  # another machine takes its time
        screen.eqat.in_background(
            lambda: run.sight.ask(request), f"{run.sight.host} was asked to {request} it"
        )
        return
    try:
        ask_to_end(run, request)
    except (EqatError, OSError) as error:
        screen.eqat.tell(error)
    screen.eqat.look_now()
