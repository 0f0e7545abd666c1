"""The commands. Each is short: it reads what was typed, asks ``engine.run``, and prints.

Data goes to stdout and narration to stderr. A mistake of the user's is one line and a documented exit code,
never a traceback; with ``--json`` it is also an object on stdout. Imports that cost time wait until a command
needs them, so that ``eqat --help`` answers at once.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from engine import __version__
from engine.config.formats import DEFAULT_FORMAT, FORMATS
from engine.errors import EqatError, ExitCode, UsageError
from engine.system.standard_streams import open_standard_streams

app = typer.Typer(
    name="eqat",
    help="Quantization-aware training of language models to 2, 3 and 4 bits, on one GPU, from a terminal.",
    epilog="Exit codes: 0 done, 1 bug, 2 usage, 3 cannot start here, 4 data, 5 not finite, 6 out of memory, "
    "7 disk full, 8 identity mismatch, 75 stopped and resumable, 130 aborted.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _folder(text: str) -> Path:
    """A variable that is not set must not mean the current folder."""
    if not text:
        raise UsageError("is empty", where="--runs-dir", hint="name a folder, or leave it out")
    return Path(text)


RunsDir = Annotated[
    Path | None,
    typer.Option(
        "--runs-dir",
        parser=_folder,
        metavar="FOLDER",
        help="Where runs are kept; else $EQAT_RUNS_DIR, else ./runs.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Target = Annotated[str, typer.Argument(metavar="PRESET|FILE", help="A preset, or a .toml file.")]
Run = Annotated[str, typer.Argument(metavar="RUN", help="An id or its beginning, a path, or latest.")]
Model = Annotated[
    str | None, typer.Option("--model", help="Local directory, hub id, .gguf file, or random://tiny-llama.")
]
Bits = Annotated[int | None, typer.Option("--bits", help="Bits per weight: 2, 3, 4 or 8.")]
GroupSize = Annotated[
    int | None, typer.Option("--group-size", help="Weights that share a scale; -1 for the whole row.")
]
Data = Annotated[
    str | None, typer.Option("--data", help="Calibration text: builtin, a shortcut, a hub id, or a path.")
]
Device = Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any field of the configuration; repeatable."),
]
Detach = Annotated[bool, typer.Option("--detach", help="Print the run's id and return at once.")]
Ascii = Annotated[bool, typer.Option("--ascii", help="In the app: ASCII characters only.")]
ReadOnly = Annotated[bool, typer.Option("--read-only", help="In the app: look, and change nothing.")]
RemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run Python code that the model's repository ships, with your rights. Only for repositories "
        "you have read.",
    ),
]


# -- before any command --------------------------------------------------------------------------------


def _version(wanted: bool) -> None:
    if wanted:
        from eqat_tui.output import show

        show(f"eqat {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def overview(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    ascii_only: Ascii = False,
    read_only: ReadOnly = False,
) -> None:
    """Quantization-aware training of language models to 2, 3 and 4 bits, on one GPU, from a terminal.

    Without a command it opens the terminal app.
    """
    if context.invoked_subcommand is not None:
        return
    from eqat_tui.terminal import Look, can_open_app, open_app

    if can_open_app():
        raise typer.Exit(open_app(None, look=Look(ascii_only, read_only)))
    from eqat_tui.output import show
    from eqat_tui.overview import overview_text

    show(overview_text())


# -- starting and following ----------------------------------------------------------------------------


@app.command()
def run(
    target: Target,
    model: Model = None,
    bits: Bits = None,
    group_size: GroupSize = None,
    data: Data = None,
    device: Device = None,
    settings: Settings = None,
    trust_remote_code: RemoteCode = False,
    runs_dir: RunsDir = None,
    detach: Detach = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and start nothing.")] = False,
    as_json: Json = False,
) -> int:
    """Quantize a model: start a run and follow it. Ctrl-C stops it resumably; twice aborts it.

    Closing the terminal never ends a run: eqat attach RUN follows it again.
    """
    from engine.plan.plan import check, make_plan
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
        settings=settings or (),
        trust_remote_code=trust_remote_code,
    )
    place = default_runs_dir(runs_dir)
    if dry_run:
        return actions.print_plan(config, place, as_json=as_json)
    check_runs_dir(place)  # before its room: what cannot be written often has none either
    check(make_plan(config, runs_dir=place))
    return actions.start(RunDirectory.create(place, config), detach=detach, as_json=as_json)


@app.command()
def plan(
    target: Target,
    model: Model = None,
    bits: Bits = None,
    group_size: GroupSize = None,
    data: Data = None,
    device: Device = None,
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
        settings=settings or (),
        trust_remote_code=trust_remote_code,
    )
    return actions.print_plan(config, default_runs_dir(runs_dir), as_json=as_json)


@app.command()
def resume(
    run: Run,
    from_block: Annotated[
        int | None,
        typer.Option("--from-block", min=0, metavar="K", help="Train blocks K... again, in a new run."),
    ] = None,
    settings: Settings = None,
    runs_dir: RunsDir = None,
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
    from eqat_tui import actions
    from eqat_tui.configure import parse_settings

    found = actions.find(run, runs_dir)
    overrides = parse_settings(settings or ())
    if from_block is not None:
        return actions.redo(found, from_block, overrides, detach=detach, as_json=as_json)
    return actions.resume(found, overrides, detach=detach, as_json=as_json)


@app.command()
def attach(
    run: Run,
    runs_dir: RunsDir = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Lines of progress instead of the app, as in a pipe.")
    ] = False,
    read_only: ReadOnly = False,
    ascii_only: Ascii = False,
    as_json: Json = False,
) -> int:
    """Show a run again, from any terminal, as often as wanted. Leaving never ends it.

    In a pipe, with --plain or --json it follows the run in lines until its end and exits as the run does.
    """
    from engine.run.liveness import run_state
    from engine.run.status import read_launched
    from eqat_tui import actions
    from eqat_tui.terminal import Look, can_open_app, open_app

    found = actions.find(run, runs_dir)
    if run_state(found) == "created" and read_launched(found) is None:
        raise UsageError("was never started", where=found.id, hint=f"eqat resume {found.id} starts it")
    if can_open_app() and not (plain or as_json):
        return open_app(runs_dir, run=found, look=Look(ascii_only, read_only))
    return actions.follow(found, engine=None, as_json=as_json)


@app.command()
def replay(
    run: Run,
    speed: Annotated[float, typer.Option("--speed", min=0.1, help="Times as fast as it was.")] = 10.0,
    runs_dir: RunsDir = None,
    ascii_only: Ascii = False,
) -> int:
    """Show a run from its beginning again, from its log, at any speed."""
    from eqat_tui import actions
    from eqat_tui.terminal import Look, open_app, require_terminal

    found = actions.find(run, runs_dir)
    require_terminal("eqat replay", hint=f"eqat show {found.id} prints its result")
    return open_app(runs_dir, run=found, replay_speed=speed, look=Look(ascii_only, True))


@app.command()
def monitor(runs_dir: RunsDir = None, ascii_only: Ascii = False) -> int:
    """Show this machine's GPU and host memory live, with history and processes."""
    from eqat_tui.terminal import Look, open_app, require_terminal

    require_terminal("eqat monitor", hint="eqat doctor --quick prints what is free")
    return open_app(runs_dir, mode="memory", look=Look(ascii_only))


