"""One attempt at one run: from what was asked for to an exit code. Whatever ends it is told in the run."""

from __future__ import annotations

import contextlib
import os
import sys
import time
import traceback
from typing import TYPE_CHECKING

import msgspec

from engine.config.derived import resolve
from engine.config.fields import is_operational
from engine.config.overrides import apply_overrides
from engine.config.run import RunConfig
from engine.config.runtime import GPUS
from engine.config.tables import load_extensions
from engine.config.validation import validate
from engine.errors import (
    DamagedRun,
    EqatError,
    ExitCode,
    IdentityError,
    PreflightError,
    StopRequested,
    first_line,
    run_is_gone,
)
from engine.libraries import libraries
from engine.ranks.place import Place, place_of, rank_told
from engine.run import event_log, events
from engine.run.continued import continued_on
from engine.run.directory import RunDirectory
from engine.run.launch import this_attempt
from engine.run.measured import as_asked
from engine.run.state import load_state
from engine.run.status import LONGEST_FAILURE, Status, write_status
from engine.run.task import Asked, check_prompt
from engine.starting import Starting, starting
from engine.system.files import full_disk
from engine.system.printable import printable

REFUSALS = (ExitCode.USAGE, ExitCode.PREFLIGHT, ExitCode.IDENTITY)
"""Of what was asked for, rather than of anything that came of it."""
FIRST_PHASE = "prepare"

if TYPE_CHECKING:
    from engine.ranks.others import Others
    from engine.reporter import Reporter
    from engine.training.world import World


def attempt(run: RunDirectory, asked: Asked) -> int:
    """Do what was asked for, with the run's lock held; the exit code.

    Raises:
        EqatError: for what cannot be begun; whoever follows the run has been told.
    """
    number = this_attempt(run)
    # What is done with a finished run cannot undo what it is, nor can an attempt that is refused.
    before = load_state(run, skip=events.BULK).outcome
    leaves = before if asked.task != "run" else None
    with starting(run, number, asked.task, leaves) as voice:
        try:
            run.require_own()
            voice.begin("reading the configuration")
            load_extensions()
            config = _configuration(run, asked)
            voice.says("loading torch and transformers")
            from engine.offline import everything_is_local, offline

            read = as_asked(config, asked.how) if asked.how.is_asked else config
            with offline(everything_is_local(config) and everything_is_local(read)):
                return _work(run, config, number, asked, before, voice)
        except EqatError as error:
            voice.close()
            _record_refusal(run, number, asked, error, leaves if isinstance(error, DamagedRun) else before)
            raise
        except Exception as error:
            voice.close()
            failure = _not_started(error)
            if failure.exit_code == ExitCode.BUG:
                traceback.print_exc()
            _record_refusal(run, number, asked, failure, before)
            raise failure from error


def follow(run: RunDirectory, asked: Asked, place: Place) -> int:
    """Another process than the first of a run that several compute together; the exit code."""
    from engine.offline import everything_is_local, offline

    config = _configuration(run, asked)
    with offline(everything_is_local(config)):
        with libraries():
            from engine.ranks import follower

        return follower.work(run, config, this_attempt(run), place)


def place_in(run: RunDirectory, asked: Asked) -> Place | None:
    """Where this process stands among several that compute ``run`` together; none where it starts others
    itself, or is alone."""
    rank = rank_told()
    if asked.task != "run" or not rank:
        return None
    try:
        load_extensions()
        return place_of(_configuration(run, asked).runtime.gpus)
    except EqatError:
        if rank != "0":
            raise
        return None  # the attempt says it where it is heard


def _configuration(run: RunDirectory, asked: Asked) -> RunConfig:
    """The run's, with what is asked for this time."""
    for name in asked.overrides:
        # Of how many GPUs a checkpoint is, its own identity says.
        if not is_operational(name) and name != GPUS:
            raise IdentityError(
                "decides what is computed, so a run cannot go on with another value",
                where=name,
                hint=f"eqat resume {run.id} --from-block K --set ... makes a new run of it",
            )
    overrides = asked.overrides
    if asked.task == "run" and not asked.allows_other_size:
        overrides = {**continued_on(run), **overrides}
    config = resolve(apply_overrides(run.config(), overrides))
    validate(config)
    if asked.how.is_asked:
        as_asked(config, asked.how)  # what is wrong with it is said before anything is loaded
    if asked.task == "generate":
        check_prompt(asked.prompt, asked.new_tokens)
    return config


def _not_started(error: Exception) -> EqatError:
    """What it means that the libraries cannot be loaded; :mod:`engine.failures` needs them itself."""
    said = first_line(error) if str(error).strip() else type(error).__name__
    if full_disk(error) is not None:
        return EqatError(
            "the disk is full",
            exit_code=ExitCode.DISK_FULL,
            where=str(getattr(error, "filename", None) or "starting"),
            hint="free some space and start it again",
        )
    if isinstance(error, ImportError):
        return PreflightError(
            f"a library cannot be loaded: {said}", where="starting", hint="eqat doctor looks at all of them"
        )
    return EqatError(
        f"{type(error).__name__}: {said}",
        exit_code=ExitCode.BUG,
        where="starting",
        hint="this is a bug; the traceback is in the run's log",
    )


