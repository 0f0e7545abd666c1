"""How long the texts of a run are, against what its model can read."""

from __future__ import annotations

from collections.abc import Iterator

from engine.architecture.families import Architecture
from engine.architecture.positions import PositionTable
from engine.config.run import RunConfig
from engine.errors import PreflightError
from engine.plan.costs import made_costs


def text_lengths(config: RunConfig) -> list[tuple[str, int]]:
    """Tokens of a window by the field that asks for them, of everything the run reads."""
    texts = (costs.text(config) for costs in made_costs(config))
    found = [(text.section, text.sequence_length) for text in texts if text is not None]
    if config.evaluation.enabled:
        found.append(("evaluation", config.evaluation.sequence_length))
    return [(f"{section}.sequence_length", length) for section, length in found]


def too_long(config: RunConfig, table: PositionTable | None) -> Iterator[PreflightError]:
    """A refusal for each length that the model's table of positions ends before."""
    if table is None:
        return
    for field, length in text_lengths(config):
        if length > table.rows:
            yield table.refusal(field, length)


def longer_than_trained(config: RunConfig, arch: Architecture) -> Iterator[str]:
    """A warning for each length that the model can read, but was not made for."""
    if arch.position_table is not None:
        return
    for field, length in text_lengths(config):
        if 0 < arch.max_positions < length:
            yield f"{field} {length} is longer than the {arch.max_positions} positions the model was made for"
