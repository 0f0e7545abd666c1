"""One attempt at one run: from what was asked for to an exit code. Whatever ends it is told in the run."""

from __future__ import annotations

import contextlib
import traceback

from engine.config.derived import resolve
from engine.config.fields import is_operational
from engine.config.overrides import apply_overrides
from engine.config.run import RunConfig
from engine.config.tables import load_extensions
from engine.config.validation import validate
from engine.errors import DamagedRun, EqatError, ExitCode, IdentityError, StopRequested, run_is_gone
from engine.run import event_log, events
from engine.run.directory import RunDirectory
from engine.run.launch import this_attempt
from engine.run.state import load_state
from engine.run.task import Asked, check_prompt


def attempt(run: RunDirectory, asked: Asked) -> int:
    """Do what was asked for, with the run's lock held; the exit code.

    Raises:
        EqatError: for what cannot be begun; whoever follows the run has been told.
    """
    number = this_attempt(run)
    # What is done with a finished run cannot undo what it is.
    leaves = load_state(run, skip=events.BULK).outcome if asked.task != "run" else None
    try:
        run.require_own()
        load_extensions()
        config = _configuration(run, asked)
        from engine.offline import everything_is_local, offline

        with offline(everything_is_local(config)):
            return _work(run, config, number, asked, leaves)
    except EqatError as error:
        _record_refusal(run, number, error, leaves)
        raise


def _configuration(run: RunDirectory, asked: Asked) -> RunConfig:
    """The run's, with what is asked for this time."""
    for name in asked.overrides:
        if not is_operational(name):
            raise IdentityError(
                "decides what is computed, so a run cannot go on with another value",
                where=name,
                hint=f"eqat resume {run.id} --from-block K --set ... makes a new run of it",
            )
    config = resolve(apply_overrides(run.config(), asked.overrides))
    validate(config)
    if asked.task == "generate":
        check_prompt(asked.prompt, asked.new_tokens)
    return config


def _record_refusal(run: RunDirectory, number: int, error: EqatError, leaves: events.Outcome | None) -> None:
    """What ends an attempt before there is a reporter; whoever follows the run reads only its events."""
    from engine.reporter import error_event

    with contextlib.suppress(EqatError), event_log.EventWriter(run.events_path, number) as writer:
        writer.emit(error_event(error))
        code = int(error.exit_code)
        writer.emit(events.RunFinished(outcome="failed", exit_code=code, seconds=0.0, leaves=leaves))


def _work(
    run: RunDirectory, config: RunConfig, number: int, asked: Asked, leaves: events.Outcome | None
) -> int:
    """The attempt, once it is known what it is; everything that ends it is told."""
    # Imported here, once the lock is held and the configuration is known to be good: torch takes seconds.
    from engine.failures import as_eqat_error
    from engine.pipeline import Pipeline
    from engine.plan.plan import Plan, check, make_plan
    from engine.process import choose_device, prepare_process, started_event
    from engine.reporter import Reporter
    from engine.telemetry import Telemetry

    device = choose_device(config.runtime.device)
    report = Reporter(run, number, device)
    report.listen()
    telemetry = Telemetry(device, run.path, report.emit)
    outcome: events.Outcome = "done"
    code = ExitCode.DONE
    plan: Plan | None = None
    try:
        prepare_process(config.runtime, device)
        report.emit(started_event(run, device, asked.task, leaves))
        plan = make_plan(config, device=str(device), runs_dir=run.path)
        report.emit(events.Plan(plan=plan.to_dict()))
        # What is done with a finished run waits for room, as the run itself does once it works.
        check(plan, waits_for_room=asked.task != "run")
        Pipeline(run, config, plan, report, device, asked)()
    except StopRequested as stop:
        outcome, code = ("aborted" if stop.abort else "stopped"), stop.exit_code
    except BaseException as error:
        failure = as_eqat_error(error, report.position(), config, plan.machine if plan else None)
        if report.is_gone():  # whatever broke because of it
            failure = run_is_gone(run.path)
        if failure.exit_code == ExitCode.BUG:
            traceback.print_exc()
        if isinstance(failure, DamagedRun):
            leaves = None  # what the run was is lost in part, and it can be resumed
        report.fail(failure)
        outcome, code = "failed", failure.exit_code
    finally:
        telemetry.close()
        exported = asked.task == "export" and outcome == "done"
        report.finish(outcome, code, leaves=None if exported else leaves)
        report.close()
    return int(code)
