"""The text of a run as tokens: what each stage learns from, and what is evaluated."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from engine.config.calibration import shared_out, texts_of
from engine.config.data import DataConfig
from engine.config.run import YOUNGER, RunConfig
from engine.config.stages import STAGES
from engine.data.encoding import Encoder
from engine.data.parts import Part
from engine.data.tokens import mixed_up, token_windows
from engine.reporter import Reporter

PREPARE_SILENCE = 600
"""Seconds that a download, a long text to tokenize, or the check of a large checkpoint may take unheard."""


@dataclass(frozen=True)
class Windows:
    """What one stage learns from: token windows int ``[N, T]``, of which the first ``train`` are trained on
    and the others validate."""

    tokens_NT: Tensor
    train: int


@dataclass(frozen=True)
class Tokens:
    """Token windows of every use."""

    calibration: Mapping[str, Windows]
    """By stage; of a stage of ours that is not made, no window."""
    evaluation: Tensor
    """Int ``[N, T]``."""
    further: Mapping[str, Tensor] = field(default_factory=dict)
    """The same of other texts, by their names."""

    def measured(self) -> Tensor:
        """All windows that are evaluated: of the run's own text, then of each other one."""
        return torch.cat([self.evaluation, *self.further.values()]) if self.further else self.evaluation

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
        return {
            "data": _token_digest(*(windows.tokens_NT for windows in self.calibration.values())),
            "evaluation text": _token_digest(self.evaluation),
            **({"further texts": _token_digest(*self.further.values())} if self.further else {}),
        }


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

    def draw(data: DataConfig, part: Part, sequences: int, length: int) -> Tensor:
        report.leave_if_asked()
        report.expect_silence(PREPARE_SILENCE)
        if data.is_own:
            return own(part, sequences, length)
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
        drawn = [
            draw(text.data, part, count, length) for text, count in zip(texts, counts, strict=True) if count
        ]
        return mixed_up(drawn, seed=config.runtime.seed, part=part)

    def both(section: Any) -> Windows:
        length = section.sequence_length
        parts = [torch.zeros((0, length), dtype=torch.long)]
        if section.enabled:
            parts.append(mixed("train", section.sequences, length))
            if section.val_sequences:
                parts.append(mixed("validation", section.val_sequences, length))
        return Windows(torch.cat(parts), section.sequences)

    # Stages draw before the evaluation does: an empty or unfit calibration text is named first.
    calibration = {name: both(getattr(config, name)) for name in _reading(config)}
    section = config.evaluation
    evaluation = torch.zeros((0, section.sequence_length), dtype=torch.long)
    further: dict[str, Tensor] = {}
    if section.enabled:
        read = [
            draw(data, "evaluation", section.windows, section.sequence_length)
            for data in section.every_text()
        ]
        evaluation = read[0]
        further = dict(zip(section.text_names()[1:], read[1:], strict=True))
    return Tokens(calibration, evaluation, further)


def _reading(config: RunConfig) -> list[str]:
    """The stages that have windows. The first ones of ours always do, empty ones where they are off: so the
    digest of the text is the one that earlier versions wrote down. Another changes nothing where it is
    off."""
    ours = set(RunConfig.__struct_fields__) - set(YOUNGER)
    return [
        stage.name for stage in STAGES if stage.reads_text and (stage.name in ours or stage.wanted(config))
    ]
