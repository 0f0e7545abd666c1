"""The closed set of events: one frozen struct a kind, its fields the payload.

:mod:`engine.run.event_log` writes and reads them. Phases and stages are plain text here: a log may have been
written with a method that this version does not know, and its events are to be read all the same.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import msgspec

from engine.errors import EqatError
from engine.run.measures import Divergence, TaskScore, TextMeasure

VERSION = 1

Outcome = Literal["done", "stopped", "failed", "aborted"]


class Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", omit_defaults=False):
    """The envelope. The writer fills it; whoever emits an event gives the payload only."""

    v: int = VERSION
    seq: int = 0
    attempt: int = 1
    t: float = 0.0
    mono: float = 0.0


class RunStarted(Event, frozen=True, kw_only=True, tag="run.started"):
    """An attempt begins: the first of a run, a resumption, or something else that is done with a finished run
    (``task``: ``eval``, ``export``, ``generate``). That cannot undo what the run is: should it be cut off,
    the run is still what it was, ``leaves``."""

    id: str
    pid: int
    host: str
    device: str
    versions: dict[str, str]
    argv: list[str]
    task: str = "run"
    leaves: Outcome | None = None


class AttemptStarting(Event, frozen=True, kw_only=True, tag="attempt.starting"):
    """An engine has the run and loads its libraries, which takes seconds: its first word, so that who looks
    meanwhile, or after it was killed, knows whose attempt it is. ``RunStarted`` follows, with what only they
    know."""

    pid: int
    host: str
    task: str = "run"
    leaves: Outcome | None = None


class Plan(Event, frozen=True, kw_only=True, tag="plan"):
    """What the run was expected to need (``Plan.to_dict()``)."""

    plan: dict[str, Any]


class PhaseStarted(Event, frozen=True, kw_only=True, tag="phase.started"):
    """Phase ``index`` (from 0) of ``phases``."""

    phase: str
    index: int
    phases: int


class RankPeaks(msgspec.Struct, frozen=True, kw_only=True):
    """Peak memory of one of several processes, on a GPU of its own."""

    rank: int
    peak_gpu_bytes: int | None = None
    peak_host_bytes: int | None = None


class PhaseFinished(Event, frozen=True, kw_only=True, tag="phase.finished"):
    """Seconds and peak memory of this attempt's part of the phase; of several processes that made it together
    the largest peaks, and each one's."""

    phase: str
    seconds: float
    peak_gpu_bytes: int | None = None
    peak_host_bytes: int | None = None
    ranks: tuple[RankPeaks, ...] = ()


class BlockStarted(Event, frozen=True, kw_only=True, tag="block.started"):
    """Decoder block ``block`` (from 0) of ``blocks``."""

    phase: str
    block: int
    blocks: int


class BlockFinished(Event, frozen=True, kw_only=True, tag="block.finished"):
    """A block is frozen to the grid; ``restored`` when it came from a checkpoint."""

    phase: str
    block: int
    seconds: float
    initial_loss: float | None = None
    final_loss: float | None = None
    val_loss: float | None = None
    restored: bool = False


class Metric(Event, frozen=True, kw_only=True, tag="metric"):
    """A training step. ``step`` counts from 1 within its block (or phase) to ``steps``.

    ``non_finite`` is set when a number of this step, or of one left out since the last metric, was NaN
    or infinite; such numbers are written as null.
    """

    phase: str
    step: int
    steps: int
    epoch: int
    block: int | None = None
    loss: float | None = None
    val_loss: float | None = None
    grad_norm: float | None = None
    lr: dict[str, float] = {}
    tokens_per_second: float | None = None
    non_finite: bool = False


class RankReading(msgspec.Struct, frozen=True, kw_only=True):
    """What :class:`Memory` says, of one of several processes."""

    rank: int
    gpu_used: int | None = None
    gpu_total: int | None = None
    gpu_peak: int | None = None
    gpu_utilization: float | None = None
    gpu_temperature: float | None = None
    gpu_power: float | None = None
    host_used: int | None = None
    host_peak: int | None = None
    waited: float | None = None
    """Seconds that it waited for the others in a step, the last time that this was measured; the slowest
    waits least."""


class Memory(Event, frozen=True, kw_only=True, tag="memory"):
    """A sample of the machine: bytes, per cent, degrees Celsius, watts. What cannot be read is null. Of
    several processes it is the first one's, and each one's beside it."""

    gpu_used: int | None = None
    gpu_total: int | None = None
    gpu_peak: int | None = None
    gpu_other: int | None = None
    gpu_utilization: float | None = None
    gpu_temperature: float | None = None
    gpu_power: float | None = None
    host_used: int | None = None
    host_peak: int | None = None
    host_available: int | None = None
    disk_free: int | None = None
    ranks: tuple[RankReading, ...] = ()


