"""Commands that start a run, follow it, and end it."""

from __future__ import annotations

from typing import Annotated

import typer

from engine.errors import UsageError
from eqat_tui.clusters.asked import AskedOfSlurm
from eqat_tui.commands.cluster_options import on_a_cluster
from eqat_tui.commands.options import (
    Ascii,
    Bits,
    Data,
    Detach,
    Device,
    Gpus,
    GroupSize,
    Json,
    Model,
    ReadOnly,
    RemoteCode,
    Run,
    RunsDir,
    Settings,
    Target,
    run_ids,
)


@on_a_cluster
def run(
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
    slurm: AskedOfSlurm | None = None,
    detach: Detach = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and start nothing.")] = False,
    as_json: Json = False,
) -> int:
    """Quantize a model: start a run and follow it. Ctrl-C stops it resumably; twice aborts it.

    Closing the terminal never ends a run: eqat attach RUN follows it again. With --on slurm it is given to
    Slurm and this returns at once; --dry-run then prints the script."""
    from engine.plan.plan import check, make_plan
    from engine.ranks.place import refuse_one_of_several
    from engine.run.directory import RunDirectory
    from engine.run.finding import check_runs_dir, default_runs_dir
    from eqat_tui import actions
    from eqat_tui.configure import build_config

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
        here=slurm is None,
    )
    place = default_runs_dir(runs_dir)
    if slurm is not None:
        from eqat_tui.clusters.submitting import submit_new

        return submit_new(config, place, slurm, dry_run=dry_run, as_json=as_json)
    if dry_run:
        return actions.print_plan(config, place, as_json=as_json)
    refuse_one_of_several(config.runtime.gpus)
    check_runs_dir(place)  # before its room: what cannot be written often has none either
    check(make_plan(config, runs_dir=place))
    return actions.start(RunDirectory.create(place, config), detach=detach, as_json=as_json)


def plan(
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
    """Show what a run would need: memory, disk, time, final size. Loads nothing."""
    from engine.run.finding import default_runs_dir
    from eqat_tui import actions
    from eqat_tui.configure import build_config

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
    return actions.print_plan(config, default_runs_dir(runs_dir), as_json=as_json)


@on_a_cluster
def resume(
    run: Run,
    from_block: Annotated[
        int | None,
        typer.Option(
            "--from-block",
            min=0,
            metavar="K",
            help="Train blocks K... again, in a new run; blocks are counted from 0.",
        ),
    ] = None,
    gpus: Gpus = None,
    allow_world_size_change: Annotated[
        bool,
        typer.Option(
            "--allow-world-size-change",
            help="With --gpus: go on with another number of GPUs, to other last bits.",
        ),
    ] = False,
    settings: Settings = None,
    runs_dir: RunsDir = None,
    slurm: AskedOfSlurm | None = None,
    detach: Detach = False,
    as_json: Json = False,
) -> int:
    """Go on with a run that was stopped, failed or crashed, exactly where its last checkpoint is.

    That may be inside a block or inside E2E-QP. The result is the same as without the interruption, to the
    last bit on the same machine. --set changes what does not decide the result (runtime.*, export.*,
    e2e_qp.micro_batch_size ...), this time only.

    With --from-block K a new run is made that shares the blocks before K with this one and trains the others
    again, with whatever --set changes; K = the number of blocks repeats only the end-to-end training.
    """
    from engine.config.runtime import GPUS
    from eqat_tui import actions
    from eqat_tui.configure import parse_settings

    found = actions.find(run, runs_dir)
    overrides = parse_settings(settings or ())
    if gpus is not None:
        overrides[GPUS] = str(gpus)
    if from_block is not None:
        return actions.redo(found, from_block, overrides, slurm=slurm, detach=detach, as_json=as_json)
    other_size = allow_world_size_change
    return actions.resume(
        found, overrides, other_size=other_size, slurm=slurm, detach=detach, as_json=as_json
    )


def attach(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN|HOST:RUN",
            help="Any part of an id or name, a path, or latest; behind HOST: of another machine.",
            autocompletion=run_ids,
        ),
    ],
    runs_dir: RunsDir = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Lines of progress instead of the app, as in a pipe.")
    ] = False,
    read_only: ReadOnly = False,
    ascii_only: Ascii = False,
    as_json: Json = False,
    ssh_options: Annotated[
        list[str] | None,
        typer.Option(
            "--ssh-option",
            metavar="OPTION",
            help="Of HOST:RUN: an option of ssh, as '-p 2222'; repeatable. $EQAT_SSH replaces ssh.",
        ),
    ] = None,
    remote_command: Annotated[
        str | None,
        typer.Option(
            "--remote-command", metavar="COMMAND", help="Of HOST:RUN: what eqat is called over there."
        ),
    ] = None,
) -> int:
    """Show a run again, from any terminal, as often as wanted. Leaving never ends it.

    HOST:RUN is a run of another machine, over your own ssh; HOST is whatever ssh takes, and --runs-dir is
    over there. A lost connection is made again, and the run goes on meanwhile.

    In a pipe, with --plain or --json it follows the run in lines until its end and exits as the run does.
    """
    from eqat_tui.actions import find
    from eqat_tui.attaching import attach as attach_to
    from eqat_tui.remote import ssh
    from eqat_tui.terminal import Look

    app = None if plain or as_json else Look(ascii_only, read_only)
    there = ssh.split(run)
    if there is None:
        if ssh_options or remote_command:
            option = "--ssh-option" if ssh_options else "--remote-command"
            raise UsageError("is for a run of another machine, HOST:RUN", where=option)
        return attach_to(find(run, runs_dir), runs_dir, app=app, as_json=as_json)
    from eqat_tui.remote.mirror import attached

    host, ref = there
    destination = ssh.Destination(host, ssh.options_of(ssh_options or ()), remote_command or "eqat")
    with attached(destination, ref, runs_dir=None if runs_dir is None else str(runs_dir)) as found:
        return attach_to(found, None, app=app, as_json=as_json)


