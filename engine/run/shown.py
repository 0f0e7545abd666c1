"""A run as plain JSON, whether or not it works: what ``--json``, lists of runs and results are made from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgspec

from engine.config.learning import learned_words
from engine.config.writing import to_dict
from engine.errors import EqatError
from engine.run import events
from engine.run.benched import benched
from engine.run.directory import RunDirectory
from engine.run.elsewhere import is_elsewhere
from engine.run.events import Event
from engine.run.liveness import Look, Work, batch_job, last_events, look
from engine.run.measured import asked_later, measured, with_later
from engine.run.redo import read_origin
from engine.run.sight import SeenFromAfar, sight_of
from engine.run.state import RunState, load_state
from engine.run.status import Status, read_launched, read_status
from engine.run.task import is_job

DEEPEST = 40
"""Levels of the tree; ours has six."""


def show_run(run: RunDirectory) -> dict[str, Any]:
    """What ``eqat show RUN --json`` prints. Of the metrics, nine lines in ten, only the last matters here."""
    state = load_state(run, skip=frozenset({"metric"}))
    metrics = [event for event in last_events(run) if isinstance(event, events.Metric)]
    if metrics and (metrics[-1].attempt, metrics[-1].phase) == (state.attempt, state.phase):
        state = state.apply(metrics[-1])
    sight = sight_of(run)
    found = sight.look()
    tree = render(state, state=found.state, work=found.work, config=_config(run))
    tree |= place_of(run, found.work)
    tree["calibration"] = _calibration(run)
    tree["why_gone"] = _why_gone(run, state, found)
    tree["scores"] = json_safe(msgspec.to_builtins(with_later(state.scores(), asked_later(run))))
    tree["measured"] = [json_safe(msgspec.to_builtins(one)) for one in measured(run)]
    tree["bench"] = [msgspec.to_builtins(measured) for measured in benched(run)]
    return {**tree, "path": sight.place, "origin": origin(run)}


def place_of(run: RunDirectory, work: Work | None) -> dict[str, Any]:
    """The job of a cluster's that works on the run or waits to, and the machine of an engine that is not a
    process of this one. Neither of a run that is seen from afar: its own machine knows them."""
    if isinstance(run, SeenFromAfar):
        return {"batch": None, "node": None}
    job, status = batch_job(run, work), read_status(run)
    at_work = work is not None and work.state in ("running", "hung")
    elsewhere = at_work and status is not None and is_elsewhere(status)
    return {
        "batch": job._asdict() if job is not None else None,
        "node": (job.node if job is not None else status.host if elsewhere and status else "") or None,
    }


def _why_gone(run: RunDirectory, state: RunState, found: Look) -> str | None:
    """Of a run, or of what was done with it last, whose engine has not said why it ended."""
    cut_off = found.state == "crashed" or (state.job is not None and state.job.outcome is None)
    if found.work is not None or not cut_off:
        return None
    launched = read_launched(run)
    return sight_of(run).why_gone(max(state.newest_attempt, launched.attempt if launched is not None else 0))


_NOT_SUMMARIZED = events.BULK | {"block.started", "block.finished"}


def summarize(run: RunDirectory) -> dict[str, Any]:
    """One row of ``eqat runs --json``; passes over the bulk of the log, so that a list of runs is quick."""
    state = load_state(run, skip=_NOT_SUMMARIZED)
    found = look(run)
    tree = render(state, state=found.state, work=found.work)
    config = _config(run) or {}
    status = state.status
    kept = ("id", "state", "started", "updated", "seconds", "eta_s", "perplexity", "size_bytes", "job")
    return {
        **{name: tree[name] for name in kept},
        **place_of(run, found.work),
        "path": str(run.path),
        "name": config.get("name"),
        "model": config.get("model", {}).get("source"),
        "bits": config.get("grid", {}).get("bits"),
        "group_size": config.get("grid", {}).get("group_size"),
        "bits_per_weight": tree["bits_per_weight"],
        "device": state.device or None,
        "phase": state.phase,
        "doing": tree["position"]["doing"],
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


def _calibration(run: RunDirectory) -> str | None:
    """The text that the run learns from, several with their shares; none where it learns from none."""
    try:
        config = run.config()
        return learned_words(config) or None
    except EqatError:
        return None


# -- the tree ------------------------------------------------------------------------------------------


def render(
    run: RunState, *, state: str, work: Work | None = None, config: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Plain dicts, lists, strings and finite numbers; keys are stable, what is unknown is ``None``. ``state``
    and ``work`` come from the run's lock and heartbeat."""
    run = run.accounted()
    export = run.smallest_export()
    plan = run.plan or {}
    tree = {
        "id": run.id,
        "state": state,
        "config": config,
        **_fields(run, "attempt", "device", "host", "versions"),
        "started": run.first_t,
        "updated": run.last_t,
        **_fields(run, "outcome", "exit_code", "seconds"),
        **_time_left(run, state),
        "waiting": waiting(run.status, state),
        "position": _position(run, state),
        "job": _job(run.job, work),
        "phases": [{**_fields(row, *_PHASE), "ranks": msgspec.to_builtins(row.ranks)} for row in run.phases],
        "blocks": [_fields(row, *_BLOCK) for row in run.trained_blocks()],
        "perplexity": run.perplexity(),
        "answer_perplexity": run.answer_perplexity(),
        "accuracy": run.accuracy(),
        "scores": msgspec.to_builtins(run.scores()),
        "evaluation": _evaluation(run),
        "divergence": msgspec.to_builtins(run.divergence()),
        "block_errors": msgspec.to_builtins(run.block_errors()),
        "texts": msgspec.to_builtins(run.texts()),
        "size_bytes": {
            # The sizes of the original follow from its shapes: the plan knows them before any export.
            "fp": export.fp_bytes if export else _number(plan.get("fp_bytes")),
            "quantized": export.bytes if export else None,
        },
        "bits_per_weight": export.bits_per_weight if export else _number(plan.get("bits_per_weight")),
        "exports": [
            {**_fields(done, *_EXPORT), "card": f"{done.path}/{CARD}", "copied_to": done.copied_to or None}
            for done in run.exports.values()
        ],
        "samples": [_payload(sample) for sample in run.samples.values()],
        "checkpoint": _fields(run.checkpoint, *_CHECKPOINT) if run.checkpoint is not None else None,
        "memory": _payload(run.memory),
        "plan": run.plan,
        "warnings": [_fields(warning, "code", "message", "hint") for warning in run.warnings],
        "error": _payload(run.error),
    }
    cleaned = json_safe(tree)
    assert isinstance(cleaned, dict)
    return cleaned


