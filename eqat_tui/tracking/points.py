"""From events to what trackers know: numbers with a name at a step, and texts."""

from __future__ import annotations

from typing import NamedTuple

from engine.run import events
from engine.run.events import Event
from engine.run.measures import MOST_SCORES, MOST_TEXTS
from eqat_tui.output import cell, one_line

MOST_NAME = 100
"""Letters of a name out of a log."""


class Point(NamedTuple):
    """What one event says. A number that was not finite is ``None``."""

    t: float
    step: int
    values: dict[str, float | None] = {}
    texts: dict[str, str] = {}


class Points:
    """Turns the events of one run into points, one after the other.

    Steps of a training that goes from block to block are counted through all blocks. Readings of the machine
    have the second of the run as their step, an evaluation the count of those before it.
    """

    def __init__(self) -> None:
        self._begun: float | None = None
        self._evaluations = 0

    def of(self, event: Event) -> Point | None:
        """What ``event`` says; none where that is no number and no text."""
        self._begun = event.t if self._begun is None else self._begun
        second = max(0, round(event.t - self._begun)) if abs(event.t - self._begun) < 1e12 else 0
        match event:
            case events.Metric():
                return _metric(event)
            case events.BlockFinished(restored=False):
                return _numbers(event, _name(event.phase), event.block, _BLOCK)
            case events.Memory():
                return _numbers(event, "machine", second, _MACHINE)
            case events.PhaseFinished():
                return _numbers(event, f"phase/{_name(event.phase)}", second, _PHASE)
            case events.Eval():
                self._evaluations += 1
                return _evaluation(event, self._evaluations)
            case events.Export():
                return _numbers(event, f"export/{_name(event.format)}", second, _EXPORT)
        return _text(event, second)


_BLOCK = ("initial_loss", "final_loss", "val_loss", "seconds")
_MACHINE = (
    *("gpu_used", "gpu_peak", "gpu_other", "gpu_utilization", "gpu_temperature", "gpu_power"),
    *("host_used", "host_peak", "host_available", "disk_free"),
)
_PHASE = ("seconds", "peak_gpu_bytes", "peak_host_bytes")
_EXPORT = ("bytes", "bits_per_weight", "max_logit_diff", "perplexity")


def _name(text: str) -> str:
    """A name out of a log as a part of a name here."""
    return cell(text.replace("/", "_"), MOST_NAME)


def _numbers(event: Event, under: str, step: int, fields: tuple[str, ...]) -> Point | None:
    """Those of the fields that are known. A block's have a folder of their own: their step is the block."""
    folder = f"{under}/blocks" if fields is _BLOCK else under
    values = {f"{folder}/{name}": getattr(event, name) for name in fields if getattr(event, name) is not None}
    return Point(event.t, step, values) if values else None


def _metric(event: events.Metric) -> Point:
    step = event.step if event.block is None else event.block * event.steps + event.step
    under = _name(event.phase)
    values = {
        f"{under}/{name}": getattr(event, name)
        for name in ("loss", "val_loss", "grad_norm", "tokens_per_second")
        if getattr(event, name) is not None
    }
    if event.loss is None and event.non_finite:
        values[f"{under}/loss"] = None
    values |= {f"{under}/lr/{_name(name)}": rate for name, rate in event.lr.items()}
    return Point(event.t, step, values)


def _evaluation(event: events.Eval, count: int) -> Point:
    stage = _name(event.stage)
    values: dict[str, float | None] = {f"perplexity/{stage}": event.perplexity}
    if event.answer_tokens:
        values[f"answer_perplexity/{stage}"] = event.answer_perplexity
    values |= {f"accuracy/{_name(task)}/{stage}": share for task, share in event.accuracy.items()}
    for score in event.scores[:MOST_SCORES]:
        values[f"{_name(score.task)}{score.examples}/{_name(score.metric)}/{stage}"] = score.value
    if event.divergence is not None:
        values |= {f"kl/{stage}": event.divergence.kl, f"top1/{stage}": event.divergence.top1}
    for one in event.texts[:MOST_TEXTS]:
        values[f"perplexity on {_name(one.corpus)}/{stage}"] = one.perplexity
        if one.divergence is not None:
            values[f"kl on {_name(one.corpus)}/{stage}"] = one.divergence.kl
    return Point(event.t, count, values)


def _text(event: Event, second: int) -> Point | None:
    match event:
        case events.Warning():
            said = f"{event.message} ({event.hint})" if event.hint else event.message
            return Point(event.t, second, texts={f"warning/{_name(event.code)}": one_line(said)})
        case events.Error():
            said = f"{event.where}: {event.message} ({event.hint})"
            return Point(event.t, second, texts={f"error/{_name(event.code)}": one_line(said)})
        case events.RunFinished():
            return Point(event.t, second, texts={"outcome": event.outcome})
    return None
