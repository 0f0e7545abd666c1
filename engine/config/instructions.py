"""The conversations whose answers the whole network learns, in the place of plain text.

One section and no switch of a stage: where a source is named, every stage that can learn answers
(:attr:`engine.config.stages.Stage.answers`) learns these, while the blocks are trained on the plain text of
``[data]``. So there is neither a source that nobody reads nor a stage that waits for one.
"""

from __future__ import annotations

from typing import Literal

from engine.config import checks
from engine.config.base import Section
from engine.config.corpora import CORPORA
from engine.config.data import BUILTIN, OWN, DataConfig
from engine.errors import UsageError

OPTIONS = ("subset", "split", "revision")
"""Fields that belong to the source they were written for."""
READABLE = "a file (.json, .jsonl, .parquet), a folder of them, or a hub id such as tatsu-lab/alpaca"

Template = Literal["model", "alpaca", "chatml"]


class InstructionsConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Conversations whose answers are learned after the blocks."""

    source: str | None = None
    """Conversations come from a file, a folder or a hub id; with one, the stages that train the whole network
    learn its answers, and data is for the blocks alone."""
    subset: str | None = None
    """The hub data set is read in the configuration of this name."""
    split: str | None = None
    """Conversations are taken from this split of a hub data set, or from a folder's files of that name."""
    revision: str | None = None
    """The hub data set is read at this branch, tag or commit."""
    template: Template = "model"
    """Conversations are written by the model's own chat template, as the published Alpaca prompt, or as
    ChatML."""
    packing: bool = True
    """Short conversations share a sequence, and none sees another; false gives each a sequence of its own,
    and conversations of like length a batch."""
    evaluation_sequences: int = 64
    """Answer perplexity is measured on at most this many sequences of held-out conversations; 0 measures
    none."""

    def check(self, name: str) -> None:
        checks.count(f"{name}.evaluation_sequences", self.evaluation_sequences, least=0)
        checks.optional_text(f"{name}.source", self.source)
        for field in OPTIONS:
            checks.optional_text(f"{name}.{field}", getattr(self, field))
            if self.source is None and getattr(self, field) is not None:
                raise UsageError(
                    f"belongs to {name}.source, which is not given",
                    where=f"{name}.{field}",
                    hint=f"name {READABLE}",
                )
        if self.source is not None and self.source.strip() in (BUILTIN, OWN, *CORPORA):
            raise UsageError(
                f"{self.source.strip()} is plain text, and instructions are conversations",
                where=f"{name}.source",
                hint=f"name {READABLE}; plain text belongs into data.source",
            )

    @property
    def data(self) -> DataConfig:
        """Where the conversations come from, like any text; only where there are some."""
        assert self.source is not None, "there are no instructions"
        return DataConfig(source=self.source, subset=self.subset, split=self.split, revision=self.revision)
