"""What of a preset holds for an import: its settings, and nothing that it trains."""

from __future__ import annotations

import pytest

from engine.config.stages import stages_of
from engine.plan.streams import refuse_unknown_teacher
from eqat_tui.commands.importing import config_of, made_of, taught_by_text

PATH = "/models/theirs"


@pytest.mark.parametrize("preset", ["smoke", "paper", "gptq", "lr-qat", "full-qat", "peqa"])
def test_an_import_trains_only_what_is_typed(preset: str) -> None:
    config = config_of(preset, made_of(PATH))
    assert [stage.name for stage in stages_of(config)] == ["imported"]
    typed = config_of(preset, {**made_of(PATH), "lr_qat.enabled": True})
    assert [stage.name for stage in stages_of(typed)] == ["imported", "lr_qat"]


@pytest.mark.parametrize("stage", ["e2e_qp", "e2e_qat", "lr_qat"])
def test_what_has_no_original_to_learn_from_learns_from_the_text(
    stage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settled: dict[str, object] = {**made_of(PATH), f"{stage}.enabled": True, f"{stage}.loss": "kl"}
    config = config_of("smoke", settled)
    assert taught_by_text(config, settled) == {}, "the loss was typed"
    del settled[f"{stage}.loss"]
    assert taught_by_text(config, settled) == {f"{stage}.loss": "cross_entropy"}
    assert "without its original" in capsys.readouterr().err
    taught = config_of("smoke", {**settled, f"{stage}.loss": "cross_entropy"})
    refuse_unknown_teacher(taught)
    assert taught_by_text(taught, settled) == {}
    known = config_of("smoke", {**settled, "imported.reference": "random://tiny-llama"})
    assert taught_by_text(known, settled) == {}
