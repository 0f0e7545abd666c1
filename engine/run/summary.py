"""What commands and lists say of a run, as plain JSON: read from its files, whether or not it is running."""

from __future__ import annotations

from typing import Any

from engine.config.writing import to_dict
from engine.errors import EqatError
from engine.run import events
from engine.run.directory import RunDirectory, last_events, run_state
from engine.run.redo import read_origin
from engine.run.state import load_state


def show(run: RunDirectory) -> dict[str, Any]:
    """What ``eqat show RUN --json`` prints. Of the metrics, nine lines in ten, only the last matters here."""
    state = load_state(run, skip=frozenset({"metric"}))
    metrics = [event for event in last_events(run) if isinstance(event, events.Metric)]
    if metrics and (metrics[-1].attempt, metrics[-1].phase) == (state.attempt, state.phase):
        state = state.apply(metrics[-1])
    tree = state.to_json(state=run_state(run), config=_config(run))
    return {**tree, "path": str(run.path), "origin": origin(run)}


_NOT_SUMMARIZED = frozenset({"metric", "memory", "block.started", "block.finished"})


def summarize(run: RunDirectory) -> dict[str, Any]:
    """One row of ``eqat runs --json``; passes over the bulk of the log, so that a list of runs is quick."""
    state = load_state(run, skip=_NOT_SUMMARIZED)
    tree = state.to_json(state=run_state(run))
    config = _config(run) or {}
    status = state.status
    kept = ("id", "state", "started", "updated", "seconds", "eta_s", "perplexity", "size_bytes")
    return {
        **{name: tree[name] for name in kept},
        "path": str(run.path),
        "name": config.get("name"),
        "model": config.get("model", {}).get("source"),
        "bits": config.get("grid", {}).get("bits"),
        "group_size": config.get("grid", {}).get("group_size"),
        "bits_per_weight": tree["bits_per_weight"],
        "device": state.device or None,
        "phase": state.phase,
        "block": status.block if status is not None else None,
        "blocks": status.blocks if status is not None else None,
        "error": tree["error"]["message"] if tree["error"] else None,
        "exports": [done["format"] for done in tree["exports"] if done["verified"]],
        "waiting": tree["waiting"],
    }


def origin(run: RunDirectory) -> dict[str, Any] | None:
    """Which run this one redoes a part of."""
    try:
        found = read_origin(run)
    except EqatError:
        return None
    return None if found is None else {"id": found.id, "path": found.path, "from_block": found.from_block}


def _config(run: RunDirectory) -> dict[str, Any] | None:
    """The run's configuration; none for one that this version cannot read, which must not hide the run."""
    try:
        return to_dict(run.config())
    except EqatError:
        return None
