"""The command line: its commands (:mod:`eqat_tui.commands`), and how each of them ends.

A mistake of the user's is one line and a documented exit code, never a traceback; with ``--json`` it is also
an object on stdout.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, NoReturn

import typer

from engine import __version__
from engine.config.tables import load_extensions
from engine.errors import EqatError, ExitCode, UsageError
from engine.system.standard_streams import open_standard_streams
from eqat_tui.commands import finished, importing, looking, own, queueing, running, sweeping, tidying
from eqat_tui.commands.options import Ascii, ReadOnly

app = typer.Typer(
    name="eqat",
    help="Quantization-aware training of language models to 2, 3 and 4 bits, on one GPU or more, from a "
    "terminal.",
    epilog="Exit codes: 0 done, 1 bug, 2 usage, 3 cannot start here, 4 data, 5 not finite, 6 out of memory, "
    "7 disk full, 8 identity mismatch, 75 stopped and resumable, 130 and 143 aborted, 137 killed.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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
    """Quantization-aware training of language models to 2, 3 and 4 bits, on one GPU or more, from a terminal.

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


MEANT: Mapping[str, str] = {
    "status": "show",
    "info": "show",
    "list": "runs",
    "ls": "runs",
    "sample": "generate",
    "evaluate": "eval",
    "benchmark": "bench",
    "speed": "bench",
    "start": "run",
    "quantize": "run",
    "train": "run",
    "follow": "attach",
    "logs": "attach",
    "diff": "compare",
    "track": "log-to",
    "watch": "attach",
    "delete": "rm",
    "remove": "rm",
    "clean": "gc",
    "kill": "stop",
    "abort": "stop",
    "continue": "resume",
    "estimate": "plan",
    "load": "import",
    "convert": "import",
    "upload": "push",
    "publish": "push",
    "config": "paths",
    "where": "paths",
}
"""Commands by what other programs call them; none of these is one of ours."""


COMMANDS: Mapping[str, Callable[..., int | None]] = {
    "run": running.run,
    "plan": running.plan,
    "resume": running.resume,
    "attach": running.attach,
    "tail-events": running.tail_events,
    "replay": running.replay,
    "memory": looking.memory,
    "stop": running.stop,
    "runs": looking.runs,
    "show": looking.show,
    "compare": looking.compare,
    "report": looking.report,
    "log-to": looking.log_to,
    "presets": looking.presets,
    "doctor": looking.doctor,
    "import": importing.import_checkpoint,
    "eval": finished.evaluate,
    "export": finished.export,
    "generate": finished.generate,
    "bench": finished.bench,
    "verify": looking.verify,
    "push": finished.push,
    "rm": tidying.rm,
    "gc": tidying.gc,
    "paths": own.paths,
    "notify": own.notify,
}
"""In the order of the help."""

for _name, _command in COMMANDS.items():
    app.command(_name)(_command)
app.add_typer(sweeping.app, name="sweep")
app.add_typer(queueing.app, name="queue")
# What eqat memory was called before the app had a screen that is called Monitor and shows something else.
app.command("monitor", hidden=True)(looking.memory)


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
        load_extensions()
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
        problem = UsageError(words().rstrip("."), hint=_help_of(error))
    else:
        return int(code or 0)
    print_error(problem, as_json="--json" in arguments)
    return int(problem.exit_code)


def _help_of(error: Exception) -> str:
    """Where to read on after a mistake in typing: the help of the command that it was made in."""
    context = getattr(error, "ctx", None)
    wrong = re.match(r"No such command '(.*)'", error.format_message())  # type: ignore[attr-defined]
    if wrong and wrong.group(1) in MEANT:
        return f"eqat {MEANT[wrong.group(1)]} is meant, perhaps; eqat --help"
    return f"{context.command_path if context is not None else 'eqat'} --help"
