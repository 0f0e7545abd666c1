"""A training of the whole network that was never better than its start says so: no perplexity moves then."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from engine_runs import FACTORS, FROM_LATENTS, of, run_here

from engine.config.loading import load
from engine.config.stages import STAGES as CONFIGURED
from engine.methods.network.network import NetworkResult
from engine.phases.end_to_end import _say_if_in_vain
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


@pytest.mark.parametrize(
    ("began", "best", "steps", "says"),
    [
        (1.0, 1.0, 8, True),
        (1.0, 0.999, 8, False),
        (math.nan, 0.5, 8, False),
        (math.inf, 0.5, 8, False),
        (None, None, 8, False),
        (1.0, 1.0, 0, False),
    ],
)
def test_it_is_said_where_the_start_was_validated_best(
    began: float | None, best: float | None, steps: int, says: bool
) -> None:
    told: list[str] = []
    report = SimpleNamespace(warning=lambda code, message, hint: told.append(code))
    job: Any = SimpleNamespace(config=load("smoke"), report=report)
    _say_if_in_vain(job, CONFIGURED["e2e_qp"], NetworkResult(began, best, steps))
    assert told == ["in_vain"] * says
