"""What is measured of a version of the model besides its perplexity on the run's own text, as events, the
checkpoint and ``eqat show --json`` have it."""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from engine.config.tasks import MOST_SHOTS

MOST_TOKENS = 1 << 62
MOST_TEXTS = 32
"""That are shown; nobody names as many."""
MOST_SCORES = 256
"""Numbers of tasks that are kept and shown."""
EQAT = "eqat"
"""Who asks the tasks of the table (:mod:`engine.config.tasks`), lm-eval the others."""
MOST_ERRORS = 1024
"""Blocks whose error is shown; no model has as many."""


class Divergence(msgspec.Struct, frozen=True, kw_only=True):
    """How far what a model predicts is from what full precision predicts, over the positions of a text."""

    kl: float
    """Mean of the Kullback-Leibler divergence from full precision, in nats."""
    top1: float
    """Share of positions where both find the same token likeliest."""
    logit_error: float
    """Mean over the positions of the largest error of a logit there."""
    largest_logit_error: float
    """The largest of all."""

    @property
    def is_sound(self) -> bool:
        """Whether the numbers can be what they are said to be."""
        others = (self.kl, self.logit_error, self.largest_logit_error)
        return 0 <= self.top1 <= 1 and all(0 <= value < math.inf for value in others)


class TextMeasure(msgspec.Struct, frozen=True, kw_only=True):
    """One more text that perplexity is measured on."""

    corpus: str
    perplexity: float | None
    """None when it was not a finite number."""
    tokens: int
    divergence: Divergence | None = None

    @property
    def is_sound(self) -> bool:
        """As above."""
        whole = self.perplexity is None or 0 < self.perplexity < math.inf
        return whole and 0 <= self.tokens <= MOST_TOKENS and (not self.divergence or self.divergence.is_sound)


class TaskScore(msgspec.Struct, frozen=True, kw_only=True):
    """One number of a task that lm-eval asked."""

    task: str
    metric: str
    """As lm-eval calls it, with the filter of the answers where there are several: ``acc_norm``."""
    value: float | None
    """None when it was not a finite number."""
    stderr: float | None = None
    shots: int | None = None
    """Examples before each question; none where those of a group's members differ."""
    questions: int = 0
    better: Literal["larger", "smaller"] = "larger"
    by: str = ""
    """What asked, with its version."""

    @property
    def is_sound(self) -> bool:
        """As above."""
        numbers = (self.value or 0.0, self.stderr or 0.0)
        return all(map(math.isfinite, numbers)) and 0 <= self.questions <= MOST_TOKENS

    @property
    def examples(self) -> str:
        """How many examples there were, in words behind the task's name; nothing where there were none, or a
        log has a number that cannot be one."""
        return f" {self.shots}-shot" if self.shots and 0 < self.shots <= MOST_SHOTS else ""

    @property
    def name(self) -> str:
        """Task, examples and metric in words; and who asked, where that was not lm-eval."""
        return f"{self.task}{self.examples}, {self.metric}{f' ({EQAT})' if self.by == EQAT else ''}"


class Further(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All of it of one version of the model, as a checkpoint remembers it."""

    texts: tuple[TextMeasure, ...] = ()
    scores: tuple[TaskScore, ...] = ()
    """Of tasks that lm-eval asked."""
    divergence: Divergence | None = None
    """On the run's own text."""
    block_errors: tuple[float | None, ...] = ()
    """Relative error of the hidden states behind each block, against full precision; none for one that is
    not finite."""

    def __post_init__(self) -> None:
        # Damage that leaves a number may leave one that none of these can be.
        sound = all(one.is_sound for one in self.texts) and all(one.is_sound for one in self.scores)
        sound = sound and (self.divergence is None or self.divergence.is_sound)
        if not sound or not all(0 <= error < math.inf for error in self.block_errors if error is not None):
            raise ValueError("a number is not what it is said to be")
