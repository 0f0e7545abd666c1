"""The text of a run as tokens: what each stage learns from, and what is evaluated."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, repeat
from typing import Any

import torch
from torch import Tensor

from engine.config.calibration import shared_out, texts_of
from engine.config.data import DataConfig
from engine.config.run import YOUNGER, RunConfig
from engine.config.stages import STAGES, answer_length, learns_answers
from engine.data.encoding import Encoder
from engine.data.packing import Answers
from engine.data.parts import Part
from engine.data.tokens import Warn, mixed_up, token_windows
from engine.errors import DataError
from engine.phases.instructions import Conversations, InstructionWindows
from engine.reporter import Reporter

PREPARE_SILENCE = 600
"""Seconds that a download, a long text to tokenize, or the check of a large checkpoint may take unheard."""


@dataclass(frozen=True)
class Windows:
    """What one stage learns from: token windows int ``[N, T]``, of which the first ``train`` are trained on
    and the others validate."""

    tokens_NT: Tensor
    train: int
    answers: Answers | None = None
    """What of conversations is learned; none of text, where every token is."""


@dataclass(frozen=True)
class Tokens:
    """Token windows of every use."""

    calibration: Mapping[str, Windows]
    """By stage; of a stage of ours that is not made, no window."""
    evaluation: Tensor
    """Int ``[N, T]``."""
    held_out: Conversations | None = None
    """Conversations whose answers are measured, where there are any."""
    further: Mapping[str, Tensor] = field(default_factory=dict)
    """Windows of other texts that are evaluated, by their names."""

    def measured(self) -> Tensor:
        """All windows that are evaluated: of the run's own text, then of each other one."""
        return torch.cat([self.evaluation, *self.further.values()]) if self.further else self.evaluation

    def measured_numel(self) -> int:
        """How many tokens these are; told of every step, so nothing is put together for it."""
        return sum(windows.numel() for windows in (self.evaluation, *self.further.values()))

    def spans(self) -> dict[str, tuple[int, int]]:
        """The first window among them of each other text, and the one behind its last."""
        found, end = {}, len(self.evaluation)
        for name, windows in self.further.items():
            found[name] = (end, end + len(windows))
            end += len(windows)
        return found

    def of(self, stage: str) -> Windows:
        """What a stage learns from."""
        return self.calibration[stage]

    def any(self) -> Tensor:
        """Windows to try a model on: those of the evaluation, else of the first stage that has some; else
        none."""
        candidates = (self.evaluation, *(windows.tokens_NT for windows in self.calibration.values()))
        return next((tokens for tokens in candidates if len(tokens)), self.evaluation)

    def digests(self) -> dict[str, str]:
        """SHA-256 of the text that is trained on (``data``) and of the text that is evaluated."""
        read = [tensor for windows in self.calibration.values() for tensor in _tensors(windows)]
        found = {"data": _token_digest(*read), "evaluation text": _token_digest(self.evaluation)}
        if self.held_out is not None:
            found["held-out conversations"] = _token_digest(*_tensors(self.held_out))
        if self.further:
            found["further texts"] = _token_digest(*self.further.values())
        return found


def _tensors(windows: Windows | Conversations) -> list[Tensor]:
    """The tokens, and what of them is learned, where that is not all."""
    answers = windows.answers
    return [windows.tokens_NT, *([answers.learned_NT, answers.segments_NT] if answers is not None else [])]


def _token_digest(*windows: Tensor) -> str:
    digest = hashlib.sha256()
    for tokens in windows:
        digest.update(f"{tuple(tokens.shape)};".encode())
        digest.update(tokens.to(torch.int32).contiguous().numpy().data)
    return digest.hexdigest()


