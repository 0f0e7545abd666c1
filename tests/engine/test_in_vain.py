"""A training of the whole network that was never better than its start says so: no perplexity moves then."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from engine_runs import FACTORS, FROM_LATENTS, of, run_here

from engine.run import events
from engine.run.directory import RunDirectory

Make = Callable[..., RunDirectory]
SCALES: dict[str, object] = {"e2e_qp.sequences": 8, "e2e_qp.batch_size": 4, "e2e_qp.epochs": 2}
STAGES = {
    "e2e_qp": (SCALES, "E2E-QP", {"e2e_qp.lr": 0.9}, "e2e_qp.lr,"),
    "e2e_qat": (
        FROM_LATENTS,
        "E2E-QAT",
        {"e2e_qat.lr_weight": 0.9, "e2e_qat.lr_quant": 0.9},
        "e2e_qat.lr_weight and e2e_qat.lr_quant,",
    ),
    "lr_qat": (
        FACTORS,
        "LR-QAT",
        {"lr_qat.lr_factors": 0.9, "lr_qat.lr_quant": 0.9},
        "lr_qat.lr_factors and lr_qat.lr_quant,",
    ),
}


def said(run: RunDirectory) -> list[events.Warning]:
    return [warning for warning in of(run, events.Warning) if warning.code == "in_vain"]


def perplexities(run: RunDirectory) -> dict[str, float | None]:
    return {event.stage: event.perplexity for event in of(run, events.Eval)}


@pytest.mark.parametrize("stage", STAGES)
def test_a_training_that_only_made_it_worse_says_so_and_keeps_its_start(make: Make, stage: str) -> None:
    settings, label, wild, rates = STAGES[stage]
    run = make(**{**settings, f"{stage}.val_sequences": 4, **wild})
    assert run_here(run) == 0
    (warning,) = said(run)
    assert warning.message.startswith(f"{label} was never better than where it began, on 4 sequences")
    assert warning.hint.startswith(f"lower {rates}")
    found = perplexities(run)
    # Latents begin as the integers that they were rounded to, but for their number format.
    assert found[stage] == pytest.approx(found["block_ap"], rel=1e-3 if stage == "e2e_qp" else 0.05)
    assert run_here(run) == 0  # nothing is trained again, and nothing said
    assert len(said(run)) == 1


@pytest.mark.parametrize("stage", STAGES)
def test_one_that_made_it_better_or_was_not_validated_says_nothing(make: Make, stage: str) -> None:
    settings, _, wild, _ = STAGES[stage]
    for more in ({f"{stage}.val_sequences": 4}, {f"{stage}.val_sequences": 0, **wild}):
        run = make(**{**settings, **more})
        assert run_here(run) == 0
        assert not said(run)