def _record_refusal(
    run: RunDirectory, number: int, asked: Asked, error: EqatError, leaves: events.Outcome | None
) -> None:
    """What ends an attempt before there is a reporter; whoever follows the run reads only its events, or on a
    full disk its status."""
    code = int(error.exit_code)
    with contextlib.suppress(EqatError), event_log.EventWriter(run.events_path, number) as writer:
        writer.emit(events.error_event(error))
        writer.emit(
            events.RunFinished(outcome="failed", exit_code=code, seconds=0.0, leaves=leaves, task=asked.task)
        )
    write_status(
        run,
        Status(
            heartbeat=time.time(),
            attempt=number,
            outcome=leaves or "failed",
            exit_code=code,
            failure=str(error)[:LONGEST_FAILURE],
        ),
    )


def _work(
    run: RunDirectory,
    config: RunConfig,
    number: int,
    asked: Asked,
    before: events.Outcome | None,
    voice: Starting,
) -> int:
    """The attempt, once it is known what it is; everything that ends it is told. ``before`` is how the one
    before it ended."""
    leaves = before if asked.task != "run" else None
    # Imported here, once the lock is held and the configuration is known to be good: torch takes seconds.
    with libraries():
        from engine.failures import as_eqat_error
        from engine.pipeline import Pipeline
        from engine.plan.plan import Plan, check, make_plan
        from engine.process import choose_device, prepare_process, started_event
        from engine.ranks.others import begin
        from engine.reporter import Reporter
        from engine.telemetry import Telemetry

    voice.says("looking for the device")
    gpus = config.runtime.gpus if asked.task == "run" else 1
    place = place_of(gpus)
    device = choose_device(config.runtime.device, gpus, place.local if place else 0)
    others: Others | None = None
    if gpus > 1:
        voice.says("starting the other processes")
        others = begin(run, _settings(asked, gpus), number, gpus, device, place)
    voice.close()
    report = Reporter(run, number, device, task=asked.task)
    report.listen()
    if others is not None:
        others.watch(report, lambda error: _end(run, report, error))
    emit = report.emit if others is None else others.with_readings(report.emit)
    telemetry = Telemetry(device, run.path, emit)
    outcome: events.Outcome = "done"
    code = ExitCode.DONE
    plan: Plan | None = None
    try:
        runtime = msgspec.structs.replace(config.runtime, gpus=gpus)
        prepare_process(runtime, device)
        report.emit(started_event(run, device, asked.task, leaves))
        planned = as_asked(config, asked.how) if asked.how.is_asked else config
        # What is done with a finished run is done by one process.
        planned = msgspec.structs.replace(planned, runtime=runtime)
        if asked.task not in ("run", "eval"):  # it asks no questions, so it need not be able to
            planned = apply_overrides(planned, {"evaluation.tasks": (), "evaluation.task_folder": ""})
        plan = make_plan(planned, device=str(device), runs_dir=run.path)
        report.emit(events.Plan(plan=plan.to_dict()))
        # What is done with a finished run waits for room, as the run itself does once it works.
        check(plan, waits_for_room=asked.task != "run")
        Pipeline(run, config, plan, report, device, asked, join=others.join if others else _alone)()
    except StopRequested as stop:
        outcome, code = ("aborted" if stop.abort else "stopped"), stop.exit_code
    except BaseException as raised:
        error = raised if others is None else others.why(raised)
        failure = as_eqat_error(error, report.position(), config, plan.machine if plan else None)
        if report.is_gone():  # whatever broke because of it
            failure = run_is_gone(run.path)
        if failure.exit_code == ExitCode.BUG:
            traceback.print_exc()
        if failure.exit_code in REFUSALS and report.phase_name == FIRST_PHASE:
            leaves = before
        if isinstance(failure, DamagedRun):
            leaves = None  # what the run was is lost in part, and it can be resumed
        report.fail(failure)
        if report.events.dropped:  # the log of events has no room; what was printed may lie elsewhere
            with contextlib.suppress(OSError):
                print(f"error: {printable(str(failure))}", file=sys.stderr, flush=True)
        outcome, code = "failed", failure.exit_code
    finally:
        if others is not None:
            others.close()
        telemetry.close()
        exported = asked.task == "export" and outcome == "done"
        report.finish(outcome, code, leaves=None if exported else leaves)
        report.close()
    return int(code)


def _settings(asked: Asked, gpus: int) -> list[str]:
    """The engine's arguments that change how it computes, and on how many GPUs."""
    given = {**asked.overrides, GPUS: gpus}
    return [part for name, value in given.items() for part in ("--set", f"{name}={value}")]


def _alone() -> World:
    from engine.training.world import ALONE

    return ALONE


def _end(run: RunDirectory, report: Reporter, error: EqatError) -> None:
    """Another process is lost, and this one waits for it in a library that does not come back."""
    from engine.run.notify import notify, occasion_of

    report.fail(error)
    report.finish("failed", error.exit_code)
    report.close()
    notify(run, occasion_of(int(error.exit_code)))
    os._exit(int(error.exit_code))