@app.command()
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


# -- looking -------------------------------------------------------------------------------------------


@app.command()
def runs(
    runs_dir: RunsDir = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=0, help="At most so many; 0 for all.")] = 0,
    as_json: Json = False,
) -> None:
    """List the runs, newest first."""
    from engine.run.finding import default_runs_dir, list_runs
    from eqat_tui.actions import summaries as summaries_of
    from eqat_tui.output import print_json, say, show
    from eqat_tui.run_text import runs_table

    place = default_runs_dir(runs_dir)
    summaries = summaries_of(list_runs(place)[: limit or None])
    if as_json:
        print_json(summaries)
    elif summaries:
        show(runs_table(summaries))
    else:
        say(f"no runs in {place}; eqat run demo makes one")


@app.command()
def show(run: Run, runs_dir: RunsDir = None, as_json: Json = False) -> None:
    """Show one run: perplexity, size, time, memory, exports."""
    from engine.run.shown import show as show_run
    from eqat_tui import actions
    from eqat_tui.output import print_json
    from eqat_tui.output import show as show_text
    from eqat_tui.run_text import report

    shown = show_run(actions.find(run, runs_dir))
    if as_json:
        print_json(shown)
    else:
        show_text(report(shown))


@app.command()
def presets(as_json: Json = False) -> None:
    """List the presets: complete configurations to start from."""
    from eqat_tui.output import print_json, show, table
    from eqat_tui.overview import preset_rows

    rows = preset_rows()
    if as_json:
        print_json(rows)
    else:
        cells = [(row["name"], f"w{row['bits']}g{row['group_size']}", row["description"]) for row in rows]
        show(table(cells, header=("PRESET", "GRID", "")))


@app.command()
def doctor(
    runs_dir: RunsDir = None,
    quick: Annotated[bool, typer.Option("--quick", help="Leave out the smoke run.")] = False,
    as_json: Json = False,
) -> int:
    """Check this machine: is everything here that runs need?

    Packages, GPU, memory, disk, presets; last, a run of every phase on a tiny model, which takes seconds.
    """
    import msgspec

    from engine.run.finding import default_runs_dir
    from eqat_tui.doctor import diagnose
    from eqat_tui.output import one_line, print_json, show

    checks = []
    for check in diagnose(default_runs_dir(runs_dir), quick=quick):
        checks.append(check)
        if not as_json:
            hint = f" ({check.hint})" if check.hint else ""
            show(f"{check.status:8} {one_line(f'{check.name}: {check.detail}{hint}')}")
    failed = [check.name for check in checks if check.status == "failed"]
    if as_json:
        print_json({"ok": not failed, "checks": [msgspec.to_builtins(check) for check in checks]})
    return ExitCode.PREFLIGHT if failed else ExitCode.DONE


