"""The plan is made of what the stages of a configuration say: anybody's stage is planned like ours."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from plan_tools import H200, PAPER, machine, paper
from toy_stages import registered

from engine.architecture.description import TINY_LLAMA, describe
from engine.architecture.families import architecture
from engine.config.dtypes import DTYPE_BYTES, resolved_dtype
from engine.config.export import ExportConfig
from engine.config.formats import FORMATS, gptq_bytes
from engine.config.grid import GridConfig
from engine.config.run import RunConfig
from engine.config.stages import STAGES, Stage, stages_of
from engine.plan.costs import costs_of, made_costs
from engine.plan.estimate import CONSTANTS, GIB, Workload
from engine.plan.export_sizes import exported_bytes
from engine.plan.fit import Place
from engine.plan.object_sizes import block_bytes, scales_bytes
from engine.plan.plan import PhasePlan, Plan, make_plan
from engine.plan.rates import speed
from engine.plan.streams import may_share_teacher, shares_teacher

BLOCK_TOY = {"name": "halving", "scope": "block", "costs": "toy_stages:BlockToyCosts"}
NETWORK_TOY = {"name": "tuning", "scope": "network", "costs": "toy_stages:NetworkToyCosts"}


def without(config: RunConfig, *sections: str) -> RunConfig:
    """``config`` with these stages off."""
    off = {name: msgspec.structs.replace(getattr(config, name), enabled=False) for name in sections}
    return msgspec.structs.replace(config, **off)


def workload(config: RunConfig, **changes: Any) -> Workload:
    values = {"arch": architecture(TINY_LLAMA), "config": config, "cuda": True, "windows": 16, **changes}
    return Workload(**values)


def phase(plan: Plan, name: str) -> PhasePlan:
    return next(phase for phase in plan.phases if phase.name == name)


# --------------------------------------------------------------------------------------- anybody's stages


def test_a_stage_of_somebody_elses_that_trains_blocks_is_planned(llama: str) -> None:
    config = without(paper(llama), "block_ap")
    section = config.block_ap
    with registered(**BLOCK_TOY):
        plan = make_plan(config, machine=H200)
    names = [phase.name for phase in plan.phases]
    assert names[2:5] == ["halving", "evaluate_rtn", "evaluate_halving"]
    steps = plan.blocks * section.epochs * section.sequences / section.batch_size
    assert 1 < phase(plan, "halving").seconds / steps < 1.2
    weights = 4 * 4096 * 4096 + 3 * 4096 * 11008
    trained = weights + 2 * weights // 64 + 2 * 4096
    assert phase(plan, "halving").parts["weights and moments"] == 12 * trained
    assert plan.stream_bytes == make_plan(paper(llama), machine=H200).stream_bytes
    # A second a step is slow: a block takes over an hour, and a kill may undo five minutes of it.
    assert plan.recovery.snapshots["halving"] > 10
    assert 240 < plan.recovery.lost_seconds <= 300
    assert plan.recovery.streams == "stored"


def test_a_stage_of_somebody_elses_that_trains_the_network_is_planned(llama: str) -> None:
    config = without(paper(llama), "e2e_qp")
    with registered(**NETWORK_TOY):
        plan = make_plan(config, machine=H200)
    assert [phase.name for phase in plan.phases][-3:] == ["tuning", "evaluate_tuning", "export"]
    assert phase(plan, "tuning").parts["everything"] == 3 * GIB
    assert 3600 < phase(plan, "tuning").seconds < 3700
    assert list(plan.recovery.snapshots) == ["block_ap", "tuning"]
    ours = make_plan(paper(llama), machine=H200)
    # Scales lie beside the blocks as E2E-QP's do; only the log of a longer run is longer.
    kept, log = (
        phase(plan, "export").peak_disk_bytes - phase(ours, "export").peak_disk_bytes,
        CONSTANTS.events_rate * (plan.seconds - ours.seconds),
    )
    assert kept == pytest.approx(log, abs=2)


def test_what_a_stage_of_somebody_elses_could_save_is_offered(llama: str) -> None:
    section = msgspec.structs.replace(PAPER.block_ap, batch_size=64)
    with registered(**BLOCK_TOY):
        plan = make_plan(
            without(paper(llama, block_ap=section), "block_ap"), machine=machine(gpu_free=20 * GIB)
        )
    assert [problem.where for problem in plan.problems] == ["halving"]
    assert plan.problems[0].hint.startswith("block_ap.batch_size = ")


@pytest.mark.parametrize("scope", ["block", "network"])
def test_a_stage_that_says_nothing_of_its_costs_is_planned_like_rounding(llama: str, scope: str) -> None:
    section = "block_ap" if scope == "block" else "e2e_qp"
    with registered(name="silent", scope=scope):
        plan = make_plan(without(paper(llama), section), machine=H200)
    rounded = make_plan(without(paper(llama), "block_ap"), machine=H200)
    silent, rtn = phase(plan, "silent"), phase(rounded, "rtn")
    assert (silent.seconds, silent.parts) == (rtn.seconds, rtn.parts)
    assert "evaluate_silent" in [phase.name for phase in plan.phases]
    assert "silent" not in plan.recovery.snapshots


def test_stages_that_a_run_does_not_make_are_not_asked(llama: str) -> None:
    STAGES.register(Stage(name="absent", label="absent", scope="network", costs="no.such.module:Costs"))
    try:
        assert make_plan(paper(llama), machine=H200).problems == ()
    finally:
        STAGES.unregister("absent")


# -------------------------------------------------------------------------------------------------- sums


@pytest.mark.parametrize("off", [(), ("block_ap",), ("e2e_qp",), ("block_ap", "e2e_qp")])
def test_the_time_of_a_run_is_the_sum_of_what_its_stages_say(llama: str, off: tuple[str, ...]) -> None:
    config = without(paper(llama), *off)
    plan = make_plan(config, machine=H200)
    assert plan.seconds == sum(phase.seconds for phase in plan.phases)
    rates = speed(True, "NVIDIA H200", H200.cpus, True)
    arch = describe(llama).architecture
    work = workload(config, arch=arch, windows=plan.evaluation_windows, short_of_memory=plan.recomputes)
    stored = arch.params * arch.dtype_bytes
    said = {costs.stage.name: costs.seconds(work, rates, stored) for costs in made_costs(config)}
    assert said == {name: phase(plan, name).seconds for name in said}
    place = Place(machine=H200, rates=rates, stored_bytes=stored, assets_bytes=0)
    others = {name: s for name, s in place.seconds(work).items() if name not in said}
    assert plan.seconds == pytest.approx(sum(said.values()) + sum(others.values()))


def test_what_stages_add_lies_beside_each_other_in_the_end() -> None:
    work = workload(PAPER)
    arch, grid = work.arch, PAPER.grid
    results = [costs.result_bytes(work) for costs in made_costs(PAPER)]
    assert results == [arch.blocks * block_bytes(arch, grid), arch.blocks * scales_bytes(arch, grid)]


def test_every_stage_of_ours_that_is_made_says_what_it_costs() -> None:
    for stage in STAGES:
        assert bool(stage.costs) == (stage.scope != "nothing")
        assert costs_of(stage).stage is stage
    assert [stage.name for stage in stages_of(PAPER)] == ["block_ap", "e2e_qp"]


# ----------------------------------------------------------------------------------------------- formats


def test_an_export_takes_what_its_format_says_of_every_linear(llama: str) -> None:
    arch, grid = architecture(TINY_LLAMA), GridConfig(bits=3, group_size=32)
    ours = FORMATS["gptq_v2"]
    changes = {"name": "bytewise", "costs": "toy_stages:toy_bytes"}
    FORMATS.register(msgspec.structs.replace(ours, **changes))
    FORMATS.register(msgspec.structs.replace(ours, name="gapless", costs=""))
    try:
        sizes = {name: exported_bytes(arch, grid, name) for name in FORMATS.names()}
        both = paper(llama, export=ExportConfig(formats=("gptq_v2", "bytewise")))
        alone = [paper(llama, export=ExportConfig(formats=(name,))) for name in both.export.formats]
        planned = [make_plan(config, machine=H200).export_bytes for config in (both, *alone)]
    finally:
        FORMATS.unregister("bytewise")
        FORMATS.unregister("gapless")
    weights = arch.blocks * arch.linear_params_per_block
    groups = arch.blocks * arch.groups_per_block(32)
    inputs = arch.blocks * sum(linear.in_features for linear in arch.linears)
    rest = 2 * arch.blocks * arch.norm_params_per_block + 2 * arch.rest_params
    assert sizes["bytewise"] == weights + rest
    assert sizes["gapless"] == (3 * weights + 19 * groups) // 8 + rest
    assert sizes["gptq_v2"] == sizes["gapless"] + 4 * inputs
    assert gptq_bytes(64, 128, 3, -1) == 64 * 128 * 3 // 8 + 64 * 19 // 8 + 4 * 128
    assert planned[0] == planned[1] + planned[2]


# ----------------------------------------------------------------------------------- teacher and arithmetic


def test_what_auto_means_is_said_in_one_place() -> None:
    assert [resolved_dtype("auto", cuda=cuda) for cuda in (True, False)] == ["bfloat16", "float32"]
    assert [resolved_dtype(name, cuda=True) for name in DTYPE_BYTES] == list(DTYPE_BYTES)
    torch = pytest.importorskip("torch")
    from engine.phases.job import compute_dtype

    for kind, auto in (("cuda", torch.bfloat16), ("cpu", torch.float32)):
        device = torch.device(kind)
        assert compute_dtype("auto", device) == auto
        assert compute_dtype("float16", device) == torch.float16
    assert {name: getattr(torch, name).itemsize for name in DTYPE_BYTES} == DTYPE_BYTES


@pytest.mark.parametrize(
    ("changes", "may", "does"),
    [
        ({}, True, True),
        ({"sequences": 32}, True, False),  # whether its text is part of the other, the tokens say
        ({"sequence_length": 1024}, False, False),
        ({"compute_dtype": "float32"}, False, False),
        ({"compute_dtype": "bfloat16"}, True, True),  # what auto is on a GPU
        ({"loss": "cross_entropy"}, False, False),
        ({"enabled": False}, False, False),
    ],
)
def test_a_stream_teaches_where_text_and_arithmetic_are_the_same(
    changes: dict[str, Any], may: bool, does: bool
) -> None:
    text = {"sequences": 64, "val_sequences": 8, "sequence_length": 512}
    block_ap = msgspec.structs.replace(PAPER.block_ap, **text)
    e2e_qp = msgspec.structs.replace(PAPER.e2e_qp, **{**text, "loss": "kl", **changes})
    config = msgspec.structs.replace(PAPER, block_ap=block_ap, e2e_qp=e2e_qp)
    assert may_share_teacher(config, cuda=True) == may
    assert shares_teacher(workload(config)) == does
    assert not may_share_teacher(without(config, "block_ap"), cuda=True)


def test_a_teacher_of_other_arithmetic_is_planned_as_computed_again(llama: str) -> None:
    text = {"sequences": 64, "val_sequences": 8, "sequence_length": 512}
    block_ap = msgspec.structs.replace(PAPER.block_ap, **text)
    same = msgspec.structs.replace(PAPER.e2e_qp, **text, loss="kl")
    other = msgspec.structs.replace(same, compute_dtype="float16")
    shared, again = (
        phase(make_plan(paper(llama, block_ap=block_ap, e2e_qp=e2e), machine=H200), "e2e_qp").seconds
        for e2e in (same, other)
    )
    assert shared < again
