"""What the plan takes to be between the GPUs of a run: what NVML says of every two, else their name.
A step on several GPUs is planned to take as long as was measured over either link."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from plan_tools import H200, LLAMA_2_7B, PAPER

from engine.architecture.families import architecture
from engine.config.overrides import apply_overrides
from engine.config.stages import STAGES
from engine.plan import machine as machine_module
from engine.plan.costs import costs_of
from engine.plan.estimate import Workload
from engine.plan.link import Link, link_of, linked_by_name
from engine.plan.machine import Machine, detect
from engine.plan.plan import make_plan
from engine.plan.ranks import adding_seconds, share_of
from engine.plan.rates import speed
from eqat_tui.plan_text import plan_text

NAMES = {
    "NVIDIA H100 80GB HBM3": True,
    "NVIDIA H100 NVL": True,
    "NVIDIA H100 PCIe": False,
    "NVIDIA H200": True,
    "NVIDIA H200 NVL": True,
    "NVIDIA H20": True,
    "NVIDIA H800 PCIe": False,
    "NVIDIA B200": True,
    "NVIDIA B300 SXM6 AC": True,
    "NVIDIA GB200": True,
    "NVIDIA A100-SXM4-40GB": True,
    "NVIDIA A100-SXM4-80GB": True,
    "NVIDIA A100-PCIE-40GB": False,
    "NVIDIA A100 80GB PCIe": False,
    "NVIDIA A100-SXM4-40GB MIG 1g.5gb": False,
    "NVIDIA A800 40GB Active": False,
    "Tesla V100-SXM2-32GB": True,
    "Tesla V100-PCIE-16GB": False,
    "NVIDIA L40S": False,
    "NVIDIA L4": False,
    "NVIDIA A10": False,
    "NVIDIA A10G": False,
    "Tesla T4": False,
    "NVIDIA RTX A1000": False,
    "NVIDIA GeForce RTX 4090": False,
    "NVIDIA RTX PRO 6000 Blackwell Server Edition": False,
    "": False,
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_says_whether_its_board_has_nvlink(name: str) -> None:
    assert linked_by_name(name) == NAMES[name]


@pytest.mark.parametrize(
    ("name", "said", "link"),
    [
        ("NVIDIA H100 PCIe", True, "NVLink"),  # with a bridge
        ("NVIDIA H100 80GB HBM3", False, "PCIe"),
        ("NVIDIA H100 PCIe", None, "PCIe"),
        ("NVIDIA H100 80GB HBM3", None, "NVLink"),
    ],
)
def test_what_was_asked_counts_before_what_the_name_says(name: str, said: bool | None, link: Link) -> None:
    there = msgspec.structs.replace(H200, gpu_name=name, nvlink=said)
    assert link_of(there, cuda=True) == link
    assert link_of(there, cuda=False) == ""


# -- NVML ----------------------------------------------------------------------------------------------


class Driver:
    """Four GPUs of one name; NVLink is between the pairs that are named, and of others ``otherwise`` is said
    (none: the question fails)."""

    class NVMLError(Exception):
        pass

    NVML_P2P_CAPS_INDEX_NVLINK = 2
    NVML_P2P_STATUS_OK = 0
    NVML_P2P_STATUS_NOT_SUPPORTED = 5
    NVML_P2P_STATUS_UNKNOWN = 6

    def __init__(self, *linked: tuple[int, int], otherwise: int | None = 5) -> None:
        self.linked, self.otherwise = linked, otherwise
        self.open = 0

    def nvmlInit(self) -> None:
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:
        return 4

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        if index >= 4:
            raise self.NVMLError("Invalid Argument")
        return index

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        return SimpleNamespace(used=1 << 30, free=79 << 30, total=80 << 30)

    def nvmlDeviceGetName(self, handle: int) -> bytes:
        return b"NVIDIA H100 PCIe"

    def nvmlDeviceGetP2PStatus(self, one: int, other: int, what: int) -> int:
        assert what == self.NVML_P2P_CAPS_INDEX_NVLINK
        assert one != other
        if (min(one, other), max(one, other)) in self.linked:
            return self.NVML_P2P_STATUS_OK
        if self.otherwise is None:
            raise self.NVMLError("Not Supported")
        return self.otherwise


EVERY_PAIR = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
BRIDGES = ((0, 1), (2, 3))


def detected(monkeypatch: pytest.MonkeyPatch, driver: Any, gpus: int, **environment: str) -> Machine:
    """This machine with the driver in the place of its own."""
    for name in ("CUDA_VISIBLE_DEVICES", "NCCL_P2P_DISABLE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    monkeypatch.setattr(machine_module, "_torch_is_cpu_build", lambda: False)
    found = detect(gpus=gpus)
    assert driver.open == 0, "NVML stays open"
    return found


@pytest.mark.parametrize(
    ("linked", "gpus", "said"),
    [(EVERY_PAIR, 4, True), (BRIDGES, 2, True), (BRIDGES, 4, False), ((), 2, False), (EVERY_PAIR, 1, None)],
    ids=["every pair", "one bridge", "two bridges", "no bridge", "one GPU"],
)
def test_nvlink_has_to_be_between_every_two_gpus(
    monkeypatch: pytest.MonkeyPatch, linked: tuple[tuple[int, int], ...], gpus: int, said: bool | None
) -> None:
    found = detected(monkeypatch, Driver(*linked), gpus)
    assert (found.gpu_name, found.gpus) == ("NVIDIA H100 PCIe", 4)
    assert found.nvlink is said


def test_the_gpus_that_are_asked_are_those_that_cuda_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    for visible, said in (("2,3", True), ("1,2", False), ("3,0", False)):
        assert detected(monkeypatch, Driver(*BRIDGES), 2, CUDA_VISIBLE_DEVICES=visible).nvlink is said


@pytest.mark.parametrize("otherwise", [None, Driver.NVML_P2P_STATUS_UNKNOWN], ids=["fails", "unknown"])
def test_the_name_is_left_where_nvml_does_not_say(
    monkeypatch: pytest.MonkeyPatch, otherwise: int | None
) -> None:
    found = detected(monkeypatch, Driver((0, 1), otherwise=otherwise), 3)
    assert found.nvlink is None
    assert link_of(found, cuda=True) == "PCIe"


def test_more_gpus_than_there_are_and_a_module_without_the_question_say_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert detected(monkeypatch, Driver(*EVERY_PAIR), 5).nvlink is None
    older = Driver(*EVERY_PAIR)
    monkeypatch.delattr(Driver, "nvmlDeviceGetP2PStatus")
    assert detected(monkeypatch, older, 2).nvlink is None


def test_nvlink_that_nccl_may_not_use_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, said in (("1", False), ("0", True)):
        assert detected(monkeypatch, Driver(*EVERY_PAIR), 4, NCCL_P2P_DISABLE=value).nvlink is said


# -- what comes of it ----------------------------------------------------------------------------------


def step_of_a_block(gpus: int, link: Link) -> float:
    """Milliseconds that are planned for what was measured: a block of Llama 2 7B, 8 sequences of 2048 tokens,
    recorded and compiled."""
    settings = {"runtime.gpus": gpus, "runtime.compile": "on", "block_ap.batch_size": 8}
    config = apply_overrides(PAPER, settings)
    arch = architecture(LLAMA_2_7B | {"torch_dtype": "bfloat16"})
    work = Workload(arch=arch, config=share_of(config), cuda=True, windows=0, whole=config)
    work = msgspec.structs.replace(work, compiled=frozenset({"block_ap"}))
    if gpus > 1:
        work = msgspec.structs.replace(work, adding=adding_seconds(work, link, 1.0))
    costs: Any = costs_of(STAGES["block_ap"])
    rates = speed(True, "NVIDIA H200", 1, True)
    return float(1e3 * (costs.step_seconds(work, rates) + costs.adding_seconds(work, rates)))


def test_a_step_takes_as_long_as_measured_without_nvlink() -> None:
    """benchmarks/README.md, "Several GPUs"."""
    assert step_of_a_block(1, "") == pytest.approx(33.86, rel=0.05)
    assert step_of_a_block(2, "PCIe") == pytest.approx(24.6, rel=0.15)
    assert step_of_a_block(4, "PCIe") == pytest.approx(20.96, rel=0.15)


def test_over_nvlink_it_is_planned_as_the_benchmarks_say() -> None:
    alone = step_of_a_block(1, "")
    assert alone / step_of_a_block(2, "NVLink") == pytest.approx(1.93, abs=0.005)
    assert alone / step_of_a_block(4, "NVLink") == pytest.approx(3.62, abs=0.005)


@pytest.mark.parametrize(("said", "words"), [(True, "over NVLink"), (False, "over PCIe")])
def test_the_plan_names_the_link_and_reckons_with_it(tmp_path: Path, said: bool, words: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_2_7B))
    settings = {"model.source": str(tmp_path), "runtime.gpus": 4, "block_ap.batch_size": 8}
    four = msgspec.structs.replace(H200, gpus=4, nvlink=said)
    plan = make_plan(apply_overrides(PAPER, settings), machine=four)
    assert plan.together.startswith(f"4 GPUs {words}, each with its share; about ")
    said_of_it = plan.to_dict()
    assert said_of_it["together"] == plan.together
    assert said_of_it["machine"]["nvlink"] is said
    assert words in " ".join(plan_text(said_of_it).split())
    other = make_plan(
        apply_overrides(PAPER, settings), machine=msgspec.structs.replace(four, nvlink=not said)
    )
    assert (plan.seconds < other.seconds) is said


def test_processes_on_the_cpu_have_no_link_to_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_2_7B))
    settings = {"model.source": str(tmp_path), "runtime.gpus": 2, "runtime.device": "cpu"}
    plan = make_plan(apply_overrides(PAPER, settings), machine=H200)
    assert plan.together.startswith("2 processes, each with its share; about ")
