"""What a user does with a victim: commands as they are typed, an engine, and the files read directly.

An operation is a function that returns an exit code; it runs in a sandbox. Commands run in the forked process
(``command``) or, some of them, as programs of their own (``program``).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from world import World

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Operation:
    """Something that is done with a victim."""

    name: str
    action: Callable[[], Any]
    cpu: int = 15
    """Seconds of processor time that it may take, many times what it takes."""
    wall: float = 30.0
    """Seconds after which it hangs, however busy the machine is."""
    deletes: bool = False
    """It may take the victim away."""
    trains: bool = False
    """When it ends with 0 the victim has an export."""
    tells: bool = True
    """Its exit code says what became of the case."""


def command(world: World, *arguments: str, deletes: bool = False, tells: bool = False) -> Operation:
    """``eqat ARGUMENTS``."""

    def action() -> None:
        from eqat_tui.cli import main

        sys.argv = ["eqat", *arguments]
        main(list(arguments))

    return Operation(_typed("eqat", arguments, world), action, deletes=deletes, tells=tells)


def program(world: World, *arguments: str, module: str = "eqat_tui", deletes: bool = False) -> Operation:
    """The same as a program: nothing is imported before it starts."""

    def action() -> None:
        os.environ["PYTHONPATH"] = str(ROOT)
        os.execv(sys.executable, [sys.executable, "-P", "-m", module, *arguments])

    name = _typed(f"python -m {module}", arguments, world)
    return Operation(name, action, cpu=90, wall=180.0, deletes=deletes, tells=False)


def engine(world: World, *arguments: str, run: Path | None = None) -> Operation:
    """``python -m engine RUN ARGUMENTS``."""
    path = run or world.run

    def action() -> int:
        from engine.__main__ import main

        return main([str(path), *arguments])

    name = _typed("engine", (path.name, *arguments), world)
    return Operation(name, action, cpu=30, wall=60.0, trains=run is None)


def read(world: World, function: Callable[..., Any], *arguments: object) -> Operation:
    """A function of ours that reads files; what it raises for the user is told as commands tell it."""

    def action() -> int:
        from engine.errors import EqatError
        from eqat_tui.output import print_error

        try:
            function(*arguments)
        except EqatError as error:
            print_error(error, as_json=False)
            return int(error.exit_code)
        return 0

    name = _typed(function.__name__.replace("_", " "), tuple(map(str, arguments)), world)
    return Operation(name, action, tells=function not in (look_at_run, show_screen))


def _typed(name: str, arguments: tuple[str, ...], world: World) -> str:
    words = " ".join((name, *(text.replace(f"{world.root}/", "") for text in arguments)))
    return words if len(words) <= 120 else f"{words[:120]}…"


# -- on a run ------------------------------------------------------------------------------------------


def looks(world: World, chance: Random) -> list[Operation]:
    """What only looks at runs: all that the app reads, and some of the commands."""
    runs = ("--runs-dir", str(world.runs))
    others = [
        command(world, "runs", *runs),
        command(world, "runs", "--json", *runs),
        command(world, "show", str(world.run), "--json"),
        command(world, "report", str(world.run), "--to", "-"),
        command(world, "gc", "--dry-run", str(world.run), *runs),
        command(world, "stop", str(world.run)),
        command(world, "rm", str(world.run), *runs),
    ]
    shown = command(world, "show", str(world.run), tells=True)
    return [read(world, look_at_run, world.run), shown, *chance.sample(others, 2)]


def screens(world: World, chance: Random) -> Operation:
    """The app on the run, one of its screens, as the terminal gets it."""
    return read(world, show_screen, world.run, chance.choice(("monitor", "result", "runs")))


def works(world: World, chance: Random) -> list[Operation]:
    """One thing that an engine does with a run."""
    which = chance.choice(((), (), (), ("--task", "export"), ("--task", "eval"), ("--task", "generate")))
    more = ("--prompt", "Once") if "generate" in which else ()
    return [engine(world, *which, *more)]


def deletions(world: World, chance: Random) -> list[Operation]:
    """What frees room, and then what deletes."""
    runs = ("--runs-dir", str(world.runs))
    who = (str(world.run),) if chance.random() < 0.5 else ()
    return [
        command(world, "gc", *who, *runs),
        command(world, "rm", "--yes", str(world.run), *runs, deletes=True),
        command(world, "gc", *runs, deletes=True),
    ]


def programs(world: World, chance: Random) -> list[Operation]:
    """Commands that start an engine of their own, as programs."""
    runs = ("--runs-dir", str(world.runs))
    which = chance.choice(("resume", "export", "eval"))
    return [program(world, which, str(world.run), *runs), program(world, "runs", *runs)]


def look_at_run(path: Path) -> None:
    """Everything that the app reads of a run, and its views at two sizes."""
    from engine.run import control, event_log, launch
    from engine.run.comparison import Compared
    from engine.run.directory import RunDirectory
    from engine.run.liveness import run_state
    from engine.run.lock import holder
    from engine.run.redo import read_origin
    from engine.run.shown import show_run, summarize
    from engine.run.state import load_state
    from engine.run.status import read_status
    from eqat_tui import feed
    from eqat_tui.views import monitor, result, run_charts, run_machine
    from eqat_tui.views.comparison import differences
    from eqat_tui.views.runs import details

    run = RunDirectory.open(path)
    load_state(run)
    event_log.read_events(run.events_path)
    run_state(run), read_status(run), holder(run.lock_path), control.pending(run), launch.next_attempt(run)
    shown, row = show_run(run), summarize(run)
    for view in (feed.LiveFeed(run).poll(), *_replayed(feed.ReplayFeed(run))):
        for width in (60, 120):
            for part in (
                monitor.title,
                monitor.progress,
                monitor.notices,
                run_machine.machine_lines,
                monitor.block_table,
            ):
                part(view, width)
            monitor.journal(view.journal, width), run_charts.loss_series(view, None)
            result.headline(view, width), result.exports(view, width), result.samples(view.state, width)
            result.perplexities(view.state, width), result.figures(shown, width), details(row, width)
    differences([Compared(run, "a"), Compared(run, "b")], 100)
    read_origin(run)
    run.config()


def _replayed(replay: Any) -> list[Any]:
    first = replay.poll()
    replay.seek(1e9)
    return [first, replay.poll()]


def show_screen(path: Path, mode: str) -> None:
    """Print a screen of the app on a run."""
    from app_tools import app_of, drive, picture

    from engine.run.directory import RunDirectory

    run = RunDirectory.open(path)

    async def script(pilot: Any, app: Any) -> None:
        for _ in range(4):
            await pilot.pause(0.1)
        print(picture(app))
        await pilot.resize_terminal(60, 20)
        await pilot.pause(0.1)
        print(picture(app))

    drive(app_of(run, mode=mode, runs_dir=path.parent), script)


# -- on models, texts and configurations ---------------------------------------------------------------


def plan_model(source: Path) -> None:
    """What a plan reads of a model."""
    from engine.architecture.description import describe

    describe(str(source))


def open_model(source: Path) -> None:
    """What an engine reads of a model: tokenizer, every tensor, identity."""
    from engine.config.model import ModelConfig
    from engine.models.source import ModelSource

    found = ModelSource.open(ModelConfig(source=str(source)))
    found.identity()
    found.tokenizer()("The river was high.")
    for name in found.weights.names():
        found.weights.load(name)


def import_checkpoint(source: Path) -> None:
    """What an import reads of a quantized checkpoint: every linear."""
    from engine.export.importing import look_at

    look_at(source)


def judge_checkpoint(source: Path) -> None:
    """What ``eqat verify`` reads of it."""
    from engine.export.judging import judge

    judge(source)


def read_texts(source: Path) -> None:
    """All documents of every part, and what the text is identified by."""
    from engine.config.data import DataConfig
    from engine.data.parts import PARTS
    from engine.data.text import open_source

    found = open_source(DataConfig(source=str(source)))
    for part in PARTS:
        for document in found.documents(part):
            document.encode()
        found.identity(part)


def load_config(path: Path) -> None:
    """Load, complete, check and write a configuration."""
    from engine.config.derived import resolve
    from engine.config.loading import load
    from engine.config.sameness import config_hash, equivalent_command
    from engine.config.validation import validate
    from engine.config.writing import to_toml

    config = resolve(load(str(path)))
    validate(config)
    to_toml(config), config_hash(config), equivalent_command(config)
