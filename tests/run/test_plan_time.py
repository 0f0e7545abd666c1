"""How long a run is planned to take, and what is compiled because it pays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from plan_tools import H200, LLAMA_2, PAPER, SHAPES, machine, paper

from engine.config.derived import resolve
from engine.config.evaluation import EvaluationConfig
from engine.config.grid import GridConfig
from engine.config.joint_search import GPU_VALUES
from engine.config.loading import load
from engine.config.overrides import apply_overrides
from engine.config.runtime import RuntimeConfig
from engine.plan.estimate import CONSTANTS
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


H100, H200_NAME = "NVIDIA H100 80GB HBM3", "NVIDIA H200"


@pytest.mark.parametrize(
    ("gpu", "sequences", "epochs", "compiled", "measured"),
    [
        (H100, 2048, 3, True, 48.0),
        (H100, 2048, 4, True, 54.9),
        (H200_NAME, 512, 2, False, 9.8),
        (H200_NAME, 1024, 3, False, 22.3),
    ],
)
def test_a_small_network_is_planned_with_the_gaps_between_its_kernels(
    tmp_path: Path, gpu: str, sequences: int, epochs: int, compiled: bool, measured: float
) -> None:
    """Seconds of E2E-QAT of SmolLM2, teacher and validation included: short ones, whose steps are recorded,
    and long ones, whose steps are compiled too. benchmarks/README.md, "Every method on one shape"."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_2 | SHAPES["135m"]))
    config = apply_overrides(
        load("small"),
        {
            "model.source": str(tmp_path),
            "data.mix": [],
            "data.source": "builtin",
            "block_ap.sequences": sequences // 2,
            "e2e_qat.sequences": sequences,
            "e2e_qat.epochs": epochs,
        },
    )
    plan = make_plan(resolve(config), machine=machine(gpu_name=gpu))
    assert plan.compiles_e2e == compiled
    (planned,) = [phase.seconds for phase in plan.phases if phase.name == "e2e_qat"]
    assert planned == pytest.approx(measured, rel=0.15)


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


def seconds_and_parts(llama: str, **changes: Any) -> tuple[float, dict[str, int]]:
    """Of Block-AP with these settings, ``runtime`` or ``grid`` among them."""
    others = {key: changes.pop(key) for key in ("runtime", "grid") if key in changes}
    section = msgspec.structs.replace(PAPER.block_ap, **changes)
    plan = make_plan(paper(llama, block_ap=section, **others), machine=H200)
    (phase,) = [phase for phase in plan.phases if phase.name == "block_ap"]
    return phase.seconds, phase.parts


@pytest.mark.parametrize(
    ("runtime", "group_size", "by_kernel"),
    [
        ({}, 128, True),
        ({"compile": "off"}, 128, False),
        ({"deterministic": True}, 128, False),
        ({}, -1, False),
    ],
)
def test_a_search_for_the_start_is_planned(
    llama: str, runtime: dict[str, Any], group_size: int, by_kernel: bool
) -> None:
    """Every weight of 32 blocks with 4 x 36 pairs; torch's form moves 50 bytes for each, and holds some."""
    others = {"runtime": RuntimeConfig(**runtime), "grid": GridConfig(bits=2, group_size=group_size)}
    minmax = {"grid": msgspec.structs.replace(others["grid"], range="minmax")}
    usual, _ = seconds_and_parts(llama, **{**others, **minmax})
    seconds, _ = seconds_and_parts(llama, start="search", **others)
    errors = 32 * (4 * 4096**2 + 3 * 4096 * 11008) * 4 * 36
    expected = errors * (0.5e-12 if by_kernel else 50 / 4.0e12)
    statistics = 64 / (2 * 4096 * 3) * usual  # about
    assert expected < seconds - usual < expected * 1.2 + 3 * statistics


@pytest.mark.parametrize(
    ("settings", "ranges"),
    [
        ({"bits": 2}, 64),
        ({"bits": 3}, 15),
        ({"bits": 2, "symmetric": True}, 15),
        ({"zero_point": "fixed"}, 30),
    ],
)
def test_as_many_ranges_are_planned_as_are_tried(llama: str, settings: dict[str, Any], ranges: int) -> None:
    others = GridConfig(group_size=128, range="search", **settings)
    one, _ = seconds_and_parts(llama, grid=msgspec.structs.replace(others, range="minmax"))
    all_of_them, _ = seconds_and_parts(llama, grid=others)
    of_a_range = 32 * (4 * 4096**2 + 3 * 4096 * 11008) * CONSTANTS.gpu_search_bytes / 4.0e12
    assert all_of_them - one == pytest.approx((ranges - 1) * of_a_range, rel=0.01)


def test_what_a_search_holds_is_planned() -> None:
    """Where it is more than the training of a tiny block needs."""
    small = resolve(load("smoke", overrides={"runtime.compile": "off"}))
    held = {}
    for start in ("range", "search"):
        plan = make_plan(apply_overrides(small, {"block_ap.start": start}), machine=H200)
        (phase,) = [phase for phase in plan.phases if phase.name == "block_ap"]
        held[start] = phase.parts["activations and gradients"]
    assert held["range"] < held["search"] == 2 * GPU_VALUES * 4


def test_leaving_errors_out_is_planned(llama: str) -> None:
    usual, usual_parts = seconds_and_parts(llama)
    seconds, parts = seconds_and_parts(llama, drop_largest=0.001)
    numbers = PAPER.block_ap.batch_size * PAPER.block_ap.sequence_length * 4096
    steps = 32 * PAPER.block_ap.epochs * PAPER.block_ap.sequences // PAPER.block_ap.batch_size
    assert seconds - usual == pytest.approx(steps * numbers * 60 / 4.0e12, rel=0.01)
    more = parts["activations and gradients"] - usual_parts["activations and gradients"]
    assert more == 2 * 4 * numbers


def test_threads_beyond_the_processors_make_nothing_faster() -> None:
    small = resolve(load("smoke", overrides={"runtime.device": "cpu"}))
    found = [
        make_plan(apply_overrides(small, {"runtime.threads": count}), machine=machine(cpus=2)).seconds
        for count in (1, 2, 99)
    ]
    assert found[0] > found[1] == found[2]


def test_a_budget_that_is_too_small_is_what_the_hint_names() -> None:
    small = resolve(load("smoke", overrides={"runtime.device": "cpu", "runtime.host_memory_gib": 0.01}))
    (problem,) = make_plan(small, machine=machine(cpus=2)).problems
    assert problem.hint == "raise runtime.host_memory_gib, or use a machine with more memory"
