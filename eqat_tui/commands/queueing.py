"""Commands for runs that are made one after the other on this machine, whoever is logged in."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from engine.errors import ExitCode, UsageError
from eqat_tui.commands.options import (
    Bits,
    Data,
    Device,
    Gpus,
    GroupSize,
    Json,
    Model,
    RemoteCode,
    RunsDir,
    Settings,
    Target,
)


class QueueGroup(TyperGroup):
    """``eqat queue`` is ``eqat queue list``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the command in front that was left out."""
        if not args or args[0] == "--json":
            args = ["list", *args]
        found: list[str] = super().parse_args(ctx, args)
        return found


app = typer.Typer(
    cls=QueueGroup,
    rich_markup_mode=None,
    help="Make runs one after the other on this machine, whoever is logged in.",
    epilog="eqat queue alone lists it. Exit codes: 0 done; 2 no such entry or place; 3 an entry that is at "
    "work, or a queue that cannot be changed; of eqat queue add those of eqat plan too. How a run ends is no "
    "exit code of these: eqat queue list shows it.",
)

Number = Annotated[int, typer.Argument(metavar="ENTRY", min=1, help="Its number in eqat queue list.")]
Numbers = Annotated[
    list[int] | None, typer.Argument(metavar="[ENTRY...]", min=1, help="Their numbers in eqat queue list.")
]


@app.command()
def add(
    target: Target,
    model: Model = None,
    bits: Bits = None,
    group_size: GroupSize = None,
    data: Data = None,
    device: Device = None,
    gpus: Gpus = None,
    settings: Settings = None,
    trust_remote_code: RemoteCode = False,
    runs_dir: RunsDir = None,
    as_json: Json = False,
) -> int:
    """Add a run at the end of the queue, as eqat run would make it; it is made in its turn.

    A process of its own makes one run after the other, which no terminal ends: it is started by the first
    entry and ends after the last. A run that fails, or that somebody stops, does not stop the others.
    """
    from engine.run.finding import default_runs_dir
    from engine.run.queue import Queue
    from eqat_tui import queueing
    from eqat_tui.configure import build_config
    from eqat_tui.output import print_json, show

    config = build_config(
        target,
        model=model,
        bits=bits,
        group_size=group_size,
        data=data,
        device=device,
        gpus=gpus,
        settings=settings or (),
        trust_remote_code=trust_remote_code,
    )
    queue = Queue()
    entry = queueing.added(queue, config, default_runs_dir(runs_dir))
    queue.read()
    if as_json:
        print_json({"number": entry.number, "path": str(queue.path), "paused": queue.paused})
    else:
        note = " (the queue is paused: eqat queue resume goes on)" if queue.paused else ""
        show(f"entry {entry.number}{note}")
    return ExitCode.DONE


@app.command("list")
def list_entries(as_json: Json = False) -> int:
    """List the queue in the order in which runs are made, with what became of those before.

    After a restart of the machine nobody works on it until eqat queue resume or the next eqat queue add.
    """
    from engine.run.queue import Queue
    from eqat_tui.output import print_json, show
    from eqat_tui.queue_text import queue_text
    from eqat_tui.queueing import show_queue

    shown = show_queue(Queue())
    if as_json:
        print_json(shown)
    else:
        show(queue_text(shown))
    return ExitCode.DONE


@app.command()
def move(
    entry: Number,
    place: Annotated[
        str, typer.Argument(metavar="PLACE", help="first, last, up, down, or the entry that it comes before.")
    ],
) -> int:
    """Give an entry that waits another place."""
    from engine.run.queue import Queue
    from eqat_tui.output import say

    queue = Queue()
    with queue.changing():
        queue.settle()
        moved = queue.move(entry, place)
    if not moved:
        say(f"entry {entry} has that place already")
    return ExitCode.DONE


@app.command()
def remove(
    entries: Numbers = None,
    over: Annotated[bool, typer.Option("--over", help="All whose turn is over.")] = False,
) -> int:
    """Take entries out of the queue. Runs that they have made stay; one that is at work is stopped first."""
    from engine.run.queue import Queue

    if not entries and not over:
        raise UsageError("names no entry", where="ENTRY", hint="their numbers, or --over")
    queue = Queue()
    with queue.changing():
        queue.settle()
        ended = [one.number for one in queue.entries if one.over is not None] if over else []
        queue.remove([*(entries or ()), *ended])
    return ExitCode.DONE


@app.command()
def pause() -> int:
    """Begin no other run. The one at work goes on; eqat queue resume goes on with the others."""
    from engine.run.queue import Queue
    from eqat_tui import queueing

    queueing.paused(Queue())
    return ExitCode.DONE


@app.command()
def stop(
    wait: Annotated[bool, typer.Option("--wait", help="Return when its run has stopped.")] = False,
) -> int:
    """Stop the run at work at its next step, resumably, and begin no other.

    eqat queue resume goes on with it. eqat stop RUN stops only the run, which then stays stopped, and the
    queue goes on with the next.
    """
    import time

    from engine.run.members import is_at_work
    from engine.run.queue import Queue
    from eqat_tui import queueing
    from eqat_tui.output import say

    run = queueing.stopped(Queue())
    if run is not None:
        say(f"asked {run.id} to stop")
    while wait and is_at_work(run):
        time.sleep(0.2)
    return ExitCode.DONE


@app.command()
def resume(entries: Numbers = None) -> int:
    """Go on with the queue, after a pause, a stop or a restart of the machine.

    Entries that are named have another turn, at the end: a run that was stopped or failed goes on from its
    last checkpoint.
    """
    from engine.run.queue import Queue
    from eqat_tui import queueing
    from eqat_tui.output import say
    from eqat_tui.queue_text import head

    queue = Queue()
    queueing.resumed(queue, entries or ())
    queue.read()
    say(head(queueing.show_queue(queue)))
    return ExitCode.DONE


@app.command(hidden=True)
def work() -> int:
    """Work on the queue until no entry waits: what eqat queue add starts."""
    from engine.run.queue import Queue
    from eqat_tui.queue_worker import Worker

    return Worker(Queue()).work()
