"""``python -m engine RUN_DIR``: run what the directory's config.toml says, to its end or to a stop."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from pathlib import Path
from typing import get_args

# OpenMP threads that wait for each other by spinning take the core from the very thread they wait for as soon
# as anything else runs on this machine. By default they spin for so long that a training step on two shared
# cores took 2.1 s instead of 0.3; not spinning at all costs half the speed of an idle machine. This many
# turns keeps both. It is read when torch loads its OpenMP library, so it is set before anything imports
# torch.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

from engine.attempt import attempt, follow, place_in
from engine.config.model import BeginOfText
from engine.errors import EqatError, ExitCode
from engine.run.control import STOP_SIGNALS
from engine.run.directory import RunDirectory
from engine.run.elsewhere import refuse_if_elsewhere
from engine.run.lock import RunLock
from engine.run.measured import How
from engine.run.task import NEW_TOKENS, Asked, Task
from engine.system.printable import printable
from engine.system.standard_streams import finish_output, open_standard_streams


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code; everything else it has to say goes into the run directory."""
    open_standard_streams()
    parser = argparse.ArgumentParser(prog="python -m engine", description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--task", choices=get_args(Task), default="run")
    parser.add_argument("--format", action="append", help="with --task export: only this format; repeatable")
    parser.add_argument("--to", type=Path, metavar="FOLDER", help="with --task export: where a copy goes")
    parser.add_argument("--prompt", default="", help="with --task generate: what the models continue")
    parser.add_argument(
        "--new-tokens", type=int, default=NEW_TOKENS, help="with --task generate: at most so many"
    )
    parser.add_argument("--text", action="append", default=[], help="with --task eval: on this; repeatable")
    parser.add_argument("--context", type=int, help="with --task eval: in windows of so many tokens")
    parser.add_argument("--windows", type=int, help="with --task eval: at most so many of each text")
    parser.add_argument("--bos", choices=get_args(BeginOfText), help="with --task eval: how they begin")
    parser.add_argument("--ask", action="append", default=[], help="with --task eval: this task; repeatable")
    parser.add_argument("--task-limit", type=int, help="with --task eval: so many questions of each")
    parser.add_argument("--task-folder", help="with --task eval: of task files")
    parser.add_argument("--task-chat", action="store_true", default=None, help="with --task eval")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="an operational setting, this time"
    )
    parser.add_argument(
        "--allow-world-size-change", action="store_true", help="go on with another number of GPUs"
    )
    arguments = parser.parse_args(argv)
    overrides: dict[str, object] = dict(item.partition("=")[::2] for item in arguments.set)
    if arguments.format is not None:
        overrides["export.formats"] = arguments.format
    asked = Asked(
        task=arguments.task,
        overrides=overrides,
        prompt=arguments.prompt,
        new_tokens=arguments.new_tokens,
        export_to=arguments.to,
        allows_other_size=arguments.allow_world_size_change,
        how=How(
            texts=tuple(arguments.text),
            sequence_length=arguments.context,
            windows=arguments.windows,
            bos=arguments.bos,
            tasks=tuple(arguments.ask),
            task_limit=arguments.task_limit,
            task_folder=arguments.task_folder,
            task_chat=arguments.task_chat,
        ),
    )
    # Libraries create files too: whatever the umask allows, nobody else may write into a run.
    os.umask(os.umask(0o022) | 0o022)
    # A stop that is asked for while the libraries load waits until there is someone to hear it. Whoever sees
    # the lock taken may ask for one.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        run = RunDirectory.open(arguments.run_dir)
        place = place_in(run, asked)
        return follow(run, asked, place) if place is not None and place.rank else _attempt(run, asked)
    except EqatError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return int(error.exit_code)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def _attempt(run: RunDirectory, asked: Asked) -> int:
    """An attempt, with the run's lock held; afterwards its user is told, who may look at the run at once."""
    code = None
    try:
        with RunLock(run.lock_path):
            refuse_if_elsewhere(run)
            code = int(ExitCode.BUG)
            try:
                code = attempt(run, asked)
            except EqatError as error:
                code = int(error.exit_code)
                raise
    finally:
        if code is not None and asked.task == "run":
            from engine.run.notify import notify, occasion_of

            notify(run, occasion_of(code))
    return code


if __name__ == "__main__":
    code = main()
    with contextlib.suppress(EqatError):  # a log on a full disk
        finish_output()
    # Worker threads of libraries (data set readers, tokenizers) must not keep a finished run alive.
    os._exit(code)
