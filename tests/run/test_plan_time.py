"""How long a run is planned to take, and what is compiled because it pays."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from plan_tools import H200, PAPER, machine, paper

from engine.config.derived import resolve
from engine.config.evaluation import EvaluationConfig
from engine.config.loading import load
from engine.config.overrides import apply_overrides
from engine.config.runtime import RuntimeConfig
from engine.plan.plan import make_plan


def test_time_estimates_are_of_the_right_order(llama: str) -> None:
    """An eager step of 2 x 2048 tokens takes 27.5 ms on an H200; two epochs are 4096 of them a block."""
    plan = make_plan(paper(llama, runtime=RuntimeConfig(compile="off")), machine=H200)
    seconds = {phase.name: phase.seconds for phase in plan.phases}
    assert 0.8 < seconds["block_ap"] / (27.5e-3 * 4096 * 32) < 1.6
    assert not plan.compiles
    assert "H200" in plan.time_basis
    assert plan.time_basis.startswith("estimate")


def test_a_long_training_on_a_gpu_is_compiled_and_planned_so(llama: str) -> None:
    """Compiled, the same step takes 11.4 ms."""
    plan = make_plan(paper(llama), machine=H200)
    seconds = {phase.name: phase.seconds for phase in plan.phases}
    assert plan.compiles
    assert 0.8 < seconds["block_ap"] / (11.4e-3 * 4096 * 32) < 1.6


def test_what_end_to_end_training_takes_is_estimated(llama: str) -> None:
    """Compiled, a layer takes 34.7 ms for 4 sequences of 4096 tokens on an H100 that keeps activations."""
    h100 = machine(gpu_name="NVIDIA H100 80GB HBM3")
    config = paper(llama)
    batches = msgspec.structs.replace(config.e2e_qp, micro_batch_size=4)
    plan = make_plan(msgspec.structs.replace(config, e2e_qp=batches), machine=h100)
    seconds = {phase.name: phase.seconds for phase in plan.phases}
    assert plan.compiles_e2e
    assert not plan.recomputes
    assert 0.9 < seconds["e2e_qp"] / (34.7e-3 * 1024 * 32) < 1.2


def test_passages_are_compiled_where_many_pass(llama: str) -> None:
    """A 7B block takes 2 ms for a sequence of 2048 tokens, of which a third can be saved."""
    assert make_plan(paper(llama), machine=H200).compiles_passages
    few = msgspec.structs.replace(PAPER.block_ap, sequences=8, val_sequences=0)
    for changes in (
        {"runtime": RuntimeConfig(deterministic=True)},
        {"runtime": RuntimeConfig(compile="off")},
        {"block_ap": few, "evaluation": EvaluationConfig(windows=8)},
    ):
        assert not make_plan(paper(llama, **changes), machine=H200).compiles_passages


@pytest.mark.parametrize(
    ("runtime", "compiles"),
    [
        ({"compile": "on"}, True),
        ({"compile": "auto"}, False),  # it is over before compiling would be
        ({"compile": "on", "deterministic": True}, False),
        ({"compile": "on", "device": "cpu"}, False),
    ],
)
def test_what_compiling_depends_on(runtime: dict[str, Any], compiles: bool) -> None:
    config = apply_overrides(load("smoke"), {f"runtime.{name}": value for name, value in runtime.items()})
    assert make_plan(resolve(config), machine=H200).compiles == compiles
