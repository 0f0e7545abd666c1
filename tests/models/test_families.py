"""Every variant of every family works, or is refused by the plan and by the engine in the same words."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import families
import pytest
import variants

from engine.architecture.families import Architecture
from engine.architecture.family_table import FAMILIES
from engine.architecture.positions import PositionTable, position_table
from engine.config.loading import load
from engine.errors import ExitCode, PreflightError
from engine.models.causal_lm import CausalLM
from engine.plan.lengths import too_long
from engine.plan.plan import make_plan

BOTH = [(name, name) for name in variants.VARIANTS]


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    try:
        yield variants.build(tmp_path / "model", request.param)
    except variants.Unknown:
        pytest.skip(f"this transformers has no {request.param}")


@pytest.mark.parametrize(("folder", "name"), BOTH, indirect=["folder"], ids=variants.VARIANTS)
def test_plan_and_engine_come_to_the_same_verdict(folder: Path, name: str) -> None:
    planned, lm = families.asked(folder), families.opened(folder)
    alone = families.asked(families.without_weights(folder))
    assert families.row(name, planned) == families.written_rows()[key(name)]
    if isinstance(planned, PreflightError):
        assert isinstance(lm, PreflightError), "planned to be refused, and opened"
        assert str(lm) == str(planned)
        assert planned.exit_code == ExitCode.PREFLIGHT
        assert isinstance(alone, PreflightError)
        assert alone.message == planned.message
        return
    assert isinstance(lm, CausalLM), lm
    assert isinstance(alone, Architecture), alone
    assert families.difference(lm, folder) < 1e-5
    assert_positions_are_known(lm, planned, alone)


def key(name: str) -> str:
    return "|".join(families.row(name, PreflightError("")).split("|")[1:3])


def assert_positions_are_known(lm: CausalLM, planned: Architecture, alone: Architecture) -> None:
    """A text that is one token too long is refused where it would fail, and nowhere else."""
    table = planned.position_table
    assert table == alone.position_table == lm.position_table
    longest = table.rows if table else planned.max_positions or 256
    assert families.reads(lm, longest)
    assert families.reads(lm, longest + 1) == (table is None)


def test_the_page_has_every_variant_and_nothing_else() -> None:
    assert set(families.written_rows()) == {key(name) for name in variants.VARIANTS}


def test_every_family_of_the_table_is_tried() -> None:
    tried = {settings.get("model_type", name) for name, settings in variants.VARIANTS.items()}
    assert set(FAMILIES) <= tried


# -- texts that are longer than a table of positions ----------------------------------------------------


def test_a_text_longer_than_a_table_of_positions_is_refused_by_the_plan(tmp_path: Path) -> None:
    """OPT has two rows more than positions; GPT-J computes its table, MPT its slopes up to a length."""
    for name, field in (("opt", "max_position_embeddings"), ("gptj", "n_positions"), ("mpt", "max_seq_len")):
        source = str(variants.build(tmp_path / name, name))
        lengths = {
            "block_ap.sequence_length": 257,
            "e2e_qp.sequence_length": 300,
            "evaluation.sequence_length": 256,
            "grid.group_size": 32,
        }
        plan = make_plan(load("smoke", overrides={"model.source": source, **lengths}))
        found = {problem.where: str(problem) for problem in plan.problems}
        assert set(found) == {"block_ap.sequence_length", "e2e_qp.sequence_length"}
        assert all(field in text and "256" in text for text in found.values())
        assert not any("longer than" in warning for warning in plan.warnings)


def test_a_text_longer_than_rotary_positions_is_only_warned_of(tmp_path: Path) -> None:
    source = str(variants.build(tmp_path / "model", "llama"))
    overrides = {"model.source": source, "grid.group_size": 32, "evaluation.sequence_length": 300}
    plan = make_plan(load("smoke", overrides=overrides))
    assert not plan.problems
    assert any("evaluation.sequence_length 300 is longer" in warning for warning in plan.warnings)


def test_a_table_of_a_family_that_nobody_knows_is_seen_in_its_weights(tmp_path: Path) -> None:
    table = PositionTable("max_position_embeddings", 256)
    text = {"model_type": "my_own", "max_position_embeddings": 256}
    assert position_table(text, {"model.wpe.weight": (258, 64)}) == PositionTable(
        "max_position_embeddings", 256
    )
    assert position_table(text, {"vision.position_embedding.weight": (99, 64)}) is None
    config = load("smoke", overrides={"evaluation.sequence_length": 300})
    (refusal,) = too_long(config, table)
    assert "evaluation.sequence_length" in str(refusal)
