"""What a run learns from, in words."""

from __future__ import annotations

from engine.config.calibration import text_words
from engine.config.corpora import corpus_name
from engine.config.run import RunConfig
from engine.config.stages import learns_answers, stages_of


def learned_words(config: RunConfig) -> str:
    """The texts that the stages of a run learn from, for people; empty where none learns from any."""
    made = stages_of(config)
    answering = [stage.label for stage in made if learns_answers(config, stage)]
    plain = [stage for stage in made if stage.reads_text and stage.label not in answering]
    words = [text_words(config.data)] if plain else []
    if answering:
        words.append(f"answers of {corpus_name(config.instructions.data)} ({', '.join(answering)})")
    return ", then ".join(words)
