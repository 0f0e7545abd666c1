"""Commands that delete runs and free what runs can make again."""

from __future__ import annotations

from typing import Annotated

import typer

from eqat_tui.commands.options import Json, RunsDir


def rm(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Parts of ids or names, or paths.")],
    runs_dir: RunsDir = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> int:
    """Delete runs, with everything in them. Blocks that another run shares stay there.

    Only what is proven to be a run is deleted: a folder with a run's configuration and folders, with nothing
    else at its top, and no link.
    """
    from eqat_tui.housekeeping import delete

    return delete(runs, runs_dir, yes=yes)


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