def tail_events(
    run: Run,
    offset: Annotated[
        int, typer.Option("--from", min=0, metavar="OFFSET", help="Byte of events.jsonl to begin at.")
    ] = 0,
    log: Annotated[
        str,
        typer.Option(
            "--log",
            metavar="MARK",
            help="What the log was known by; where that is another now, everything is told.",
        ),
    ] = "",
    once: Annotated[
        bool, typer.Option("--once", help="What there is now, instead of going on with what comes.")
    ] = False,
    runs_dir: RunsDir = None,
) -> int:
    """Print what happens in a run, as JSON lines, until nobody reads them any more.

    This is what eqat attach HOST:RUN reads over ssh: who speaks (hello), the run's small files (file), its
    events with the byte behind each (event), and who works on it (look), which is said at least every five
    seconds.
    """
    from eqat_tui import actions
    from eqat_tui.remote.telling import tell

    tell(actions.find(run, runs_dir), offset=offset, log=log, once=once)
    return 0


def replay(
    run: Run,
    speed: Annotated[float, typer.Option("--speed", min=0.1, help="Times as fast as it was.")] = 10.0,
    runs_dir: RunsDir = None,
    ascii_only: Ascii = False,
) -> int:
    """Show a run from its beginning again, from its log, at any speed."""
    from engine.run.finding import typed
    from eqat_tui import actions
    from eqat_tui.terminal import Look, open_app, require_terminal

    found = actions.find(run, runs_dir)
    require_terminal("eqat replay", hint=f"eqat show {typed(found)} prints its result")
    return open_app(runs_dir, run=found, replay_speed=speed, look=Look(ascii_only, True))


def stop(
    run: Run,
    runs_dir: RunsDir = None,
    abort: Annotated[bool, typer.Option("--abort", help="End with the exit code of an abort (130).")] = False,
    kill: Annotated[
        bool, typer.Option("--kill", help="Kill the engine, for one that does not answer.")
    ] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Return when the engine is gone.")] = False,
) -> int:
    """Ask a run to checkpoint at its next step and stop. eqat resume RUN goes on from there.

    --abort ends it without a new checkpoint, --kill without asking; both leave the last one.
    """
    from eqat_tui import actions

    found = actions.find(run, runs_dir)
    if kill:
        return actions.kill(found)
    return actions.stop(found, abort=abort, wait=wait)
