"""What several commands do: find a run, print a plan, start the engine, follow it to its report."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.config.derived import resolve
from engine.config.fields import field_names, is_operational
from engine.config.overrides import apply_overrides
from engine.config.run import RunConfig
from engine.config.runtime import GPUS
from engine.config.user import load_user_config
from engine.config.validation import validate
from engine.config.writing import to_dict
from engine.errors import EqatError, ExitCode, PreflightError, UsageError
from engine.ranks.place import refuse_one_of_several
from engine.run.continued import continued_on
from engine.run.directory import RunDirectory
from engine.run.elsewhere import lives_elsewhere
from engine.run.events import BULK
from engine.run.finding import check_runs_dir, default_runs_dir, find_run, shorten, typed
from engine.run.launch import launch, log_path
from engine.run.liveness import look, run_state
from engine.run.lock import holder, is_held, opened_by
from engine.run.proof import is_run
from engine.run.redo import make_redo
from engine.run.shown import show_run, summarize
from engine.run.sight import SeenFromAfar, sight_of
from engine.run.state import RunState, load_state
from engine.run.status import read_launched, read_status
from engine.run.stopping import ask_to_end, end_job, job_at_work
from engine.run.task import JOBS, is_job, job_name
from engine.run.trained import refuse_untrained
from engine.run.usable import is_damaged
from engine.system.files import existing, is_virtual
from eqat_tui.clusters.asked import AskedOfSlurm
from eqat_tui.display import open_display
from eqat_tui.follow import Follower, Left
from eqat_tui.output import cell, error_words, one_line, print_json, ring, say, show
from eqat_tui.run_text import report

Told = Callable[[Mapping[str, Any]], str]
"""From what ``eqat show --json`` prints to what a person reads."""

KILL_SECONDS = 10.0
"""How long a killed engine may take to be gone."""


def find(ref: str, runs_dir: Path | None) -> RunDirectory:
    """The run that was meant on the command line."""
    return find_run(default_runs_dir(runs_dir), ref)


def find_trained(ref: str, runs_dir: Path | None) -> RunDirectory:
    """The run that was meant, of which something is wanted that only a finished one has."""
    run = find(ref, runs_dir)
    refuse_untrained(run, to_dict(run.config()))
    return run


def summaries(runs: Sequence[RunDirectory]) -> list[dict[str, Any]]:
    """A row for each run; one whose log cannot be read is named on stderr and hides no other."""
    rows = []
    for run in runs:
        try:
            rows.append(summarize(run))
        except Exception as error:  # what a damaged file makes a parser raise is more than anyone can list
            say(f"{cell(run.id)} is left out: {one_line(error_words(error))}")
    return rows


def run_of(ref: str) -> str:
    """The run that a path lies in, so that an exported checkpoint can be named by its directory."""
    path = Path(os.path.expanduser(ref))
    if os.path.exists(path):
        place = path.resolve()
        return next((str(folder) for folder in (place, *place.parents) if is_run(folder)), ref)
    return ref


def print_plan(config: RunConfig, runs_dir: Path, *, as_json: bool) -> int:
    """Print the plan; the exit code says whether the run would start."""
    from engine.plan.plan import check, make_plan
    from eqat_tui.plan_text import plan_text

    if is_virtual(existing(runs_dir)):
        check_runs_dir(runs_dir)  # its room would be the wrong thing to speak of
    plan = make_plan(config, runs_dir=runs_dir)
    if any(problem.where == "runtime.device" for problem in plan.problems):
        check(plan)  # without the device there is nothing to plan
    if as_json:
        print_json(plan.to_dict())
    else:
        show(plan_text(plan.to_dict()))
    try:
        check(plan)
    except EqatError as error:
        if not as_json:
            raise
        return int(error.exit_code)  # the plan on stdout says it already
    return ExitCode.DONE


def start(
    run: RunDirectory,
    *,
    args: Sequence[str] = (),
    detach: bool,
    as_json: bool,
    told: Told | None = None,
) -> int:
    """Start the engine on ``run``; follow it, or say its id and return."""
    if detach:
        pid = launch(run, args=args)
        if as_json:
            print_json({"id": run.id, "path": str(run.path), "pid": pid})
        else:
            show(run.id)
        return ExitCode.DONE
    say(f"run {run.id}")
    return follow(run, engine=lambda: launch(run, args=args), as_json=as_json, told=told)


def resume(
    run: RunDirectory,
    overrides: Mapping[str, str],
    *,
    other_size: bool = False,
    slurm: AskedOfSlurm | None = None,
    detach: bool,
    as_json: bool,
) -> int:
    """Start the engine again on a run that is not over, with other operational settings, if given;
    ``other_size`` allows another number of GPUs than its checkpoint is of. ``slurm``: a job is to start
    it."""
    state, work = look(run)
    if work is not None and work.state != "starting":  # whose launch refuses a second one
        job = f"{state}, and its {job_name(work.task)} is " if is_job(work.task) else ""
        # The same as what a second engine is told: which of the two looks first is the system's to decide.
        attach = f"eqat attach {typed(run)}"
        raise PreflightError(f"is {job}{work.state}", where=run.id, hint=f"{attach} follows it")
    if state == "done":
        if not is_damaged(run.checkpoints_dir):
            raise UsageError("is done already", where=run.id, hint=f"eqat show {typed(run)} shows the result")
        say("it was done, and its checkpoint is damaged: what is damaged is trained again")
    args = [*operational(run, overrides), *(["--allow-world-size-change"] if other_size else [])]
    now = overrides if other_size else {**continued_on(run), **overrides}
    config = apply_overrides(run.config(), now)
    if slurm is not None:
        return _submit(run, args, slurm, config, as_json=as_json)
    refuse_one_of_several(config.runtime.gpus)
    return start(run, args=args, detach=detach, as_json=as_json)


def _submit(
    run: RunDirectory,
    args: Sequence[str],
    asked: AskedOfSlurm,
    config: RunConfig,
    *,
    as_json: bool,
) -> int:
    """Give the run to Slurm; by its engine's ``args`` it is as ``config`` says."""
    from eqat_tui.clusters.submitting import submit_run

    return submit_run(run, args, asked, as_json=as_json, config=config)


