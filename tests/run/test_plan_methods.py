"""What each method that trains a whole network takes on one shape: the plan beside what an H200 was measured
at (benchmarks/README.md, "Every method on one shape")."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from plan_tools import LLAMA_2, SHAPES

from engine.architecture.families import architecture
from engine.config.loading import load
from engine.config.overrides import apply_overrides
from engine.config.stages import STAGES
from engine.plan.costs import Steps, costs_of
from engine.plan.estimate import GIB, Workload
from engine.plan.rates import speed

LARGE = LLAMA_2 | SHAPES["7b"] | {"num_hidden_layers": 4, "torch_dtype": "bfloat16"}
SMALL = LLAMA_2 | SHAPES["135m"] | {"torch_dtype": "bfloat16"}
BY_ROW = {"grid.bits": 4, "grid.group_size": -1}
BY_GROUP = {"grid.bits": 2, "grid.group_size": 64}
FULL = {"start": "latents", "train": ("weights", "scales", "norms")}
STEPS = 12


def planned(
    shape: dict[str, Any], stage: str, batch: int, grid: dict[str, object], changes: dict[str, object]
) -> tuple[float, float]:
    """Milliseconds of a step, recorded and compiled, and GiB with the embeddings and the head."""
    section = {
        "sequences": STEPS * batch,
        "val_sequences": 0,
        "sequence_length": 1024,
        "batch_size": batch,
        "micro_batch_size": batch,
        "epochs": 1,
        "loss": "cross_entropy",
        "activation_checkpointing": "off",
        **changes,
    }
    settings = {f"{stage}.{name}": value for name, value in section.items()}
    config = apply_overrides(load("smoke"), {**grid, "runtime.compile": "on", **settings})
    arch = architecture(shape)
    work = Workload(arch=arch, config=config, cuda=True, windows=0, compiled=frozenset({stage}))
    costs: Any = costs_of(STAGES[stage])
    memory = sum(costs.network_memory(work).values()) + arch.rest_params * work.model_bytes
    seconds = costs.training_seconds(work, speed(True, "NVIDIA H200", 1, True))
    return 1e3 * seconds / STEPS, memory / GIB


@pytest.mark.parametrize(
    ("shape", "stage", "grid", "changes", "ms", "gib"),
    [
        (LARGE, "e2e_qp", BY_ROW, {}, 38.49, 3.27),
        (LARGE, "lr_qat", BY_ROW, {"downcast": "fixed"}, 44.15, 3.76),
        (LARGE, "lr_qat", BY_ROW, {"downcast": "bfloat16"}, 43.73, 4.51),
        (LARGE, "e2e_qat", BY_ROW, FULL, 43.82, 13.62),
        (SMALL, "e2e_qp", BY_GROUP, {}, 34.00, 4.30),
        (SMALL, "e2e_qat", BY_GROUP, {}, 23.94, 5.70),
    ],
    ids=["e2e_qp", "lr_qat-fixed", "lr_qat-bfloat16", "full_qat", "small-e2e_qp", "small-e2e_qat"],
)
def test_a_step_takes_what_was_measured(
    shape: dict[str, Any],
    stage: str,
    grid: dict[str, object],
    changes: dict[str, object],
    ms: float,
    gib: float,
) -> None:
    batch = 4 if shape is LARGE else 8
    took, needed = planned(shape, stage, batch, grid, changes)
    assert took == pytest.approx(ms, rel=0.1)
    assert gib < needed < 1.15 * gib, "what is planned too small ends in an error on a full card"


def test_kl_takes_little_more_than_cross_entropy_by_kernels_of_its_own() -> None:
    """In torch's operations its logits are read and written a dozen times more, a sixth of a step of a small
    model; a recorded step has kernels for them."""
    arch = architecture(SMALL)
    costs: Any = costs_of(STAGES["e2e_qat"])
    rates = speed(True, "NVIDIA H200", 1, True)
    found: dict[str, float] = {}
    for loss in ("cross_entropy", "kl"):
        fields = {"e2e_qat.loss": loss, "e2e_qat.sequences": 8 * STEPS, "e2e_qat.batch_size": 8}
        fields |= {"e2e_qat.micro_batch_size": 8, "e2e_qat.epochs": 1, "e2e_qat.val_sequences": 0}
        config = apply_overrides(load("smoke"), {**BY_GROUP, **fields, "e2e_qat.sequence_length": 1024})
        work = Workload(arch=arch, config=config, cuda=True, windows=0)
        found[loss] = 1e3 * costs.training_seconds(work, rates) / STEPS
        compiled = msgspec.structs.replace(work, compiled=frozenset({"e2e_qat"}))
        less = costs.network_memory(work)["logits or one block's backward"]
        assert costs.network_memory(compiled)["logits or one block's backward"] < less
        plain = costs._head_traffic(work, rates, Steps()) - costs._head_traffic(
            work, rates, Steps(recorded=True)
        )
        assert plain / STEPS == pytest.approx({"cross_entropy": 3.3e-3, "kl": 9.6e-3}[loss], rel=0.2)
        learned = {"instructions.source": "somebody/conversations", "e2e_qat.enabled": True}
        answers = apply_overrides(config, {**learned, "e2e_qp.enabled": False})
        work = msgspec.structs.replace(work, config=answers)
        as_recorded = costs._head_traffic(work, rates, Steps(recorded=True))
        assert as_recorded == costs._head_traffic(work, rates, Steps()), "answers are never recorded"
    assert found["kl"] == pytest.approx(58, rel=0.15)  # measured, of whole trainings: 58
    assert 0 < found["kl"] - found["cross_entropy"] < 3
