"""What GPTQ is planned to take, alone and as a start of Block-AP; and what is refused of its settings."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from plan_tools import H200, PAPER, machine, paper

from engine.architecture.description import TINY_LLAMA
from engine.architecture.families import architecture
from engine.config.gptq import GPTQConfig
from engine.config.latents import Start
from engine.config.loading import load
from engine.config.run import RunConfig
from engine.config.sameness import config_hash
from engine.config.stages import stages_of
from engine.config.validation import validate
from engine.errors import UsageError
from engine.plan.costs import costs_of
from engine.plan.estimate import GIB, Workload
from engine.plan.plan import PhasePlan, make_plan
from engine.plan.streams import may_share_teacher, streams_batch


def by_gptq(source: str, *, e2e_qp: bool = False, **changes: Any) -> RunConfig:
    off = msgspec.structs.replace(PAPER.block_ap, enabled=False)
    then = msgspec.structs.replace(PAPER.e2e_qp, enabled=e2e_qp, loss="kl", sequence_length=2048)
    return paper(source, block_ap=off, e2e_qp=then, gptq=GPTQConfig(enabled=True, **changes))


def made(config: RunConfig, **options: Any) -> PhasePlan:
    plan = make_plan(config, **{"machine": H200, **options})
    return next(phase for phase in plan.phases if phase.name in ("gptq", "block_ap"))


def test_a_7b_model_takes_minutes_and_a_fraction_of_a_gpu(llama: str) -> None:
    plan = make_plan(by_gptq(llama), machine=H200)
    names = ["prepare", "evaluate_fp", "gptq", "evaluate_rtn", "evaluate_gptq", "export"]
    assert [phase.name for phase in plan.phases] == names
    phase = made(by_gptq(llama))
    assert 60 < phase.seconds < 600
    weights = 4 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert phase.parts["latents"] == weights
    # Four matrices of the widest input's Hessian, and the matrix behind it; the wider pair has smaller ones.
    assert phase.parts["activations or Hessians"] >= 4 * (4 * 11008**2 + 4096 * 11008)
    assert phase.peak_gpu_bytes is not None
    assert phase.peak_gpu_bytes < 8 * GIB


def test_latents_that_a_stage_behind_it_starts_from_are_on_its_disk(llama: str) -> None:
    low_rank = msgspec.structs.replace(PAPER.lr_qat, enabled=True, sequences=128)

    def planned(start: Start) -> int:
        behind = msgspec.structs.replace(low_rank, start=start)
        config = msgspec.structs.replace(by_gptq(llama), lr_qat=behind)
        return made(config).peak_disk_bytes

    weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert planned("latents") - planned("integers") == pytest.approx(weights, rel=0.01), "a byte each"


def test_it_has_one_stream_and_nobody_learns_from_it(llama: str) -> None:
    config = by_gptq(llama, sequences=128, sequence_length=2048, e2e_qp=True)
    plan = make_plan(config, machine=H200)
    assert plan.stream_bytes == 128 * 2048 * 4096 * 2
    assert made(config).parts["activation store (device)"] == plan.stream_bytes
    assert not may_share_teacher(config, cuda=True)
    assert streams_batch(config) == config.gptq.batch_size
    assert streams_batch(paper(llama)) == PAPER.block_ap.batch_size


def test_nothing_is_kept_in_the_middle_of_a_block(llama: str) -> None:
    slow = by_gptq(llama, sequences=4096)
    plan = make_plan(slow, machine=machine(gpu_name=None, cpus=2), device="cpu")
    phase = next(phase for phase in plan.phases if phase.name == "gptq")
    assert plan.recovery.snapshots == {"gptq": 0}
    assert plan.recovery.lost_seconds >= phase.seconds / plan.blocks * 0.9 > 300
    assert any("a kill can lose" in warning for warning in plan.warnings)
    assert plan.recovery.streams == "stored"
    stored = make_plan(by_gptq(llama), machine=H200).recovery
    assert stored.checkpoint_bytes == 0


def test_where_it_does_not_fit_less_of_it_is_offered(llama: str) -> None:
    plan = make_plan(by_gptq(llama, batch_size=128), machine=machine(gpu_free=12 * GIB, gpu_total=12 * GIB))
    assert [problem.where for problem in plan.problems] == ["gptq"]
    assert plan.problems[0].hint.startswith("gptq.batch_size = ")


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_as_a_start_it_takes_its_time_and_room(llama: str, device: str) -> None:
    def begun(start: str, **changes: Any) -> PhasePlan:
        section = msgspec.structs.replace(PAPER.block_ap, start=start)
        config = paper(llama, block_ap=section, gptq=GPTQConfig(**changes))
        return made(config, device=device)

    plain, few, many = begun("range"), begun("gptq", sequences=64), begun("gptq", sequences=1024)
    assert plain.seconds < few.seconds < many.seconds
    assert begun("gptq", sequences=10**6).seconds == begun("gptq", sequences=4096).seconds
    assert sum(few.parts.values()) >= sum(plain.parts.values())


@pytest.mark.parametrize("bits", [2, 4])
def test_a_search_for_scales_takes_longer(llama: str, bits: int) -> None:
    grid = msgspec.structs.replace(PAPER.grid, bits=bits)
    searched, ranged = (
        made(msgspec.structs.replace(by_gptq(llama, scales=scales), grid=grid))
        for scales in ("search", "range")
    )
    assert searched.seconds > ranged.seconds


def test_what_it_leaves_is_as_large_as_any_blocks() -> None:
    config = by_gptq("random://tiny-llama")
    work = Workload(arch=architecture(TINY_LLAMA), config=config, cuda=False, windows=4)
    (stage,) = stages_of(config)
    others = costs_of(stages_of(paper("random://tiny-llama"))[0])
    assert costs_of(stage).result_bytes(work) == others.result_bytes(work)
    assert costs_of(stage).kept(work, 0, 0) == costs_of(stage).result_bytes(work)
    assert costs_of(stage).kept(work, 1, 0) > costs_of(stage).result_bytes(work)


@pytest.mark.parametrize(
    ("field", "value", "hint"),
    [
        ("damping", "0", "from 1e-06 to 1"),
        ("damping", "1.5", "from 1e-06 to 1"),
        ("damping", "nan", "a finite number"),
        ("sequences", "0", "at least 1"),
        ("sequence_length", "1", "at least 2"),
        ("batch_size", "0", "at least 1"),
        ("batch_size", "129", "at most 128"),
    ],
)
def test_values_that_cannot_work_are_refused_by_name(field: str, value: str, hint: str) -> None:
    with pytest.raises(UsageError) as refused:
        validate(load("gptq", overrides={"model.source": "a/b", f"gptq.{field}": value}))
    assert refused.value.where == f"gptq.{field}"
    assert refused.value.hint == hint


def test_it_and_block_ap_both_make_the_blocks() -> None:
    with pytest.raises(UsageError, match="Block-AP and GPTQ both make the blocks"):
        validate(load("smoke", overrides={"gptq.enabled": "true"}))


def test_a_start_from_it_is_another_run_with_each_of_its_settings() -> None:
    def hashed(**overrides: str) -> str:
        return config_hash(load("smoke", overrides={k.replace("__", "."): v for k, v in overrides.items()}))

    hashes = [
        hashed(),
        hashed(block_ap__start="gptq"),
        hashed(block_ap__start="gptq", gptq__damping="0.1"),
        hashed(block_ap__start="gptq", gptq__sequences="4"),
    ]
    assert len(set(hashes)) == len(hashes)
