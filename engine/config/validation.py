"""Whether a configuration's values make sense: each section checks its own, here is what relates them.

A refusal names the field as ``--set`` would (``block_ap.batch_size``), says what is wrong with the value, and
hints at what works.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from engine.config import checks
from engine.config.base import Section, field_types, mistake, takes
from engine.config.calibration import mixture, texts_of
from engine.config.ranks import check_ranks
from engine.config.run import RunConfig, run_config
from engine.config.stage_section import StageSection
from engine.config.stages import STAGES, learns_answers
from engine.errors import UsageError


def convert(tree: Mapping[str, Any]) -> RunConfig:
    """A tree of plain values as a :class:`RunConfig`; a wrong type is a :class:`UsageError`."""
    _refuse_endless(tree)
    try:
        return msgspec.convert(tree, run_config())
    except msgspec.ValidationError as error:
        what, where = mistake(error)
        raise UsageError(what, where=where or "config", hint=takes(run_config(), where)) from error


def _refuse_endless(tree: Mapping[str, Any], where: str = "") -> None:
    """TOML's integers have 64 bits; its reader takes longer ones, of more digits than Python prints."""
    for name, value in tree.items():
        place = f"{where}.{name}" if where else name
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, Mapping):
                _refuse_endless(each, place)
            elif isinstance(each, int) and each.bit_length() > 64:
                raise UsageError(
                    f"is a number of {each.bit_length()} bits", where=place, hint=takes(run_config(), place)
                )


def validate(config: RunConfig) -> None:
    """Raise :class:`UsageError` for the first field whose value cannot work, section after section."""
    convert(msgspec.to_builtins(config))  # structs made in Python are not type-checked when made
    checks.text("name", config.name)
    for name in field_types(type(config)):
        section = getattr(config, name)
        if isinstance(section, StageSection):
            section.check_on(config.grid, name)
        elif isinstance(section, Section):
            section.check(name)
    _one_makes_the_blocks(config)
    if config.instructions.source is not None and not any(learns_answers(config, s) for s in STAGES):
        stages = [stage for stage in STAGES if stage.answers]
        raise UsageError(
            f"nothing learns them: neither {' nor '.join(stage.label for stage in stages)} is made",
            where="instructions.source",
            hint=" or ".join(f"{stage.name}.enabled = true" for stage in stages),
        )
    if config.imported.enabled and any(text.data.is_own for text in texts_of(config.data)):
        raise UsageError(
            "the model's own text is written by the model as it came, which an imported run is not",
            where="data.mix" if mixture(config.data) else "data.source",
            hint="name another text, such as builtin or c4",
        )
    _one_trains_the_scales(config)
    check_ranks(config)


def _one_trains_the_scales(config: RunConfig) -> None:
    """Our stages of the whole network all train scales, and the later ones the integers beside them."""
    wanted = [name for name in ("e2e_qp", "e2e_qat", "lr_qat") if STAGES[name].wanted(config)]
    if len(wanted) > 1:
        one, other = (STAGES[name] for name in wanted[:2])
        beside = ", and the integers beside it" if one.name == "e2e_qp" else ""
        raise UsageError(
            f"{other.label} trains what {one.label} does{beside}",
            where=f"{other.name}.enabled",
            hint=f"{one.name}.enabled = false, or {other.name}.enabled = false",
        )


def _one_makes_the_blocks(config: RunConfig) -> None:
    """Each block is made once: the methods that go block by block exclude each other."""
    wanted = [stage for stage in STAGES if stage.scope == "block" and stage.wanted(config)]
    if len(wanted) > 1:
        one, other = wanted[:2]
        raise UsageError(
            f"{one.label} and {other.label} both make the blocks, and only one can",
            where=f"{other.name}.enabled",
            hint=f"{one.name}.enabled = false, or {other.name}.enabled = false",
        )
