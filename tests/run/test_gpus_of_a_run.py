"""What ``--gpus`` asks for: shared out evenly or refused, planned as the share of one GPU, and told from
one process to the next."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from plan_tools import H200, LLAMA_2_7B, PAPER

from engine.config.loading import load
from engine.config.overrides import apply_overrides
from engine.config.run import RunConfig
from engine.config.sameness import config_hash, equivalent_command
from engine.config.validation import validate
from engine.config.writing import to_toml
from engine.errors import PreflightError, UsageError
from engine.plan.machine import Machine
from engine.plan.plan import PhasePlan, Plan, make_plan
from engine.ranks.place import LOCAL_HOST, Place, place_of
from eqat_tui.configure import build_config

TWO_GPUS = msgspec.structs.replace(H200, gpus=2)


def asked(**changes: object) -> RunConfig:
    config = load("smoke", overrides={name.replace("__", "."): value for name, value in changes.items()})
    validate(config)
    return config


@pytest.mark.parametrize(
    ("changes", "where", "hint"),
    [
        ({"runtime__gpus": 3}, "block_ap.batch_size", "a batch of 3 or 6, or --gpus 2"),
        ({"runtime__gpus": 8}, "block_ap.batch_size", "a batch of 8, or --gpus 4"),
        (
            {"runtime__gpus": 2, "e2e_qp__batch_size": 3, "e2e_qp__micro_batch_size": 0},
            "e2e_qp.batch_size",
            "2 or 4",
        ),
        ({"runtime__gpus": 2, "runtime__device": "cuda:1"}, "runtime.device", "CUDA_VISIBLE_DEVICES"),
        ({"runtime__gpus": 2, "runtime__streams": "stored"}, "runtime.streams", "auto"),
        ({"runtime__gpus": 0}, "runtime.gpus", "at least 1"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(changes: dict[str, object], where: str, hint: str) -> None:
    with pytest.raises(UsageError) as refused:
        asked(**changes)
    assert refused.value.where == where
    assert hint in refused.value.hint


def test_stages_that_are_not_made_ask_for_nothing() -> None:
    asked(runtime__gpus=4, e2e_qp__enabled=False, e2e_qp__batch_size=3, e2e_qp__micro_batch_size=0)
    asked(runtime__gpus=4, block_ap__enabled=False, block_ap__batch_size=3)  # plain rounding


def test_one_gpu_is_the_run_that_it_was_and_several_are_another() -> None:
    one, two = asked(), build_config("smoke", gpus=2, device="cpu")
    assert "gpus" not in to_toml(one)
    assert two.runtime.gpus == 2
    assert config_hash(two) != config_hash(one) == config_hash(asked(runtime__gpus=1))
    assert "--set runtime.gpus=2" in equivalent_command(two)


def planned(tmp_path: Path, gpus: int, machine: Machine = TWO_GPUS, **changes: object) -> Plan:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_2_7B))
    settings = {"model.source": str(tmp_path), "runtime.gpus": gpus, "block_ap.batch_size": 8, **changes}
    return make_plan(apply_overrides(PAPER, settings), machine=machine)


def test_the_plan_is_that_of_one_gpus_share(tmp_path: Path) -> None:
    one, two = planned(tmp_path, 1), planned(tmp_path, 2)
    assert (one.together, two.gpus) == ("", 2)
    assert two.stream_bytes == one.stream_bytes / 2
    assert two.evaluation_windows == one.evaluation_windows
    assert (two.recovery.streams, two.recovery.streams_every) == ("recomputed", 0)
    assert 1.4 < one.seconds / two.seconds < 2
    faster = f"{one.seconds / two.seconds:.1f} times as fast as one"
    assert two.together == f"2 GPUs over NVLink, each with its share; about {faster}"
    assert two.problems == ()
    on_host = [planned(tmp_path, gpus, **{"runtime.activation_store": "host"}) for gpus in (1, 2)]
    # Both halves lie in the memory of one machine.
    assert on_host[1].peak_host_bytes >= on_host[0].peak_host_bytes
    assert on_host[1].peak_host_bytes < 1.5 * on_host[0].peak_host_bytes


def test_weights_that_are_shared_out_cost_each_gpu_its_share(tmp_path: Path) -> None:
    """The figures that are to be met on four H100s, as reckoned: Block-AP 3.6, E2E-QP 3.7."""
    four = msgspec.structs.replace(H200, gpus=4, gpu_name="NVIDIA H100 80GB HBM3")
    one, plan = (planned(tmp_path, gpus, four) for gpus in (1, 4))

    def phase(plan: Plan, name: str) -> PhasePlan:
        return next(phase for phase in plan.phases if phase.name == name)

    for name, least in (("block_ap", 3.0), ("e2e_qp", 3.7)):  # with everything around the steps
        assert least < phase(one, name).seconds / phase(plan, name).seconds < 4
    optimizer = [phase(made, "block_ap").parts["optimizer"] for made in (one, plan)]
    assert optimizer[1] == pytest.approx(optimizer[0] / 4, rel=0.1)


def test_gpus_that_are_not_there_and_those_that_are_of_no_use_are_refused(tmp_path: Path) -> None:
    (problem,) = planned(tmp_path, 4).problems
    assert (problem.where, problem.message) == ("runtime.gpus", "4 GPUs are asked for, and 2 can be seen")
    small = {"block_ap.sequences": 8, "block_ap.val_sequences": 0, "e2e_qp.enabled": False}
    small |= {"block_ap.sequence_length": 16, "evaluation.enabled": False}
    without_nvlink = msgspec.structs.replace(TWO_GPUS, gpu_name="NVIDIA L40S")
    slower = planned(tmp_path, 2, without_nvlink, **small)
    (problem,) = slower.problems
    assert "2 GPUs would take" in problem.message
    assert "eqat sweep --jobs 2" in problem.hint


TOLD = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "2345"}


def test_a_process_knows_its_place_from_the_environment() -> None:
    place = Place(1, 2, 1, LOCAL_HOST, 2345, 77)
    assert place_of(2, place.variables()) == place
    assert place_of(2, TOLD) == place._replace(leader=0)
    assert place_of(1, TOLD) is None, "a run on one GPU starts wherever it is"
    assert place_of(2, {}) is None
    assert place_of(2, TOLD | {"WORLD_SIZE": "1"}) is None
    assert place_of(2, TOLD | {"RANK": "x", "MASTER_PORT": "-1"}) == Place(0, 2, 1, LOCAL_HOST, 29500, 0)
    with pytest.raises(PreflightError, match="2 processes were started for a run on 4 GPUs"):
        place_of(4, TOLD)
    with pytest.raises(PreflightError, match="one machine"):
        place_of(2, TOLD | {"LOCAL_WORLD_SIZE": "1"})