class Eval(Event, frozen=True, kw_only=True, tag="eval"):
    """Perplexity of the model at one stage (null when it is not a finite number), and the share of right
    answers by task."""

    stage: str
    perplexity: float | None
    tokens: int
    sequence_length: int
    seconds: float
    corpus: str
    begin: str = ""
    """How sequences begin, in words, where that is worth a word: with a begin-of-text token, or without the
    one that the tokenizer would write."""
    accuracy: dict[str, float] = {}
    questions: dict[str, int] = {}
    texts: tuple[TextMeasure, ...] = ()
    """Other texts that were measured."""
    scores: tuple[TaskScore, ...] = ()
    """Of tasks that lm-eval asked."""
    divergence: Divergence | None = None
    """From full precision, on ``corpus``."""
    block_errors: tuple[float | None, ...] = ()
    """Relative error of the hidden states behind each block, against full precision."""
    answer_perplexity: float | None = None
    """Perplexity of the answers of held-out conversations, where it was measured and is finite."""
    answer_tokens: int = 0
    """Tokens of these answers."""


class CheckpointCommitted(Event, frozen=True, kw_only=True, tag="checkpoint.committed"):
    """Everything up to here survives a crash.

    ``bytes`` were written; training waited for ``seconds``, and the writing went on beside it for
    ``background_seconds``. ``step`` is the last one contained, where the checkpoint lies inside a block or
    inside end-to-end training.
    """

    generation: int
    bytes: int
    seconds: float
    phase: str
    block: int | None = None
    step: int | None = None
    background_seconds: float = 0.0


class Export(Event, frozen=True, kw_only=True, tag="export"):
    """A packed checkpoint was written, and ``verified`` by reading it back."""

    format: str
    path: str
    verified: bool
    bytes: int
    fp_bytes: int
    bits_per_weight: float
    max_logit_diff: float | None = None
    logit_tolerance: float | None = None
    perplexity: float | None = None
    perplexity_trained: float | None = None
    copied_to: str = ""
    """A folder outside of the run that has a copy, where one was asked for."""
    tokens: int | None = None
    """The two perplexities are those of the reloaded and of the trained model on this many tokens only: their
    difference counts, not their size."""
    rounded: str = ""
    """What the format cannot hold and rounds, and by how much, in words; empty where it holds everything."""
    files: dict[str, str] = {}
    """SHA-256 of every file of it, by its path in the folder, as it was verified."""


class Sample(Event, frozen=True, kw_only=True, tag="sample"):
    """Text that one version of the model (``fp`` or the newest quantized stage) wrote after a prompt.

    ``text`` is the continuation only, of ``tokens`` tokens written in ``seconds``, loading the model not
    counted; ``problem`` says why there is none.
    """

    stage: str
    prompt: str
    text: str = ""
    tokens: int = 0
    seconds: float = 0.0
    problem: str = ""


class ControlAck(Event, frozen=True, kw_only=True, tag="control.ack"):
    """The engine saw a request (``stop`` or ``abort``) and will act on it."""

    request: str
    id: str


MEASUREMENT = "measurement"
"""Code of the warning that a version of the model is measured better than it can be."""


class Warning(Event, frozen=True, kw_only=True, tag="warning"):
    """Something the user should know; the run goes on."""

    code: str
    message: str
    hint: str = ""


class Error(Event, frozen=True, kw_only=True, tag="error"):
    """Why the attempt ends: one line, where, and the remedy."""

    code: str
    where: str
    message: str
    hint: str
    exit_code: int


class RunFinished(Event, frozen=True, kw_only=True, tag="run.finished"):
    """The attempt's last word; an attempt without one crashed.

    An attempt that did something with a finished run (an evaluation, an export) and failed leaves the run as
    finished as it was: ``leaves``.
    """

    outcome: Outcome
    exit_code: int
    seconds: float
    leaves: Outcome | None = None
    task: str = "run"


def error_event(error: EqatError) -> Error:
    """An error as the log keeps it."""
    return Error(
        code=error.exit_code.name.lower(),
        where=error.where,
        message=error.message,
        hint=error.hint,
        exit_code=int(error.exit_code),
    )


AnyEvent = (
    RunStarted
    | AttemptStarting
    | Plan
    | PhaseStarted
    | PhaseFinished
    | BlockStarted
    | BlockFinished
    | Metric
    | Memory
    | Eval
    | CheckpointCommitted
    | Export
    | Sample
    | ControlAck
    | Warning
    | Error
    | RunFinished
)
EVENT_TYPES: tuple[type[Event], ...] = get_args(AnyEvent)
BULK = frozenset({"metric", "memory"})
"""Kinds of nineteen events in twenty: whoever wants to know only what was achieved may skip them."""
