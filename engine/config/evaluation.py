"""How each version of the model is measured."""

from __future__ import annotations

from engine.config.base import Section
from engine.config.data import DataConfig


class EvaluationConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Perplexity on non-overlapping windows."""

    enabled: bool = True
    """Measure perplexity before, between and after."""
    data: DataConfig = DataConfig(source="wikitext2", split="test")
    sequence_length: int = 2048
    """Tokens per window (context)."""
    windows: int = 0
    """At most this many windows; 0 takes the whole text."""
    batch_size: int = 4
    """Windows per forward pass."""
    tasks: tuple[str, ...] = ()
    """Zero-shot tasks: winogrande, piqa, hellaswag, arc_easy, arc_challenge, or .jsonl files of questions."""
    task_limit: int = 0
    """At most this many questions of each task; 0 takes all."""
