"""Commands about this user's own: where things are kept, and messages about runs."""

from __future__ import annotations

from typing import Annotated

import typer

from eqat_tui.commands.options import Json, RunsDir


def paths(runs_dir: RunsDir = None, as_json: Json = False) -> None:
    """Show where things are kept, and the user's own defaults.

    The defaults are in config.toml, a file that is yours to write: runs_dir, device, theme, and a table
    [notify] that says who is told when a run is done, has failed or waits (on, command, webhook, bell).
    """
    from eqat_tui.output import print_json, show
    from eqat_tui.own_text import own_text, owned

    found = owned(runs_dir)
    if as_json:
        print_json(found)
    else:
        show(own_text(found))


def notify(
    run: Annotated[
        str, typer.Argument(metavar="[RUN]", help="Any part of an id or name, a path, or latest.")
    ] = "latest",
    runs_dir: RunsDir = None,
) -> int:
    """Send the message that RUN sends when it ends, to try what [notify] in config.toml says."""
    from engine.config.user import load_user_config, user_config_path
    from engine.errors import ExitCode, UsageError
    from engine.run.notify import message_of, occasion_of, send
    from engine.run.state import load_state
    from eqat_tui import actions
    from eqat_tui.output import show

    wanted = load_user_config().notify
    if not (wanted.command or wanted.webhook):
        raise UsageError(
            "names neither a command nor a webhook",
            where=f"{user_config_path()}: notify",
            hint='like [notify] command = ["notify-send", "{message}"]',
        )
    found = actions.find(run, runs_dir)
    code = load_state(found).exit_code
    occasion = "stopped" if code is None else occasion_of(code)
    message = message_of(found, occasion)
    if not send(wanted, message, found, occasion):
        return ExitCode.PREFLIGHT
    show(message)
    return ExitCode.DONE
