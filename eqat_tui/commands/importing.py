"""The command that makes a run of somebody's quantized checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from engine.config.run import RunConfig
from engine.errors import UsageError
from eqat_tui.commands.options import Data, Detach, Device, Json, RunsDir, Settings

DECIDED = ("grid.bits", "grid.group_size", "grid.symmetric", "grid.zero_point", "model.source")
"""Fields that the checkpoint decides."""


def import_checkpoint(
    path: Annotated[str, typer.Argument(metavar="PATH", help="The folder of a quantized checkpoint.")],
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference",
            metavar="MODEL",
            help="The model it was made from: measured as full precision, and teacher of what is trained.",
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            "--preset",
            metavar="PRESET|FILE",
            help="Take data, evaluation and settings of stages from it; what is trained is --set.",
        ),
    ] = None,
    data: Data = None,
    device: Device = None,
    settings: Settings = None,
    runs_dir: RunsDir = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and start nothing.")] = False,
    detach: Detach = False,
    as_json: Json = False,
) -> int:
    """Make a run of a quantized checkpoint: GPTQ, AWQ, compressed-tensors, auto-round, MLX or EfficientQAT.

    Its integers, scales and zero points become the run's, bit for bit. eval, export and generate go on from
    there; --set e2e_qp.enabled=true trains its scales on. Without the original model (--reference, or the one
    that the checkpoint names, if it is on this machine) nothing is measured in full precision, and what is
    trained learns from cross-entropy.
    """
    import os
    import sys
    from pathlib import Path

    from engine.plan.plan import check, make_plan
    from engine.run.directory import RunDirectory
    from engine.run.finding import check_runs_dir, default_runs_dir
    from eqat_tui import actions
    from eqat_tui.judging import importable, told
    from eqat_tui.output import cell, colour_wanted, counted, say

    for name, value in (("PATH", path), ("--reference", reference)):
        if value == "":
            raise UsageError("is empty", where=name, hint="name a folder")
    folder = Path(os.path.expanduser(path))
    wanted = _wanted(settings, data, device)
    place = default_runs_dir(runs_dir)
    moving = colour_wanted(sys.stderr) and not as_json
    config_of(preset, {**made_of(folder), **wanted})  # what was mistyped is told before anything is read
    found = importable(folder, reference and os.path.expanduser(reference), told(moving))
    if moving:
        say("\r\033[K", end="")
    original = found["reference"]
    said = f"its original is {cell(original, 200)}" if original else "its original is not known here"
    blocks = counted(found["blocks"], "block")
    say(f"{found['format']}, w{found['bits']}g{found['group_size']}, {blocks}; {said}")
    if found["head_bits"] and "grid.head_bits" in wanted:
        raise UsageError("is what the checkpoint has", where="grid.head_bits", hint="leave it out")
    settled = {**_imported(folder, found), **wanted}
    config = config_of(preset, settled)
    while loss := taught_by_text(config, settled):
        settled |= loss
        config = config_of(preset, settled)
    if dry_run:
        return actions.print_plan(config, place, as_json=as_json)
    check_runs_dir(place)
    check(make_plan(config, runs_dir=place))
    return actions.start(RunDirectory.create(place, config), detach=detach, as_json=as_json)


def _wanted(settings: list[str] | None, data: str | None, device: str | None) -> dict[str, object]:
    """What was typed, by field.

    Raises:
        UsageError: for a field that the checkpoint decides.
    """
    from eqat_tui.configure import parse_settings

    wanted: dict[str, object] = {"data.source": data, "runtime.device": device}
    wanted = {name: value for name, value in wanted.items() if value is not None}
    wanted.update(parse_settings(settings or ()))
    if decided := next((name for name in DECIDED if name in wanted), None):
        raise UsageError("is what the checkpoint has", where=decided, hint="leave it out")
    return wanted


def made_of(folder: object) -> dict[str, object]:
    """What makes a run one of imported blocks."""
    from engine.config.run import run_config
    from engine.config.stages import STAGES

    sections = [stage.name for stage in STAGES if stage.name in run_config().__struct_fields__]
    # A preset may train this or that: of an import only what is typed.
    return {
        **{f"{name}.enabled": False for name in sections},
        "model.source": str(folder),
        "imported.enabled": True,
    }


def _imported(folder: object, found: Mapping[str, Any]) -> dict[str, object]:
    """What follows from the checkpoint, and is not typed."""
    settings: dict[str, object] = {
        **made_of(folder),
        "imported.reference": found["reference"],
        **{f"grid.{name}": found[name] for name in ("bits", "group_size", "symmetric", "zero_point")},
    }
    if found["head_bits"]:
        settings["grid.head_bits"] = found["head_bits"]
    return settings


def taught_by_text(config: RunConfig, settled: Mapping[str, object]) -> dict[str, object]:
    """The loss of a stage that would learn from an original that is not known here, unless it is settled."""
    from engine.plan.streams import taught_stage
    from eqat_tui.output import say

    stage = taught_stage(config)
    if stage is None or not config.imported.lacks_original or f"{stage.name}.loss" in settled:
        return {}
    say(f"without its original, {stage.label} learns from cross-entropy, not from a teacher's prediction")
    return {f"{stage.name}.loss": "cross_entropy"}


def config_of(preset: str | None, overrides: Mapping[str, object]) -> RunConfig:
    """A preset, a file or the defaults, with these settings."""
    from engine.config.derived import resolve
    from engine.config.loading import load
    from engine.config.overrides import apply_overrides
    from engine.config.run import run_config
    from engine.config.validation import validate

    if preset is not None:
        config = resolve(load(preset, overrides=overrides))
    else:
        config = resolve(apply_overrides(run_config()(name="imported"), overrides))
    validate(config)
    return config
