"""A run's state as the JSON that ``eqat show --json`` prints."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from engine.run.events import Event

if TYPE_CHECKING:
    from engine.run.directory import Status
    from engine.run.state import RunState


DEEPEST = 40
"""Levels of the tree; ours has six."""


def render(run: RunState, *, state: str, config: Mapping[str, Any] | None) -> dict[str, Any]:
    """Plain dicts, lists, strings and finite numbers; keys are stable, what is unknown is ``None``."""
    export = next(reversed(run.exports.values()), None)
    plan = run.plan or {}
    tree = {
        "id": run.id,
        "state": state,
        "config": config,
        "attempt": run.attempt,
        "device": run.device,
        "host": run.host,
        "versions": run.versions,
        "started": run.first_t,
        "updated": run.last_t,
        "outcome": run.outcome,
        "exit_code": run.exit_code,
        "seconds": run.seconds,
        "eta_s": run.eta_s if state == "running" else None,
        "waiting": waiting(run.status, state),
        "position": {
            name: getattr(run, name) for name in ("phase", "block", "blocks", "step", "steps", "epoch")
        },
        "phases": [
            {
                "name": row.name,
                "seconds": row.seconds,
                "peak_gpu_bytes": row.peak_gpu_bytes,
                "peak_host_bytes": row.peak_host_bytes,
                "finished": row.finished,
            }
            for row in run.phases
        ],
        "blocks": [
            {
                "index": row.index,
                "initial_loss": row.initial_loss,
                "final_loss": row.final_loss,
                "val_loss": row.val_loss,
                "seconds": row.seconds,
            }
            for row in run.trained_blocks()
        ],
        "perplexity": run.perplexity(),
        "accuracy": run.accuracy(),
        "size_bytes": {
            # The sizes of the original follow from its shapes: the plan knows them before any export.
            "fp": export.fp_bytes if export else _number(plan.get("fp_bytes")),
            "quantized": export.bytes if export else None,
        },
        "bits_per_weight": export.bits_per_weight if export else _number(plan.get("bits_per_weight")),
        "exports": [
            {
                "format": done.format,
                "path": done.path,
                "verified": done.verified,
                "max_logit_diff": done.max_logit_diff,
                "logit_tolerance": done.logit_tolerance,
                "bytes": done.bytes,
                "perplexity": done.perplexity,
                "perplexity_trained": done.perplexity_trained,
                "tokens": done.tokens,
                "copied_to": done.copied_to or None,
            }
            for done in run.exports.values()
        ],
        "samples": [_payload(sample) for sample in run.samples.values()],
        "checkpoint": None
        if run.checkpoint is None
        else {name: getattr(run.checkpoint, name) for name in ("generation", "bytes", "phase", "block", "t")},
        "memory": _payload(run.memory),
        "plan": run.plan,
        "warnings": [
            {"code": warning.code, "message": warning.message, "hint": warning.hint}
            for warning in run.warnings
        ],
        "error": _payload(run.error),
    }
    cleaned = _json_safe(tree)
    assert isinstance(cleaned, dict)
    return cleaned


def waiting(status: Status | None, state: str) -> str | None:
    """Why the engine does nothing at the moment; what a dead one waited for does not matter any more."""
    return (status.waiting or None) if status is not None and state in ("running", "hung") else None


def _number(value: Any) -> int | float | None:
    """A plan is free JSON: what is no number in it is not known."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _payload(event: Event | None) -> dict[str, Any] | None:
    if event is None:
        return None
    envelope = ("v", "seq", "attempt", "t", "mono")
    return {name: getattr(event, name) for name in event.__struct_fields__ if name not in envelope}


def _json_safe(tree: Any, depth: int = 0) -> Any:
    """NaN and infinities as ``None``: other languages' JSON readers refuse them. So is what lies deeper
    than any tree of ours, for whoever prints it would run out of stack."""
    if isinstance(tree, float):
        return tree if math.isfinite(tree) else None
    if isinstance(tree, Mapping | list | tuple) and depth >= DEEPEST:
        return None
    if isinstance(tree, Mapping):
        return {str(key): _json_safe(value, depth + 1) for key, value in tree.items()}
    return [_json_safe(value, depth + 1) for value in tree] if isinstance(tree, list | tuple) else tree
