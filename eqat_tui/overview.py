"""What ``eqat`` says when it is asked nothing, and the list of presets."""

from __future__ import annotations

import math
from typing import Any

from engine.config.loading import load, load_sweep, preset_names, preset_path, sweep_names, sweep_path
from engine.config.sweeps import written_axes
from engine.errors import EqatError
from engine.run.finding import default_runs_dir, list_runs
from eqat_tui.actions import summaries
from eqat_tui.output import table
from eqat_tui.queue_text import left_alone
from eqat_tui.run_text import runs_table

COMMANDS = (
    ("eqat run PRESET|FILE", "quantize a model and follow it; --dry-run shows the plan first"),
    ("eqat sweep PRESET|FILE", "make a run of every combination of some settings, and compare them"),
    ("eqat queue add PRESET|FILE", "make runs one after the other, whoever is logged in"),
    ("eqat runs, show RUN", "what was made, and how good it is"),
    ("eqat attach, stop, resume RUN", "come back to a run, end it, go on with it"),
    ("eqat eval, export RUN", "measure or write a quantized model again"),
    ("eqat presets, plan PRESET|FILE", "what to start from, and what it would need"),
    ("eqat rm, gc RUN", "delete runs, free what can be made again"),
    ("eqat doctor", "is this machine ready?"),
)


def overview_text() -> str:
    """What eqat is, its commands, a choice of presets, the latest runs."""
    parts = [
        "eqat: quantization-aware training of language models to 2, 3 and 4 bits, from a terminal",
        table([(f"  {command}", words) for command, words in COMMANDS]),
    ]
    rows = [row for row in preset_rows() if row["name"] in ("smoke", "demo", "demo-w2", "llama-2-7b-w2g64")]
    if rows:
        parts.append("presets\n" + table([(f"  {row['name']}", row["description"]) for row in rows]))
    recent = list_runs(default_runs_dir())[:5]
    if recent:
        listing = runs_table(summaries(recent))
        parts.append("recent runs\n" + "\n".join(f"  {line}" for line in listing.splitlines()))
    else:
        parts.append("no runs yet: eqat run demo makes one")
    if waits := left_alone():
        parts.append(waits)
    parts.append("eqat COMMAND --help tells more.")
    return "\n\n".join(parts)


def preset_rows() -> list[dict[str, Any]]:
    """The shipped presets; one that cannot be read is listed with the reason, not left out."""
    rows: list[dict[str, Any]] = []
    for name in preset_names():
        try:
            config = load(name)
        except EqatError as error:
            rows.append(
                {
                    "name": name,
                    "description": f"error: {error}",
                    "model": None,
                    "bits": None,
                    "group_size": None,
                }
            )
            continue
        rows.append(
            {
                "name": name,
                "description": config.description,
                "model": config.model.source,
                "bits": config.grid.bits,
                "group_size": config.grid.group_size,
                "path": str(preset_path(name)),
            }
        )
    return rows


def sweep_rows() -> list[dict[str, Any]]:
    """The shipped presets of sweeps: what each varies, and how many runs that makes."""
    rows: list[dict[str, Any]] = []
    for name in sweep_names():
        row: dict[str, Any] = {"name": name, "description": "", "model": None, "swept": [], "runs": None}
        try:
            config, table = load_sweep(name)
            axes = list(written_axes(table))
        except EqatError as error:
            rows.append({**row, "description": f"error: {error}"})
            continue
        row |= {
            "description": config.description,
            "model": config.model.source,
            "swept": [axis.name for axis in axes],
            "runs": math.prod(len(axis.values) for axis in axes),
            "path": str(sweep_path(name)),
        }
        rows.append(row)
    return rows
