"""The presets that come with eqat, for lists of them: nothing of runs is loaded for that."""

from __future__ import annotations

import math
from typing import Any

from engine.config.loading import load, load_sweep, preset_names, preset_path, sweep_names, sweep_path
from engine.config.sweeps import written_axes
from engine.errors import EqatError


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
