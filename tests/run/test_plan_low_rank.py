"""What LR-QAT is planned to need: little enough for a card of 24 GB, and said by what takes it."""

from __future__ import annotations

from typing import Any

import pytest
from plan_tools import machine

from engine.config.loading import load
from engine.config.run import RunConfig
from engine.config.validation import validate
from engine.plan.estimate import GIB
from engine.plan.plan import PhasePlan, Plan, make_plan

CARD_24, CARD_80 = (
    machine(gpu_name="NVIDIA L4", gpu_free=int(22.5 * GIB), gpu_total=24 * GIB),
    machine(gpu_name="NVIDIA H100", gpu_free=78 * GIB, gpu_total=80 * GIB),
)
WEIGHTS_7B = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)


def config(llama: str, preset: str = "lr-qat-paper", **changes: Any) -> RunConfig:
    given = {name.replace("__", "."): value for name, value in changes.items()}
    return load(preset, overrides={"model.source": llama, **given})


def stage(plan: Plan, name: str = "lr_qat") -> PhasePlan:
    return next(phase for phase in plan.phases if phase.name == name)


def test_a_7b_model_fits_into_20_5_gib_with_four_sequences_at_a_time(llama: str) -> None:
    plan = make_plan(config(llama, lr_qat__micro_batch_size=4), machine=CARD_24)
    assert not plan.problems, plan.problems
    phase = stage(plan)
    assert sum(phase.parts.values()) <= 20.5 * GIB
    # A byte a weight, and little else of that size.
    assert WEIGHTS_7B <= phase.parts["frozen latents"] < 1.02 * WEIGHTS_7B
    rows = {"out": 4 * 4096 + 2 * 11008 + 4096, "in": 4 * 4096 + 2 * 4096 + 11008}
    scales = rows["out"]
    trained = 32 * (32 * (rows["out"] + rows["in"]) + scales)
    assert phase.parts["factors"] == 4 * trained
    assert phase.parts["optimizer"] == 12 * trained


@pytest.mark.parametrize(
    ("form", "bytes_each"), [("bfloat16", 2), ("float16", 2), ("fixed", 1), ("integer", 0.5)]
)
def test_frozen_weights_take_what_their_form_does(llama: str, form: str, bytes_each: float) -> None:
    plan = make_plan(config(llama, lr_qat__downcast=form, lr_qat__micro_batch_size=1), machine=CARD_80)
    assert stage(plan).parts["frozen latents"] == pytest.approx(bytes_each * WEIGHTS_7B, rel=0.02)


def test_what_is_left_to_the_plan_grows_with_the_card(llama: str) -> None:
    small, large = (make_plan(config(llama), machine=card) for card in (CARD_24, CARD_80))
    for plan, card in ((small, CARD_24), (large, CARD_80)):
        assert not plan.problems
        assert plan.peak_gpu_bytes <= card.gpu_free
        assert plan.micro_batches["lr_qat"] >= 1
    # Where memory is short, what passes at a time is little, or is not kept for the backward pass.
    assert small.recomputes or small.micro_batches["lr_qat"] < large.micro_batches["lr_qat"]
    assert stage(small).parts["activations"] < stage(large).parts["activations"]


def test_whole_weights_need_several_times_as_much(llama: str) -> None:
    plan = make_plan(config(llama, "full-qat"), machine=CARD_80)
    assert plan.problems
    assert sum(stage(plan, "e2e_qat").parts.values()) > 4 * 20.5 * GIB
    scales = make_plan(config(llama, "peqa", e2e_qp__micro_batch_size=1), machine=CARD_24)
    assert not scales.problems
    low_rank = stage(make_plan(config(llama, lr_qat__micro_batch_size=1), machine=CARD_24)).parts
    packed = stage(scales, "e2e_qp").parts
    kept = low_rank["frozen latents"] + low_rank["factors"] + low_rank["optimizer"]
    assert packed["packed blocks"] + packed["scales and optimizer"] < kept


def test_a_larger_rank_takes_more_memory_time_and_disk(llama: str) -> None:
    low, high = (
        make_plan(config(llama, lr_qat__rank=rank, lr_qat__micro_batch_size=1), machine=CARD_80)
        for rank in (8, 256)
    )
    assert stage(high).seconds > stage(low).seconds
    assert stage(high).parts["optimizer"] > 20 * stage(low).parts["optimizer"]
    assert high.recovery.checkpoint_bytes > 20 * low.recovery.checkpoint_bytes


def test_kept_latents_are_in_the_disk_of_block_ap(llama: str) -> None:
    chained = {"block_ap__enabled": True, "block_ap__sequences": 128, "lr_qat__sequences": 128}
    with_them = make_plan(config(llama, "lr-qat", **chained), machine=CARD_80)
    without = make_plan(config(llama, "lr-qat", **chained, lr_qat__start="integers"), machine=CARD_80)
    more = stage(with_them, "block_ap").peak_disk_bytes - stage(without, "block_ap").peak_disk_bytes
    assert more == pytest.approx(WEIGHTS_7B, rel=0.01)


@pytest.mark.parametrize("preset", ["lr-qat", "lr-qat-paper", "full-qat", "peqa"])
def test_presets_are_whole_and_train_end_to_end_alone(preset: str) -> None:
    found = load(preset, overrides={"model.source": "random://tiny-llama"})
    validate(found)
    assert not found.block_ap.enabled
    assert [found.e2e_qp.enabled, found.e2e_qat.enabled, found.lr_qat.enabled].count(True) == 1


def test_the_published_recipe_is_what_was_published() -> None:
    found = load("lr-qat-paper")
    section = found.lr_qat
    assert section.sequences * section.epochs // section.batch_size == 10_000
    assert (section.batch_size, section.sequence_length) == (32, 1024)
    assert (section.schedule, section.warmup_fraction, section.lr_final_fraction) == ("linear", 0.1, 0.0)
    assert (section.lr_factors, section.lr_quant, section.lr_scaling) == (1e-3, 1e-5, "absolute")
    assert (section.rank, section.alpha, section.grad_clip, section.weight_decay) == (32, 1.0, 1.0, 0.0)
    assert (section.loss, section.downcast, found.grid.symmetric) == ("cross_entropy", "fixed", True)
