"""Commands for several runs that differ in some settings: make them all, go on with them, compare them."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from engine.errors import UsageError
from eqat_tui.clusters.asked import AskedOfSlurm
from eqat_tui.commands.cluster_options import on_a_cluster
from eqat_tui.commands.options import (
    Bits,
    Data,
    Device,
    Gpus,
    GroupSize,
    Json,
    Model,
    RemoteCode,
    RunsDir,
    Settings,
    SweepTarget,
)


class SweepGroup(TyperGroup):
    """``eqat sweep PRESET`` is ``eqat sweep start PRESET``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the command in front that was left out."""
        if not args:
            args = ["--help"]
        elif args[0] not in self.commands and args[0] not in ("-h", "--help"):
            args = ["start", *args]
        found: list[str] = super().parse_args(ctx, args)
        return found


app = typer.Typer(
    cls=SweepGroup,
    rich_markup_mode=None,
    help="Make a run of every combination of some settings, and compare them in a table.",
    epilog="eqat sweep PRESET|FILE --sweep grid.bits=2,3,4 is short for eqat sweep start, whose --help tells "
    "more. Exit codes: 0 all runs are done; else that of the first run that failed; 75, 130 and 143 as for a "
    "run: eqat sweep resume goes on.",
)

SweepRef = Annotated[
    str, typer.Argument(metavar="DIR", help="The folder of a sweep, any part of its name, or latest.")
]

DetachSweep = Annotated[
    bool, typer.Option("--detach", help="Print the sweep's name and return; no terminal ends it.")
]

Jobs = Annotated[
    int | None,
    typer.Option(
        "--jobs",
        min=0,
        metavar="N",
        help="Runs at a time, each with a GPU, or --gpus of them (or some cores), of its own; 0: as many as "
        "there are GPUs for. One where this is left out; with --on slurm as many as there is room for.",
    ),
]


@app.command()
@on_a_cluster
def start(
    target: SweepTarget,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            "--sweep",
            metavar="KEY=VALUE,...",
            help="A field and the values that it has in turn; repeatable, the last varies fastest. Lists and "
            "other values with commas are separated by | in quotes: 'data.mix=c4:0.8,wikitext2:0.2|c4:1'.",
        ),
    ] = None,
    model: Model = None,
    bits: Bits = None,
    group_size: GroupSize = None,
    data: Data = None,
    device: Device = None,
    gpus: Gpus = None,
    settings: Settings = None,
    trust_remote_code: RemoteCode = False,
    runs_dir: RunsDir = None,
    jobs: Jobs = None,
    slurm: AskedOfSlurm | None = None,
    detach: DetachSweep = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan of all runs and start nothing.")
    ] = False,
    as_json: Json = False,
) -> int:
    """Make a run of every combination of the swept values, one after the other or --jobs at a time.

    What is swept is typed with --sweep or is the table [sweep] of the preset or file ("grid.bits" = [2, 3,
    4]); what is typed replaces the file's values of that field. Of cases, the tables [sweep.case.NAME], some
    are chosen by --sweep case=NAME,NAME. eqat presets lists sweeps that are ready to be made.

    Each run is an ordinary one. A run that fails does not stop the others. Ctrl-C stops the run at work
    resumably, and with it the sweep, as eqat stop RUN does; twice aborts. A closed terminal ends no run, but
    no other is begun: eqat sweep resume goes on. With --detach the sweep outlives the terminal. With --on
    slurm the runs are one array of jobs, and this returns at once; --dry-run then prints the script."""
    from engine.run.finding import default_runs_dir
    from eqat_tui import sweeping
    from eqat_tui.configure import typed_settings

    fixed = typed_settings(
        model=model,
        bits=bits,
        group_size=group_size,
        data=data,
        device=device,
        gpus=gpus,
        settings=settings or (),
        trust_remote_code=trust_remote_code,
    )
    found = sweeping.combined(target, sweep or (), fixed, here=slurm is None)
    place = default_runs_dir(runs_dir)
    if slurm is not None:
        from eqat_tui.clusters import submitting

        if dry_run:
            return submitting.dry_sweep(found, place, slurm, jobs or 0)
        made = submitting.new_sweep(target, found, place)
        return submitting.submit_sweep(made, slurm, together=jobs or 0, as_json=as_json)
    jobs = 1 if jobs is None else jobs
    together = len(sweeping.parts([one.config for one in found], jobs))
    plans = sweeping.planned(found, place, together)
    if dry_run:
        return sweeping.print_plan(found, plans, as_json=as_json)
    made = sweeping.make(target, found, plans, place)
    return (sweeping.detach if detach else sweeping.carry_out)(made, jobs=jobs, as_json=as_json)


@app.command()
@on_a_cluster
def resume(
    sweep: SweepRef,
    runs_dir: RunsDir = None,
    jobs: Jobs = None,
    slurm: AskedOfSlurm | None = None,
    detach: DetachSweep = False,
    as_json: Json = False,
) -> int:
    """Go on with a sweep: make its missing runs, and resume those that are not done.

    A run that is done is not made again, one that is at work is followed, one that was deleted is made anew.
    """
    from engine.run.finding import default_runs_dir
    from engine.run.sweep import find_sweep
    from eqat_tui import sweeping

    found = find_sweep(default_runs_dir(runs_dir), sweep)
    if slurm is not None:
        from eqat_tui.clusters.submitting import submit_sweep

        return submit_sweep(found, slurm, together=jobs or 0, as_json=as_json)
    jobs = 1 if jobs is None else jobs
    return (sweeping.detach if detach else sweeping.carry_out)(found, jobs=jobs, as_json=as_json)


@app.command("list")
def list_made(runs_dir: RunsDir = None, as_json: Json = False) -> None:
    """List the sweeps, newest first: what each sweeps, and what has become of its runs."""
    from engine.run.finding import default_runs_dir, full
    from eqat_tui import sweeping
    from eqat_tui.output import print_json, say
    from eqat_tui.output import show as show_text
    from eqat_tui.sweep_text import sweeps_text

    place = default_runs_dir(runs_dir)
    rows = sweeping.summaries(place)
    if as_json:
        print_json(rows)
    elif rows:
        show_text(sweeps_text(rows))
    else:
        say(f"no sweeps in {full(place)}; eqat sweep PRESET --sweep grid.bits=2,3,4 makes one")


@app.command()
def show(
    sweep: SweepRef,
    runs_dir: RunsDir = None,
    as_json: Json = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print comma-separated values.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
) -> None:
    """Show a sweep as one table: settings, perplexity of each stage, bits, size, time, outcome."""
    from engine.run.finding import default_runs_dir
    from engine.run.sweep import find_sweep, show_sweep
    from eqat_tui import sweep_text
    from eqat_tui.output import print_json
    from eqat_tui.output import show as show_text

    if as_json + as_csv + as_markdown > 1:
        raise UsageError(
            "are different forms of one table", where="--json, --csv, --markdown", hint="name one"
        )
    shown = show_sweep(find_sweep(default_runs_dir(runs_dir), sweep))
    if as_json:
        print_json(shown)
    elif as_csv:
        show_text(sweep_text.sweep_csv(shown))
    else:
        show_text((sweep_text.sweep_markdown if as_markdown else sweep_text.sweep_text)(shown))