def operational(run: RunDirectory, overrides: Mapping[str, str]) -> list[str]:
    """Arguments of an engine that works on ``run`` with other settings, this time.

    Raises:
        UsageError: for one that decides what is computed, or that the others do not fit.
    """
    for name in overrides:
        if name in field_names() and not is_operational(name) and name != GPUS:
            raise UsageError(
                "decides what is computed, so this run cannot go on with another value",
                where=name,
                hint=f"eqat resume {typed(run)} --from-block K --set ... trains blocks K... again, in a new "
                "run",
            )
    validate(resolve(apply_overrides(run.config(), overrides)))
    return [part for name, value in overrides.items() for part in ("--set", f"{name}={value}")]


def redo(
    run: RunDirectory,
    from_block: int,
    overrides: Mapping[str, str],
    *,
    slurm: AskedOfSlurm | None = None,
    detach: bool,
    as_json: bool,
) -> int:
    """Train a part of ``run`` again, as a new run."""
    if slurm is None:
        refuse_one_of_several(apply_overrides(run.config(), overrides).runtime.gpus)
    made = make_redo(run, from_block, overrides)
    if from_block:
        last = f" to {from_block - 1}" if from_block > 1 else ""
        say(f"sharing block{'s' if from_block > 1 else ''} 0{last} of {run.id}")
    if slurm is not None:
        return _submit(made, (), slurm, made.config(), as_json=as_json)
    return start(made, detach=detach, as_json=as_json)


def types(run: RunDirectory, command: str) -> str:
    """What to type for a ``command`` of eqat on ``run``, here or over there."""
    return run.sight.types(command) if isinstance(run, SeenFromAfar) else f"eqat {command} {typed(run)}"


def stop(run: RunDirectory, *, abort: bool, wait: bool) -> int:
    """Ask the engine to stop or to abort."""
    state, work = look(run)
    if work is None:
        raise UsageError(f"is not running ({state})", where=run.id)
    taken_out = ask_to_end(run, "abort" if abort else "stop")
    if taken_out:
        say(
            f"took job {taken_out} of {run.id} out of Slurm; "
            f"eqat resume {typed(run)} --on slurm submits it again"
        )
        return ExitCode.DONE
    job = job_name(work.task) if is_job(work.task) else ""
    then = "" if wait else f"; {_goes_on(run, work.task, state)}"
    say(f"asked {f'the {job} of ' if job else ''}{run.id} to {'abort' if abort else 'stop'}{then}")
    if work.state == "hung":
        kills = f"eqat stop {typed(run)} --kill"
        say(f"it gives no sign of life; {kills} ends it, and what is checkpointed is kept")
    if wait:
        while (found := look(run)).work is not None:
            time.sleep(0.2)
        if job:
            say(f"the {job} has ended; {_goes_on(run, work.task, found.state)}")
        else:
            then = "" if found.state == "done" else f"; {_goes_on(run, work.task, found.state)}"
            say(f"{run.id} is {found.state}{then}")
    return ExitCode.DONE