_PHASE = ("name", "seconds", "peak_gpu_bytes", "peak_host_bytes", "finished")
_BLOCK = ("index", "initial_loss", "final_loss", "val_loss", "seconds")
_EXPORT = (
    "format",
    "path",
    "verified",
    "max_logit_diff",
    "logit_tolerance",
    "bytes",
    "perplexity",
    "perplexity_trained",
    "tokens",
    "rounded",
)
CARD = "README.md"
"""The model card of an export, in its folder."""
_CHECKPOINT = ("generation", "bytes", "phase", "block", "t")


def _evaluation(run: RunState) -> dict[str, Any] | None:
    """What perplexities were measured on; the same for every stage."""
    found = next(iter(run.evaluations.values()), None)
    return None if found is None else _fields(found, "corpus", "tokens", "sequence_length", "begin")


def _position(run: RunState, state: str) -> dict[str, Any]:
    doing = run.status.doing if run.status is not None and state in ("running", "hung") else ""
    return {**_fields(run, "phase", "block", "blocks", "step", "steps", "epoch"), "doing": doing or None}


def _time_left(run: RunState, state: str) -> dict[str, Any]:
    """Seconds, whether they are measured, and those by which a phase outlasts its plan; of an engine that is
    at work."""
    status = run.status if state == "running" else None
    return {
        "eta_s": status.eta_s if status is not None else None,
        "eta_measured": status.eta_measured if status is not None else None,
        "over_s": status.over_s if status is not None else None,
    }


def _job(job: RunState | None, work: Work | None) -> dict[str, Any] | None:
    """What was done with the run last, or is being done now."""
    if work is not None and is_job(work.task) and (job is None or job.attempt != work.attempt):
        job = RunState(task=work.task, attempt=work.attempt)  # it has not said anything yet
    if job is None:
        return None
    job = job.accounted()
    at_work = work is not None and work.attempt == job.attempt
    state = work.state if work is not None and at_work else job.outcome or "crashed"
    return {
        **_fields(job, "task", "attempt"),
        "state": state,
        "started": job.attempt_t,
        "updated": job.last_t,
        **_fields(job, "exit_code", "seconds"),
        **_time_left(job, state),
        "waiting": waiting(job.status, state),
        "position": _position(job, state),
        "error": _payload(job.error),
    }


def _fields(of: object, *names: str) -> dict[str, Any]:
    return {name: getattr(of, name) for name in names}


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
    found = {name: getattr(event, name) for name in event.__struct_fields__ if name not in envelope}
    return {
        name: msgspec.to_builtins(value) if isinstance(value, tuple) else value
        for name, value in found.items()
    }


def json_safe(tree: Any, depth: int = 0) -> Any:
    """NaN and infinities as ``None``: other languages' JSON readers refuse them. So is what lies deeper
    than any tree of ours, for whoever prints it would run out of stack."""
    if isinstance(tree, float):
        return tree if math.isfinite(tree) else None
    if isinstance(tree, Mapping | list | tuple) and depth >= DEEPEST:
        return None
    if isinstance(tree, Mapping):
        return {str(key): json_safe(value, depth + 1) for key, value in tree.items()}
    return [json_safe(value, depth + 1) for value in tree] if isinstance(tree, list | tuple) else tree
