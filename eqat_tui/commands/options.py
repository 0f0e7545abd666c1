"""Arguments and options that several commands have, each with the words of its help."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from engine.errors import UsageError


def folder_of(option: str) -> Callable[[str], Path]:
    """Reads the folder that ``option`` names. A variable that is not set must not mean the current one."""

    def read(text: str) -> Path:
        if not text:
            raise UsageError("is empty", where=option, hint="name a folder, or leave it out")
        return Path(text)

    return read


def _presets(incomplete: str) -> list[str]:
    """Completes a preset's name; files are the shell's."""
    from engine.config.loading import preset_names

    return [name for name in preset_names() if name.startswith(incomplete)]


def _presets_and_sweeps(incomplete: str) -> list[str]:
    """The same where several runs are made."""
    from engine.config.loading import sweep_names

    return [name for name in sweep_names() if name.startswith(incomplete)] + _presets(incomplete)


def _run_ids(context: typer.Context, incomplete: str) -> list[str]:
    """Completes a run's id, the newest first. Shells evaluate what they are given: only plain names are."""
    from engine.errors import EqatError
    from engine.run.finding import default_runs_dir, list_runs

    try:
        found = list_runs(default_runs_dir(context.params.get("runs_dir")))
    except (EqatError, OSError):
        return []
    plain = [run.id for run in found if re.fullmatch(r"[A-Za-z0-9_.+-]+", run.id)]
    return [name for name in plain if name.startswith(incomplete)]


RunsDir = Annotated[
    Path | None,
    typer.Option(
        "--runs-dir",
        parser=folder_of("--runs-dir"),
        metavar="FOLDER",
        help="Where runs are kept; else $EQAT_RUNS_DIR, else ./runs.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Target = Annotated[
    str,
    typer.Argument(metavar="PRESET|FILE", help="A preset, or a .toml file.", autocompletion=_presets),
]
SweepTarget = Annotated[
    str,
    typer.Argument(
        metavar="PRESET|FILE",
        help="A preset, of a sweep or of one run, or a .toml file.",
        autocompletion=_presets_and_sweeps,
    ),
]
Run = Annotated[
    str,
    typer.Argument(
        metavar="RUN", help="Any part of an id or name, a path, or latest.", autocompletion=_run_ids
    ),
]
Model = Annotated[
    str | None, typer.Option("--model", help="Local directory, hub id, .gguf file, or random://tiny-llama.")
]
Bits = Annotated[int | None, typer.Option("--bits", help="Bits per weight: 2, 3, 4 or 8.")]
GroupSize = Annotated[
    int | None, typer.Option("--group-size", help="Weights that share a scale; -1 for the whole row.")
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        help="Calibration text: builtin, a shortcut, a hub id, a path, or several with shares, "
        "c4:0.8,wikitext2:0.2.",
    ),
]
Device = Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
Gpus = Annotated[
    int | None,
    typer.Option("--gpus", metavar="N", help="Compute on N GPUs of this machine together."),
]
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