# -- more work on a finished run -----------------------------------------------------------------------


@app.command("eval")
def evaluate(
    run: Annotated[str, typer.Argument(metavar="RUN|PATH", help="A run, or a path inside one.")],
    runs_dir: RunsDir = None,
    detach: Detach = False,
    as_json: Json = False,
) -> int:
    """Measure the perplexity of a run's quantized model again."""
    from eqat_tui import actions

    found = actions.find(actions.run_of(run), runs_dir)
    return actions.start(found, args=("--task", "eval"), detach=detach, as_json=as_json)


@app.command()
def export(
    run: Run,
    format: Annotated[str, typer.Option("--format", help=f"{', '.join(FORMATS.names())}.")] = DEFAULT_FORMAT,
    to: Annotated[
        Path | None, typer.Option("--to", metavar="FOLDER", help="Copy the verified checkpoint here as well.")
    ] = None,
    runs_dir: RunsDir = None,
    detach: Detach = False,
    as_json: Json = False,
) -> int:
    """Write a run's packed checkpoint again, and verify it."""
    from engine.system.copying import check_target
    from eqat_tui import actions

    if format not in FORMATS:
        raise UsageError(f"there is no format {format!r}", where="--format", hint=", ".join(FORMATS.names()))
    args = ["--task", "export", "--format", format]
    found = actions.find(run, runs_dir)
    if to is not None:
        to = Path(os.path.expanduser(to)).absolute()
        check_target(to, found.path)
        args += ["--to", str(to)]
    return actions.start(found, args=args, detach=detach, as_json=as_json)


@app.command()
def generate(
    run: Run,
    prompt: Annotated[str, typer.Option("--prompt", help="What the models are to continue.")],
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=1, help="At most so many.")] = 64,
    runs_dir: RunsDir = None,
    as_json: Json = False,
) -> int:
    """Let the full-precision and the quantized model continue a prompt, side by side."""
    from eqat_tui import actions
    from eqat_tui.run_text import samples

    if not prompt.strip():
        raise UsageError("is empty", where="--prompt", hint="give the models something to continue")
    args = ("--task", "generate", f"--prompt={prompt}", "--new-tokens", str(new_tokens))
    found = actions.find(run, runs_dir)
    return actions.start(found, args=args, detach=False, as_json=as_json, told=samples)


# -- housekeeping --------------------------------------------------------------------------------------


@app.command()
def rm(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Ids or their beginnings, or paths.")],
    runs_dir: RunsDir = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> int:
    """Delete runs, with everything in them. Blocks that another run shares stay there.

    Only what is proven to be a run is deleted: a folder with a run's configuration and folders, with nothing
    else at its top, and no link.
    """
    from eqat_tui.housekeeping import delete

    return delete(runs, runs_dir, yes=yes)


@app.command()
def gc(
    runs: Annotated[list[str] | None, typer.Argument(metavar="[RUN...]", help="Only these runs.")] = None,
    runs_dir: RunsDir = None,
    tokens: Annotated[bool, typer.Option("--tokens", help="Forget tokenized text as well.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be freed.")] = False,
    as_json: Json = False,
) -> int:
    """Free what runs can make again: stored activations, old checkpoint generations, half-written files.

    A run that is being worked on is left alone, and so is what no run makes. What was trained stays.
    """
    from engine.run.finding import default_runs_dir, list_runs
    from eqat_tui import actions
    from eqat_tui.housekeeping import clean

    place = default_runs_dir(runs_dir)
    chosen = [actions.find(ref, runs_dir) for ref in runs] if runs else list_runs(place)
    return clean(chosen, place, tokens=tokens, dry_run=dry_run, as_json=as_json)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The ``eqat`` program."""
    open_standard_streams()  # before anything opens a file
    # Whatever the umask allows, nobody else may write into a run or a folder above it that is made here.
    os.umask(os.umask(0o022) | 0o022)
    if hasattr(signal, "SIGPIPE"):
        # A reader that has seen enough (eqat runs | head) ends us quietly, as it does every Unix filter.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    given = list(sys.argv[1:] if arguments is None else arguments)
    code = _run_command(given)
    from eqat_tui.output import end

    end(code)


def _run_command(arguments: list[str]) -> int:
    from eqat_tui.output import print_error, say

    try:
        code = app(args=arguments, prog_name="eqat", standalone_mode=False)
    except EqatError as error:
        problem = error
    except Exception as error:
        # Typer's own complaints (an unknown option, a letter where a number belongs) carry this method;
        # which class they are depends on its release. Anything else is a bug and keeps its traceback.
        words = getattr(error, "format_message", None)
        if words is None:
            if type(error).__name__ == "Abort":  # Ctrl-C before there was anything to stop
                return ExitCode.ABORTED
            say(traceback.format_exc())  # what a bug's traceback quotes may be foreign words too
            return ExitCode.BUG
        problem = UsageError(words().rstrip("."), hint="eqat --help")
    else:
        return int(code or 0)
    print_error(problem, as_json="--json" in arguments)
    return int(problem.exit_code)
