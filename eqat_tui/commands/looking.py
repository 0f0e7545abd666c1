"""Commands that only look: at runs, at presets, at this machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from engine.errors import ExitCode, UsageError
from eqat_tui.commands.options import Ascii, Json, Run, RunsDir
from eqat_tui.tracking.table import TRACKERS


def runs(
    runs_dir: RunsDir = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=0, help="At most so many; 0 for all.")] = 0,
    as_json: Json = False,
) -> None:
    """List the runs, newest first."""
    from engine.run.finding import default_runs_dir, full, list_runs
    from eqat_tui.actions import summaries as summaries_of
    from eqat_tui.output import print_json, say, show
    from eqat_tui.queue_text import left_alone
    from eqat_tui.run_text import runs_table

    place = default_runs_dir(runs_dir)
    summaries = summaries_of(list_runs(place)[: limit or None])
    if as_json:
        print_json(summaries)
    elif summaries:
        show(runs_table(summaries))
    else:
        say(f"no runs in {full(place)}; eqat run demo makes one")
    if waits := left_alone():
        say(waits)


def show(run: Run, runs_dir: RunsDir = None, as_json: Json = False) -> None:
    """Show one run: perplexity, size, time, memory, exports."""
    from engine.run.shown import show_run
    from eqat_tui import actions
    from eqat_tui.output import print_json
    from eqat_tui.output import show as show_text
    from eqat_tui.run_text import report

    shown = show_run(actions.find(run, runs_dir))
    if as_json:
        print_json(shown)
    else:
        show_text(report(shown))


def compare(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN RUN...", help="Parts of ids or names, paths, or latest.")
    ],
    runs_dir: RunsDir = None,
    as_json: Json = False,
) -> None:
    """Show runs side by side: perplexity, accuracy, size, time, and the settings that differ.

    The best number of a row is marked where all are numbers of one thing; where models, evaluation texts or
    machines differ it is said, and nothing is marked.
    """
    from engine.run.comparison import compared
    from eqat_tui import actions
    from eqat_tui.compare_text import compare_text, compare_tree
    from eqat_tui.output import print_json, show

    found = compared([actions.find(ref, runs_dir) for ref in runs])
    if as_json:
        print_json(compare_tree(found))
    else:
        show(compare_text(found))


def report(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Parts of ids or names, paths, or latest.")
    ],
    to: Annotated[
        str | None,
        typer.Option(
            "--to", metavar="FILE", help="Write it here; - prints it. Else RUN.html in this folder."
        ),
    ] = None,
    charts: Annotated[
        str | None,
        typer.Option(
            "--charts",
            metavar="FOLDER",
            help="Write each chart into this folder, as SVG; and the page only where --to names one.",
        ),
    ] = None,
    png: Annotated[
        bool, typer.Option("--png", help="Charts as PNG as well; needs pip install resvg-py.")
    ] = False,
    runs_dir: RunsDir = None,
) -> None:
    """Write a report on a run, or on several: one HTML page that needs no network.

    Charts of losses, memory, perplexity and size; warnings, settings, versions, and the command that makes
    the run again. A report that is there already is replaced, no other file ever is. --charts writes the
    charts alone, each as a picture.
    """
    from eqat_tui import actions
    from eqat_tui.output import cell, say, show
    from eqat_tui.report.page import report_page
    from eqat_tui.report.pictures import pictures, write_pictures
    from eqat_tui.report.place import check_place, default_file, write_report

    if to == "":
        raise UsageError("is empty", where="--to", hint="name a file, or - for standard output")
    if charts == "":
        raise UsageError("is empty", where="--charts", hint="name a folder")
    if png and charts is None:
        raise UsageError("is for charts", where="--png", hint="name their folder with --charts")
    found = [actions.find(ref, runs_dir) for ref in runs]
    file = Path(os.path.expanduser(to)) if to is not None else default_file(found)
    if to != "-" and (to is not None or charts is None):
        check_place(file)  # before a picture is drawn
    if charts is not None:
        folder = Path(os.path.expanduser(charts))
        written = write_pictures(folder, pictures(found), png=png)
        say(f"wrote {len(written)} pictures into {cell(str(folder), 1000)}")
        if to is None:
            return
    if to == "-":
        show(report_page(found))
        return
    write_report(file, report_page(found))
    say(f"wrote {cell(str(file), 1000)}")


def log_to(
    tracker: Annotated[str, typer.Argument(metavar="TRACKER", help=f"{', '.join(TRACKERS.names())}.")],
    run: Run,
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            metavar="FILE|FOLDER",
            help="A new file of lines, else standard output; TensorBoard's new folder, else tensorboard/RUN; "
            "the folder of wandb or trackio.",
        ),
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until no engine works on the run any more.")
    ] = False,
    runs_dir: RunsDir = None,
) -> int:
    """Hand what a run has logged to another program: losses, learning rates, memory, perplexities.

    The log is read from outside, afterwards or with --follow as it grows: nothing that happens here stops the
    run. jsonl is a line of JSON for each event; the others need pip install of their name. wandb and trackio
    stay on this machine unless WANDB_MODE or TRACKIO_SPACE_ID says otherwise.
    """
    from eqat_tui import actions
    from eqat_tui.output import say
    from eqat_tui.tracking.following import hand_on

    if tracker not in TRACKERS:
        raise UsageError(
            f"there is no tracker {tracker!r}", where="TRACKER", hint=", ".join(TRACKERS.names())
        )
    if to == "":
        raise UsageError("is empty", where="--to", hint="name a file or a folder, or leave it out")
    found = actions.find(run, runs_dir)
    sink = TRACKERS[tracker].open(found, Path(os.path.expanduser(to)) if to is not None else None)
    try:
        count = hand_on(found, sink, follow=follow)
        say(f"{count:,} points of {found.id}")
    except KeyboardInterrupt:
        say(f"left; {found.id} goes on")
    finally:
        sink.close()
    return ExitCode.DONE


def verify(
    path: Annotated[
        str,
        typer.Argument(
            metavar="RUN|PATH", help="A run, the folder of a quantized checkpoint, or a .gguf file."
        ),
    ],
    reference: Annotated[
        str | None,
        typer.Option("--reference", metavar="MODEL", help="Measure each linear's error against this model."),
    ] = None,
    runs_dir: RunsDir = None,
    as_json: Json = False,
) -> int:
    """Look at a quantized checkpoint, of a run or of anybody: layout, shapes, scales, missing tensors.

    Of a run, every export is looked at; the JSON of several is a list. The exit code is 4 where one is not
    sound, and 3 where there is no checkpoint that can be looked at.
    """
    import sys

    from eqat_tui.judging import all_judged, checkpoints_of, judgement_text, told
    from eqat_tui.output import colour_wanted, print_json, say
    from eqat_tui.output import show as show_text

    if not path:
        raise UsageError("is empty", where="PATH", hint="name a run, or the folder of a checkpoint")
    moving = colour_wanted(sys.stderr) and not as_json
    found = []
    for each in all_judged(checkpoints_of(path, runs_dir), reference, told(moving)):
        found.append(each)
        if moving:
            say("\r\033[K", end="")
        if not as_json:
            show_text(judgement_text(each))
    if as_json:
        print_json(found if len(found) > 1 else found[0])
    return ExitCode.DONE if all(one["sound"] for one in found) else ExitCode.DATA


def presets(as_json: Json = False) -> None:
    """List the presets: complete configurations to start from, and sweeps, which make several runs.

    eqat run and eqat plan take the former, eqat sweep takes both.
    """
    from eqat_tui.output import print_json, show, table
    from eqat_tui.preset_rows import preset_rows, sweep_rows

    rows, sweeps = preset_rows(), sweep_rows()
    if as_json:
        print_json([*({"kind": "run", **row} for row in rows), *({"kind": "sweep", **row} for row in sweeps)])
        return
    cells = [(row["name"], f"w{row['bits']}g{row['group_size']}", row["description"]) for row in rows]
    several = [(row["name"], str(row["runs"] or "?"), row["description"]) for row in sweeps]
    show(table(cells, header=("PRESET", "GRID", "")))
    show("\n" + table(several, header=("SWEEP", "RUNS", "")))


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


def memory(runs_dir: RunsDir = None, ascii_only: Ascii = False) -> int:
    """Show this machine's GPU and host memory live, with history and processes."""
    from eqat_tui.terminal import Look, open_app, require_terminal

    require_terminal("eqat memory", hint="eqat doctor --quick prints what is free")
    return open_app(runs_dir, mode="memory", look=Look(ascii_only))
