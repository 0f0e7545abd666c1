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
from engine.plan.estimate import CONSTANTS, GIB
from engine.plan.machine import Machine
from engine.plan.plan import PhasePlan, Plan, make_plan
from engine.ranks.place import (
    FIRST_PORT,
    LOCAL_HOST,
    PORTS,
    Place,
    place_of,
    rank_told,
    refuse_one_of_several,
)
from engine.run.launch import ATTEMPT_VARIABLE
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

    once = {"block_ap": 0.0, "e2e_qp": CONSTANTS.gpu_compile_network}
    for name, least in (("block_ap", 3.0), ("e2e_qp", 3.7)):  # with everything around the steps
        alone, together = (phase(made, name).seconds - once[name] for made in (one, plan))
        assert least < alone / together < 4
    optimizer = [phase(made, "block_ap").parts["optimizer"] for made in (one, plan)]
    assert optimizer[1] == pytest.approx(optimizer[0] / 4, rel=0.1)


def test_a_checkpoint_takes_host_memory_once(tmp_path: Path) -> None:
    """The first process alone writes it; the others have their weights at the start and at their best. So
    full QAT of a 7B model, whose optimizer's state is shared out, fits on four cards of 80 GB."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_2_7B))
    cards = msgspec.structs.replace(
        H200, gpu_name="NVIDIA H100 80GB HBM3", gpu_free=78 * GIB, gpu_total=80 * GIB, nvlink=True
    )
    host, problems = {}, {}
    for gpus in (1, 2, 4, 8):
        settings = {"model.source": str(tmp_path), "runtime.gpus": gpus}
        here = msgspec.structs.replace(cards, gpus=gpus, host_free=1000 * GIB)
        plan = make_plan(apply_overrides(load("full-qat"), settings), machine=here)
        host[gpus], problems[gpus] = plan.peak_host_bytes, [problem.where for problem in plan.problems]
    assert problems == {1: ["e2e_qat"], 2: [], 4: [], 8: []}, "one card holds no such optimizer"
    each = (host[8] - host[4]) / 4  # whose activations lie on the cards
    weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert host[4] - 4 * each == pytest.approx(16 * weights, rel=0.05)
    assert 8 * weights < each < 9.5 * weights


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
    again = TOLD | {"TORCHELASTIC_RESTART_COUNT": "2"}
    assert place_of(2, again) == place._replace(leader=0, restarts=2)
    assert place_of(2, again | place.variables()) == place, "what the run starts begins once"


# As Slurm tells the second task of a step of two; beside the job's own numbers, which may be others.
STEP = {
    "SLURM_JOB_ID": "4711",
    "SLURM_NTASKS": "2",
    "SLURM_STEP_ID": "3",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_NODELIST": "n17",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "1",
    "SLURM_GTIDS": "0,1",
}
# As it tells a job's script that may start two tasks, and a shell in a step of its own (srun --pty, salloc).
SCRIPT = {
    "SLURM_JOB_ID": "4712",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_GTIDS": "0",
}
SHELL = SCRIPT | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1"}
PORT = FIRST_PORT + 4711 + 3 * 1009


def without(name: str) -> dict[str, str]:
    return {key: value for key, value in STEP.items() if key != name}


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        (STEP, Place(1, 2, 1, LOCAL_HOST, PORT)),
        (STEP | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, Place(0, 2, 0, LOCAL_HOST, PORT)),
        (without("SLURM_LOCALID"), Place(1, 2, 1, LOCAL_HOST, PORT)),
        (without("SLURM_GTIDS"), Place(1, 2, 1, LOCAL_HOST, PORT)),
        (STEP | {"SLURM_NTASKS": "8"}, Place(1, 2, 1, LOCAL_HOST, PORT)),
        (STEP | {"MASTER_PORT": "2345"}, Place(1, 2, 1, LOCAL_HOST, 2345)),
        (STEP | TOLD | {"RANK": "0"}, Place(0, 2, 1, LOCAL_HOST, 2345)),  # torchrun in a task
        (without("SLURM_STEP_NUM_TASKS"), None),
        (without("SLURM_STEP_ID"), None),
        (without("SLURM_JOB_ID"), None),
        (without("SLURM_PROCID"), None),
        (STEP | {"SLURM_PROCID": "2"}, None),
        (STEP | {"SLURM_STEP_NUM_TASKS": "two"}, None),
        (SCRIPT, None),
        (SHELL, None),
        (STEP | SCRIPT, None),  # submitted from within a step
        (STEP | {ATTEMPT_VARIABLE: "1"}, None),  # a command of ours in a task has started one engine
        (TOLD | {ATTEMPT_VARIABLE: "1"}, None),
    ],
)
def test_a_task_of_a_step_of_slurms_knows_its_place(environment: dict[str, str], place: Place | None) -> None:
    assert place_of(2, environment) == place
    assert rank_told(environment) == ("" if place is None else str(place.rank))
    assert place_of(1, environment) is None


def test_steps_meet_at_ports_of_their_own() -> None:
    steps = [(str(job), str(step)) for job in (7, 8, 9, 4294967290) for step in range(4)]
    places = [place_of(2, STEP | {"SLURM_JOB_ID": job, "SLURM_STEP_ID": step}) for job, step in steps]
    ports = {place.port for place in places if place is not None}
    assert len(ports) == len(steps)
    assert ports <= set(range(FIRST_PORT, FIRST_PORT + PORTS))


@pytest.mark.parametrize(
    ("gpus", "changes", "where", "words"),
    [
        (4, {}, "SLURM_STEP_NUM_TASKS", "2 processes were started for a run on 4 GPUs"),
        (2, {"SLURM_STEP_NUM_NODES": "2", "SLURM_GTIDS": "1"}, "SLURM_STEP_NUM_NODES", "one machine"),
    ],
)
def test_a_step_that_does_not_fit_is_refused(
    gpus: int, changes: dict[str, str], where: str, words: str
) -> None:
    with pytest.raises(PreflightError, match=words) as refused:
        place_of(gpus, STEP | changes)
    assert refused.value.where == where
    assert refused.value.hint == f"srun --nodes=1 --ntasks={gpus}"


@pytest.mark.parametrize(
    ("gpus", "environment", "hint"),
    [
        (1, STEP, ""),
        (2, STEP, "srun --ntasks=2 python -m engine RUN"),
        (4, STEP, ""),  # a run on four GPUs in each of two tasks
        (2, SCRIPT, ""),
        (2, SHELL, ""),
        (2, STEP | SCRIPT, ""),
        (2, {}, ""),
        (1, TOLD, ""),
        (2, TOLD, "torchrun --nproc-per-node 2 -m engine RUN"),
        (4, TOLD, "torchrun --nproc-per-node 4 -m engine RUN"),
        (2, TOLD | {"WORLD_SIZE": "1"}, ""),
    ],
)
def test_a_command_that_would_make_a_run_in_each_process_is_refused(
    gpus: int, environment: dict[str, str], hint: str
) -> None:
    if not hint:
        refuse_one_of_several(gpus, environment)
        return
    with pytest.raises(UsageError, match="each of 2 processes would make a run of its own") as refused:
        refuse_one_of_several(gpus, environment)
    assert hint in refused.value.hint
