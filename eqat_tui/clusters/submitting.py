"""Giving runs to Slurm: one as a job, those of a sweep as an array of jobs.

The runs are made here, in a folder that the cluster's nodes see too, before Slurm hears of them. Whether a
run fits is judged where it runs: this machine's memory and GPUs say nothing of it."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path

from engine.config.run import RunConfig
from engine.config.sweeps import Combination, settings_words
from engine.errors import EqatError, ExitCode, UsageError
from engine.plan.plan import make_plan
from engine.run import slurm
from engine.run.directory import RunDirectory
from engine.run.finding import check_runs_dir, typed, typed_path
from engine.run.housekeeping import delete_run
from engine.run.launch import python_environment, refuse_second
from engine.run.members import is_at_work, state_of
from engine.run.submitted import Submitted, write_submitted
from engine.run.sweep import Member, Sweep, show_sweep
from eqat_tui.clusters.asked import AskedOfSlurm
from eqat_tui.clusters.script import array_of, literal, named, script
from eqat_tui.output import cell, counted, error_words, one_line, print_json, say, show
from eqat_tui.sweep_members import note
from eqat_tui.sweep_text import sweep_text


def submit_new(
    config: RunConfig, runs_dir: Path, asked: AskedOfSlurm, *, dry_run: bool, as_json: bool
) -> int:
    """Make a run and give it to Slurm."""
    _check(config)
    if dry_run:
        return _tell(Path("RUN"), asked.options([config]), runs_dir)
    check_runs_dir(runs_dir)
    slurm.require_slurm()
    run = RunDirectory.create(runs_dir, config)
    try:
        return submit_run(run, (), asked, as_json=as_json)
    except UsageError:  # Slurm has refused it: what was typed is to be typed again, and makes another
        delete_run(run)
        raise


def submit_run(
    run: RunDirectory,
    args: Sequence[str],
    asked: AskedOfSlurm,
    *,
    as_json: bool,
    config: RunConfig | None = None,
) -> int:
    """Give a run that nobody works on to Slurm; ``args`` are its engine's, which make its configuration
    ``config`` this time."""
    run.require_own()
    refuse_second(run)
    name, place = job_name(run.path.name), run.path.resolve()
    log = literal(place / run.logs_dir.name) + "/slurm-%j.log"
    options = [*named(name, log), *asked.options([config or run.config()])]
    job = slurm.submit(script(place, args), options, python_environment())
    write_submitted(run, Submitted(job=job, name=name, cluster=slurm.cluster(), t=time.time()))
    if as_json:
        print_json({"id": run.id, "path": str(run.path), "job": job})
    else:
        show(run.id)
        name = typed(run)
        say(f"given to Slurm as job {job}; eqat attach {name} follows it, eqat stop {name} ends it")
    return ExitCode.DONE


def submit_sweep(sweep: Sweep, asked: AskedOfSlurm, *, together: int, as_json: bool) -> int:
    """Give Slurm every run of a sweep that is not done and that nobody works on, ``together`` at a time (0:
    any number). One that cannot be made stops no other."""
    say(f"sweep {sweep.id}")
    with sweep.held():
        numbers = [number for number in range(len(sweep.members)) if _made(sweep, number)]
        if numbers:
            _submit_members(sweep, numbers, asked, together)
    shown = show_sweep(sweep)
    if as_json:
        print_json(shown)
    else:
        show(sweep_text(shown))
        say(f"eqat sweep show {typed_path(sweep.path)} shows how far it is")
    failed = next((member.error for member in sweep.members if member.error is not None), None)
    return failed.exit_code if failed is not None else ExitCode.DONE


def _submit_members(sweep: Sweep, numbers: Sequence[int], asked: AskedOfSlurm, together: int) -> None:
    name = job_name(sweep.id)
    log = literal(sweep.path.resolve()) + "/slurm-%A_%a.log"
    tasks = [number + 1 for number in numbers]
    configs = [sweep.members[number].configuration() for number in numbers]
    options = [*named(name, log, array_of(tasks, together)), *asked.options(configs)]
    job = slurm.submit(script(sweep.path.resolve()), options, python_environment())
    for number, task in zip(numbers, tasks, strict=True):
        run = sweep.run_of(sweep.members[number])
        if run is not None:
            write_submitted(
                run, Submitted(job=f"{job}_{task}", name=name, cluster=slurm.cluster(), t=time.time())
            )
    say(f"given to Slurm as job {job}: {counted(len(tasks), 'run')}")


def _made(sweep: Sweep, number: int) -> bool:
    """Whether a run of the sweep is there for a job to work on; what prevents it is written down and told."""
    member = sweep.members[number]
    run = sweep.run_of(member)
    if run is not None and (state_of(run) == "done" or is_at_work(run)):
        return False
    try:
        if run is None:
            _new_run(sweep, member)
        else:
            refuse_second(run)
        note(sweep, member, None)
    except EqatError as error:
        say(f"{number + 1} {cell(settings_words(member.settings))}: error: {one_line(error_words(error))}")
        note(sweep, member, error)
        return False
    return True


def _new_run(sweep: Sweep, member: Member) -> None:
    config = member.configuration()
    _check(config)

    def announce(run_id: str) -> None:
        member.run = run_id
        sweep.write()

    RunDirectory.create(sweep.runs_dir, config, announce=announce)


def new_sweep(target: str, found: Sequence[Combination], runs_dir: Path) -> Sweep:
    """A sweep whose runs are to be given to Slurm."""
    check_runs_dir(runs_dir)
    slurm.require_slurm()
    return Sweep.create(runs_dir, target, found)


def dry_sweep(found: Sequence[Combination], runs_dir: Path, asked: AskedOfSlurm, together: int) -> int:
    """Print what Slurm would be given for a sweep."""
    array = array_of(range(1, len(found) + 1), together)
    options = asked.options([one.config for one in found])
    return _tell(Path("SWEEP"), [f"--array={array}", *options], runs_dir)


def _tell(name: Path, options: Sequence[str], runs_dir: Path) -> int:
    """What sbatch would be given, as it could be kept and changed."""
    head, _, last = script(runs_dir.resolve() / name).rpartition("exec ")
    show(head + "".join(f"#SBATCH {option}\n" for option in options) + f"exec {last}".rstrip("\n"))
    return ExitCode.DONE


def _check(config: RunConfig) -> None:
    """What is wrong with a run wherever it is made: its model, its text, what its grid cannot hold."""
    make_plan(config, device="cpu")


def job_name(name: str) -> str:
    """What the job of a run or of a sweep is called."""
    return "eqat-" + re.sub(r"[^A-Za-z0-9._+-]", "-", name)[:200]