def _goes_on(run: RunDirectory, task: str, state: str) -> str:
    """How what was stopped is taken up again. A job keeps nothing: it is begun anew, and costs its run
    nothing."""
    if not is_job(task):
        return f"{types(run, 'resume')} goes on"
    again = f": {types(run, JOBS[task][1].removeprefix('eqat '))} begins it anew" if task in JOBS else ""
    return f"the run stays {state}{again}"


def kill(run: RunDirectory) -> int:
    """End an engine that does not answer, and return when it is gone."""
    killed = kill_engine(run)
    say(f"killed {killed}; {_left_of(run, load_state(run, skip=BULK))}")
    return ExitCode.DONE


def _left_of(run: RunDirectory, state: RunState) -> str:
    """What a run that broke off leaves, and how it goes on; of a job, that the run is what it was."""
    if state.job is not None:
        found = sight_of(run).look().state
        if found == "done" or state.at_work is state.job or state.job.outcome != "failed":
            return _goes_on(run, state.job.task, found)
    if state.checkpoint is None:
        return f"nothing was checkpointed yet: {types(run, 'resume')} begins anew"
    return f"what was checkpointed is kept: {types(run, 'resume')} goes on"


def kill_engine(run: RunDirectory) -> str:
    """Kill the engine of ``run`` and wait until it is gone; what was killed, in words."""
    pid = holder(run.lock_path)
    if pid is None or not opened_by(run.lock_path, pid):
        return _kill_elsewhere(run, pid)
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # it was faster
    except OSError as error:
        raise PreflightError(f"process {pid} cannot be killed: {error.strerror}", where=run.id) from error
    deadline = time.monotonic() + KILL_SECONDS
    while is_held(run.lock_path):
        if time.monotonic() > deadline:
            raise PreflightError(
                f"process {pid} was killed and is not gone yet: it waits for a disk or a driver",
                where=run.id,
                hint="nothing but that, or a restart of this machine, ends it",
            )
        time.sleep(0.05)
    return f"process {pid}"


def _kill_elsewhere(run: RunDirectory, pid: int | None) -> str:
    """The same of one that is no process of this machine, as far as there is a way; ``pid`` has the lock."""
    status = read_status(run)
    away = lives_elsewhere(run, status, time.time())
    if pid is None and not away:
        raise UsageError(f"is not running ({run_state(run)})", where=run.id)
    job = job_at_work(run)
    if job is not None:
        end_job(run, job)
        return f"job {job.job}"
    launched = read_launched(run)
    started = launched.host if launched is not None else "an unknown host"
    pid, host = (status.pid, status.host) if away and status is not None else (pid, started)
    raise PreflightError(
        f"its engine (process {pid}, started on {host}) cannot be killed from here",
        where=run.id,
        hint="it runs on another host, in another container or as another user; kill it there",
    )


def follow(
    run: RunDirectory, *, engine: Callable[[], int] | None, as_json: bool, told: Told | None = None
) -> int:
    """Follow to the end, then print the report, or what ``told`` makes of the run.

    ``engine`` starts it, unless it runs already.
    """
    follower = Follower(run, open_display())
    follower.catch_up()  # before the launch: what a former attempt did is not told again
    try:
        code = follower.follow(start=engine, on_interrupt="leave" if engine is None else "stop")
    except Left:
        say(f"left; the engine goes on: {types(run, 'attach')}, {types(run, 'stop')}")
        return ExitCode.DONE if engine is None else ExitCode.ABORTED
    if load_user_config().notify.bell:
        ring()
    shown = show_run(run)
    if as_json:
        print_json(shown)
    elif told is not None and code == ExitCode.DONE:
        show(told(shown))
    elif shown["exports"] or any(value is not None for value in shown["perplexity"].values()):
        show(report(shown, with_end=False))  # the display has told it
    _tell_end(run, follower.state, code)
    return code


def _tell_end(run: RunDirectory, state: RunState, code: int) -> None:
    """How what was followed has ended, and how it goes on."""
    if state.job is not None and code in (ExitCode.STOPPED, ExitCode.ABORTED, ExitCode.TERMINATED):
        say(f"{'stopped' if code == ExitCode.STOPPED else 'aborted'}; {_left_of(run, state)}")
    elif code == ExitCode.STOPPED:
        say(f"stopped; {types(run, 'resume')} goes on")
    elif code in (ExitCode.ABORTED, ExitCode.TERMINATED):
        say(f"aborted; {_left_of(run, state)}")
    elif code != ExitCode.DONE:
        if code == ExitCode.BUG:
            log = log_path(run, state.newest_attempt)
            say(f"log: {shorten(f'{sight_of(run).place}/{log.relative_to(run.path)}')}")
        say(_left_of(run, state))
