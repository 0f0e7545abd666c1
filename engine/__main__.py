"""``python -m engine RUN_DIR``: run what the directory's config.toml says, to its end or to a stop."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import get_args

# OpenMP threads that wait for each other by spinning take the core from the very thread they wait for as soon
# as anything else runs on this machine. By default they spin for so long that a training step on two shared
# cores took 2.1 s instead of 0.3; not spinning at all costs half the speed of an idle machine. This many
# turns keeps both. It is read when torch loads its OpenMP library, so it is set before anything imports
# torch.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

from engine.config.derived import resolve
from engine.config.fields import is_operational
from engine.config.overrides import apply_overrides
from engine.config.run import RunConfig
from engine.config.tables import load_extensions
from engine.config.validation import validate
from engine.errors import (
    DamagedRun,
    EqatError,
    ExitCode,
    IdentityError,
    StopRequested,
    UsageError,
    run_is_gone,
)
from engine.run import event_log, events
from engine.run.control import STOP_SIGNALS
from engine.run.directory import RunDirectory
from engine.run.launch import this_attempt
from engine.run.lock import RunLock
from engine.run.state import load_state
from engine.system.printable import printable
from engine.system.standard_streams import finish_output, open_standard_streams


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code; everything else it has to say goes into the run directory."""
    open_standard_streams()
    parser = argparse.ArgumentParser(prog="python -m engine", description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--task", choices=get_args(events.Task), default="run")
    parser.add_argument("--format", action="append", help="with --task export: only this format; repeatable")
    parser.add_argument("--to", type=Path, metavar="FOLDER", help="with --task export: where a copy goes")
    parser.add_argument("--prompt", default="", help="with --task generate: what the models continue")
    parser.add_argument(
        "--new-tokens", type=int, default=events.NEW_TOKENS, help="with --task generate: at most so many"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="an operational setting, this time"
    )
    arguments = parser.parse_args(argv)
    # Libraries create files too: whatever the umask allows, nobody else may write into a run.
    os.umask(os.umask(0o022) | 0o022)
    # A stop that is asked for while the libraries load waits until there is someone to hear it. Whoever sees
    # the lock taken may ask for one.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        run = RunDirectory.open(arguments.run_dir)
        with RunLock(run.lock_path):
            return _locked(run, arguments)
    except EqatError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return int(error.exit_code)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def _locked(run: RunDirectory, arguments: argparse.Namespace) -> int:
    """The attempt, with the lock held; a refusal is told where whoever follows the run reads it."""
    attempt = this_attempt(run)
    # What is done with a finished run cannot undo what it is.
    leaves = load_state(run, skip=events.BULK).outcome if arguments.task != "run" else None
    try:
        run.require_own()
        load_extensions()
        overrides: dict[str, object] = dict(item.partition("=")[::2] for item in arguments.set)
        if arguments.format is not None:
            overrides["export.formats"] = arguments.format
        return _attempt(run, attempt, arguments, overrides, leaves)
    except EqatError as error:
        _record_refusal(run, attempt, error, leaves)
        raise


def _record_refusal(run: RunDirectory, attempt: int, error: EqatError, leaves: events.Outcome | None) -> None:
    """What ends an attempt before there is a reporter; whoever follows the run reads only its events."""
    from engine.reporter import error_event

    with contextlib.suppress(EqatError), event_log.EventWriter(run.events_path, attempt) as writer:
        writer.emit(error_event(error))
        code = int(error.exit_code)
        writer.emit(events.RunFinished(outcome="failed", exit_code=code, seconds=0.0, leaves=leaves))


def _check_prompt(prompt: str, new_tokens: int) -> None:
    """What is wrong with a prompt is said before the model is opened."""
    if not prompt.strip():
        raise UsageError("is empty", where="--prompt", hint="give the models something to continue")
    try:
        # Bytes of an argument that are no text reach Python as lone surrogates.
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UsageError("is not valid UTF-8", where="--prompt", hint="type it anew") from error
    if new_tokens < 1:
        raise UsageError(f"{new_tokens} is no number of tokens", where="--new-tokens", hint="1 or more")


def _attempt(
    run: RunDirectory,
    attempt: int,
    arguments: argparse.Namespace,
    overrides: dict[str, object],
    leaves: events.Outcome | None,
) -> int:
    for name in overrides:
        if not is_operational(name):
            raise IdentityError(
                "decides what is computed, so a run cannot go on with another value",
                where=name,
                hint=f"eqat resume {run.id} --from-block K --set ... makes a new run of it",
            )
    config = resolve(apply_overrides(run.config(), overrides))
    validate(config)
    if arguments.task == "generate":
        _check_prompt(arguments.prompt, arguments.new_tokens)
    from engine.offline import everything_is_local, offline

    with offline(everything_is_local(config)):
        return _work(run, config, attempt, arguments, leaves)


def _work(
    run: RunDirectory,
    config: RunConfig,
    attempt: int,
    arguments: argparse.Namespace,
    leaves: events.Outcome | None,
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
    report = Reporter(run, attempt, device)
    report.listen()
    telemetry = Telemetry(device, run.path, report.emit)
    outcome: events.Outcome = "done"
    code = ExitCode.DONE
    plan: Plan | None = None
    try:
        prepare_process(config.runtime, device)
        report.emit(started_event(run, device, arguments.task, leaves))
        plan = make_plan(config, device=str(device), runs_dir=run.path)
        report.emit(events.Plan(plan=plan.to_dict()))
        # What is done with a finished run waits for room, as the run itself does once it works.
        check(plan, waits_for_room=arguments.task != "run")
        Pipeline(
            run,
            config,
            plan,
            report,
            device,
            arguments.task,
            prompt=arguments.prompt,
            new_tokens=arguments.new_tokens,
            export_to=arguments.to,
        )()
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
        exported = arguments.task == "export" and outcome == "done"
        report.finish(outcome, code, leaves=None if exported else leaves)
        report.close()
    return int(code)


if __name__ == "__main__":
    code = main()
    with contextlib.suppress(EqatError):  # a log on a full disk
        finish_output()
    # Worker threads of libraries (data set readers, tokenizers) must not keep a finished run alive.
    os._exit(code)
