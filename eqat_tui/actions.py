"""What several commands do: find a run, print a plan, start the engine, follow it to its report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from engine.run.config import RunConfig
from engine.run.directory import RunDirectory, default_runs_dir, find_run
from engine.run.errors import EqatError, ExitCode
from engine.run.launch import launch, log_path
from engine.run.state import show
from eqat_tui.follow import Follower, Left
from eqat_tui.output import print_json, say
from eqat_tui.progress import open_display
from eqat_tui.summary import report, shorten


def find(ref: str, runs_dir: Path | None) -> RunDirectory:
    """The run that was meant on the command line."""
    return find_run(default_runs_dir(runs_dir), ref)


def run_of(ref: str) -> str:
    """The run that a path lies in, so that an exported checkpoint can be named by its directory."""
    path = Path(ref).expanduser()
    if path.exists():
        for parent in (path.resolve(), *path.resolve().parents):
            if (parent / "config.toml").is_file():
                return str(parent)
    return ref


def print_plan(config: RunConfig, runs_dir: Path, *, as_json: bool) -> int:
    """Print the plan; the exit code says whether the run would start."""
    from engine.run.plan import check, make_plan
    from eqat_tui.plan_text import plan_text

    plan = make_plan(config, runs_dir=runs_dir)
    if any(problem.where == "runtime.device" for problem in plan.problems):
        check(plan)  # without the device there is nothing to plan
    if as_json:
        print_json(plan.to_dict())
    else:
        print(plan_text(plan.to_dict()))
    try:
        check(plan)
    except EqatError as error:
        if not as_json:
            raise
        return int(error.exit_code)  # the plan on stdout says it already
    return ExitCode.DONE


def start(run: RunDirectory, *, args: Sequence[str] = (), detach: bool, as_json: bool) -> int:
    """Start the engine on ``run``; follow it, or say its id and return."""
    if detach:
        pid = launch(run, args=args)
        if as_json:
            print_json({"id": run.id, "path": str(run.path), "pid": pid})
        else:
            print(run.id)
        return ExitCode.DONE
    say(f"run {run.id}")
    return follow(run, engine=lambda: launch(run, args=args), as_json=as_json)


def follow(run: RunDirectory, *, engine: Callable[[], int] | None, as_json: bool) -> int:
    """Follow to the end, then print the report; ``engine`` starts it, unless it runs already."""
    follower = Follower(run, open_display())
    follower.catch_up()  # before the launch: what a former attempt did is not told again
    try:
        code = follower.follow(start=engine, on_interrupt="leave" if engine is None else "stop")
    except Left:
        say(f"left; the engine goes on: eqat attach {run.id}, eqat stop {run.id}")
        return ExitCode.DONE if engine is None else ExitCode.ABORTED
    shown = show(run)
    if as_json:
        print_json(shown)
    elif shown["exports"] or any(value is not None for value in shown["perplexity"].values()):
        print(report(shown, with_error=False))  # the display has told the error
    if code == ExitCode.STOPPED:
        say(f"stopped; eqat resume {run.id} goes on")
    elif code == ExitCode.BUG:
        say(f"log: {shorten(log_path(run, follower.state.attempt))}")
    return code
