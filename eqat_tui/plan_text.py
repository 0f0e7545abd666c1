"""The plan of a run as text, from the dictionary that ``eqat plan --json`` prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.config.stages import phase_label
from eqat_tui.output import (
    cell,
    counted,
    format_bits,
    format_bytes,
    format_parameters,
    format_seconds,
    key_values,
    number,
    one_line,
    table,
)
from eqat_tui.planned import known
from eqat_tui.words import model_name

STORES = {"device": "on the GPU", "host": "in host memory", "disk": "on disk"}


def plan_text(plan: Mapping[str, Any]) -> str:
    """What the run needs, phase by phase and in all; what stands in its way comes last."""
    plan = known(plan)
    parts = [heading(plan), phase_table(plan), key_values(totals(plan))]
    notes = [one_line(f"warning: {warning}") for warning in plan["warnings"]]
    notes += [_problem(problem) for problem in plan["problems"]]
    if notes:
        parts.append("\n".join(notes))
    return "\n\n".join(parts)


def heading(plan: Mapping[str, Any]) -> str:
    """The model and where it would run."""
    machine = plan["machine"]
    place = machine["gpu_name"] if plan["device"] == "cuda" else _cores(machine["cpus"])
    name, kind = cell(model_name(plan["model"])), cell(plan["model_type"])
    count = format_parameters(plan["parameters"])
    return f"{name}: {kind}, {count} parameters, {counted(plan['blocks'], 'block')}, on {cell(place)}"


def _cores(count: int) -> str:
    return f"{count} CPU core{'' if count == 1 else 's'}"


def phase_table(plan: Mapping[str, Any]) -> str:
    """Memory and time of every phase."""
    gpu = plan["device"] == "cuda"
    rows = []
    for phase in plan["phases"]:
        row = [f"  {phase_label(phase['name'])}", format_seconds(phase["seconds"])]
        row += [format_bytes(phase["peak_gpu_bytes"])] if gpu else []
        rows.append([*row, format_bytes(phase["peak_host_bytes"])])
    header = ["  phase", "time", *(["GPU memory"] if gpu else []), "host memory"]
    return table(rows, header=header, right="lrrr")


def totals(plan: Mapping[str, Any]) -> dict[str, str]:
    """What the whole run takes and leaves."""
    machine = plan["machine"]
    lines = {"time": f"about {format_seconds(plan['seconds'])} ({plan['time_basis']})"}
    if plan["together"]:
        lines["together"] = one_line(plan["together"])
    if plan["device"] == "cuda":
        free = format_bytes(machine["gpu_free"])
        lines["GPU memory"] = f"{format_bytes(plan['peak_gpu_bytes'])} of {free} free"
    lines["host memory"] = (
        f"{format_bytes(plan['peak_host_bytes'])} of {format_bytes(machine['host_free'])} free"
    )
    lines["disk"] = f"{format_bytes(plan['disk_bytes'])} of {format_bytes(machine['disk_free'])} free"
    if plan["calibration"]:
        lines["text"] = one_line(plan["calibration"])
    if plan["begin"]:
        lines["sequences"] = one_line(plan["begin"])
    store = STORES.get(plan["activation_store"], plan["activation_store"])
    lines["activations"] = f"{store}: {plan['activation_store_reason']}"
    lines |= at_a_time(plan)
    lines |= recovery(plan["recovery"])
    lines["size"] = f"{format_bytes(plan['fp_bytes'])} → {exports(plan)}"
    lines["bits per weight"] = format_bits(plan["bits_per_weight"])
    if plan["zero_points"]:
        lines["zero points"] = one_line(plan["zero_points"])
    if plan["head"]:
        lines["head"] = one_line(plan["head"])
    published = plan.get("published")
    if published:
        lines["published"] = (
            f"{published['model']} {published['setting']}: perplexity {published['perplexity']}, "
            f"full precision {published['fp_perplexity']} ({published['conditions']})"
        )
    return lines


def exports(plan: Mapping[str, Any]) -> str:
    """What the exports take: each of several by its format."""
    sizes = plan["export_sizes"]
    if len(sizes) < 2:
        return format_bytes(plan["export_bytes"])
    return ", ".join(f"{format_bytes(size)} ({cell(name)})" for name, size in sizes.items())


def at_a_time(plan: Mapping[str, Any]) -> dict[str, str]:
    """How many sequences pass together where the whole network is trained."""
    found = {phase_label(name): count for name, count in plan["micro_batches"].items() if count}
    if not found:
        return {}
    return {"at a time": ", ".join(f"{count:g} sequences in {label}" for label, count in found.items())}


def recovery(found: Mapping[str, Any]) -> dict[str, str]:
    """How the run is checkpointed, and what an interruption costs."""
    size = format_bytes(found["checkpoint_bytes"])
    share = f"{100 * min(1.0, number(found['share']) or 0.0):.1f} % of the time"
    checkpoints = f"after every block, {size} at a stop; {share}"
    if any(found["snapshots"].values()):
        takes = format_seconds(found["checkpoint_seconds"])
        checkpoints = f"every {_interval(found['interval_seconds'])}, {size} and {takes} each; {share}"
    lost, resumed = format_seconds(found["lost_seconds"]), format_seconds(found["restart_seconds"])
    every = found["streams_every"]
    blocks = "block" if every == 1 else f"{every} blocks"
    streams = f"stored every {blocks}" if found["streams"] == "stored" else "recomputed"
    return {
        "checkpoints": checkpoints,
        "a kill": f"loses at most {lost}; going on takes at most {resumed}",
        "streams": f"{streams}: {found['streams_reason']}",
    }


def _interval(seconds: float) -> str:
    """``4 min`` rather than ``4 min 00 s``."""
    return format_seconds(seconds).replace(" 00 s", "")


def _problem(problem: Any) -> str:
    hint = f" ({problem['hint']})" if problem.get("hint") else ""
    return one_line(f"does not fit: {problem['where']}: {problem['message']}{hint}")