def draw_tokens(
    config: RunConfig, encoder: Encoder, report: Reporter, own: Callable[[Part, int, int], Tensor]
) -> Tokens:
    """Token windows for every stage that learns from text, and for the evaluation; what is off gets none.
    ``own`` gives those of the model's own text: of a part, so many, of so many tokens.

    Raises:
        DataError: for text that is missing, empty, too short or of the wrong form.
    """
    said: set[tuple[str, str]] = set()
    texts = texts_of(config.data)

    def warn(code: str, message: str) -> None:
        # Stages draw from one text, and what is wrong with it is told once.
        if (code, message) not in said:
            said.add((code, message))
            report.warning(code, message)

    def draw(data: DataConfig, part: Part, sequences: int, length: int, setting: str) -> Tensor:
        report.leave_if_asked()
        report.expect_silence(PREPARE_SILENCE)
        if data.is_own:
            return own(part, sequences, length)
        with _said_of(setting):
            return token_windows(
                encoder,
                data,
                part,
                sequences=sequences,
                length=length,
                seed=config.runtime.seed,
                warn=warn,
            )

    def mixed(part: Part, sequences: int, length: int) -> Tensor:
        counts = shared_out(texts, sequences)
        setting = "data.mix" if config.data.mix else "data.source"
        drawn = [
            draw(text.data, part, count, length, setting)
            for text, count in zip(texts, counts, strict=True)
            if count
        ]
        return mixed_up(drawn, seed=config.runtime.seed, part=part)

    conversations: InstructionWindows | None = None
    if config.instructions.source is not None:
        report.leave_if_asked()
        report.expect_silence(PREPARE_SILENCE)
        conversations = InstructionWindows(config.instructions, encoder, config.runtime.seed, warn)

    def both(name: str) -> Windows:
        section = getattr(config, name)
        if conversations is not None and learns_answers(config, STAGES[name]):
            return _answers(conversations, section, report)
        length = section.sequence_length
        parts = [torch.zeros((0, length), dtype=torch.long)]
        if section.enabled:
            parts.append(mixed("train", section.sequences, length))
            if section.val_sequences:
                parts.append(mixed("validation", section.val_sequences, length))
        return Windows(torch.cat(parts), section.sequences)

    # Stages draw before the evaluation does: an empty or unfit calibration text is named first.
    calibration = {name: both(name) for name in _reading(config)}
    section = config.evaluation
    evaluation = torch.zeros((0, section.sequence_length), dtype=torch.long)
    further: dict[str, Tensor] = {}
    if section.enabled:
        read = [
            draw(data, "evaluation", section.windows, section.sequence_length, setting)
            for data, setting in zip(
                section.every_text(),
                chain(["evaluation.data.source"], repeat("evaluation.texts")),
                strict=False,
            )
        ]
        evaluation = read[0]
        further = dict(zip(section.text_names()[1:], read[1:], strict=True))
    held_out = None
    if conversations is not None and section.enabled and (most := config.instructions.evaluation_sequences):
        report.leave_if_asked()
        report.expect_silence(PREPARE_SILENCE)
        held_out = _held_out(conversations, most, answer_length(config), warn)
    return Tokens(calibration, evaluation, held_out, further)


@contextmanager
def _said_of(setting: str) -> Iterator[None]:
    """What is wrong with a text is said of the setting that names it: a run reads several."""
    try:
        yield
    except DataError as error:
        if not error.where.startswith(setting):
            error.where = f"{setting}: {error.where}" if error.where else setting
        raise


def _answers(conversations: InstructionWindows, section: Any, report: Reporter) -> Windows:
    """What a stage learns from where that is the answers of conversations."""
    wanted: list[tuple[Part, int]] = [("train", section.sequences), ("validation", section.val_sequences)]
    found = []
    for part, sequences in wanted:
        report.leave_if_asked()
        report.expect_silence(PREPARE_SILENCE)
        if sequences:
            found.append(conversations.draw(part, sequences, section.sequence_length))
    learned = torch.cat([one.answers.learned_NT for one in found])
    segments = torch.cat([one.answers.segments_NT for one in found])
    answers = Answers(learned, segments, found[0].answers.packed)
    return Windows(torch.cat([one.tokens_NT for one in found]), section.sequences, answers)


def _held_out(conversations: InstructionWindows, most: int, length: int, warn: Warn) -> Conversations | None:
    """What is reported; a set so small that nothing of it is held out has nothing to report."""
    found = conversations.draw("evaluation", most, length)
    if len(found.tokens_NT):
        return found
    warn("instructions-held-out", "no conversation is held out, so no answer perplexity is measured")
    return None


def _reading(config: RunConfig) -> list[str]:
    """The stages that have windows. The first ones of ours always do, empty ones where they are off: so the
    digest of the text is the one that earlier versions wrote down. Another changes nothing where it is
    off."""
    ours = set(RunConfig.__struct_fields__) - set(YOUNGER)
    return [
        stage.name for stage in STAGES if stage.reads_text and (stage.name in ours or stage.wanted(config))
    ]
