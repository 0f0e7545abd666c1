"""What the plan says about checkpoints: their sizes are those of the files, and its promises are kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_tools import H200, LLAMA_2, SHAPES

from engine.architecture.description import TINY_LLAMA, describe
from engine.architecture.families import architecture
from engine.config.derived import resolve
from engine.config.grid import GridConfig
from engine.config.loading import load
from engine.config.overrides import apply_overrides
from engine.config.run import RunConfig
from engine.config.stages import STAGES
from engine.plan import object_sizes
from engine.plan.costs import costs_of
from engine.plan.disk_model import assets_bytes, header_room
from engine.plan.estimate import CONSTANTS, GIB, MIB, Workload
from engine.plan.fit import choose_store
from engine.plan.machine import Machine, detect
from engine.plan.object_sizes import block_bytes, scales_bytes
from engine.plan.plan import Plan, make_plan, out_of_memory_remedy
from eqat_tui.plan_text import plan_text

TWO_CORES = Machine(gpu_name=None, gpu_free=0, gpu_total=0, host_free=24 * GIB, disk_free=80 * GIB, cpus=2)
SMOKE = load("smoke")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories with a config.json and nothing else."""
    folder = tmp_path_factory.mktemp("models")
    for name, shape in SHAPES.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(LLAMA_2 | shape))
    return folder


@pytest.fixture(scope="session")
def planned(models: Path) -> Callable[..., Plan]:
    """``planned(preset, model, machine, **settings)``; dots in settings are written as two underscores."""

    def plan(preset: str, model: str, machine: Machine, **changes: Any) -> Plan:
        typed = {name.replace("__", "."): str(value) for name, value in changes.items()}
        source = {"model.source": str(models / model)} if model else {}
        return make_plan(resolve(apply_overrides(load(preset), source | typed)), machine=machine)

    return plan


def workload(config: RunConfig, *, cuda: bool = False) -> Workload:
    return Workload(arch=architecture(TINY_LLAMA), config=config, cuda=cuda, windows=16)


def snapshot_bytes(work: Workload, stage: str) -> int:
    return costs_of(STAGES[stage]).snapshot_bytes(work)


# ------------------------------------------------------------------------------- sizes are those of files

GRIDS = [GridConfig(bits=bits, group_size=group) for bits, group in ((2, 32), (3, 64), (4, -1), (8, 32))]
GRIDS += [GridConfig(bits=bits, group_size=32, zero_point="fixed") for bits in (2, 3)]


@cache
def tiny() -> Any:
    torch = pytest.importorskip("torch")
    from engine.models.causal_lm import CausalLM
    from engine.models.source import ModelSource

    torch.set_num_threads(1)
    source = ModelSource.open(SMOKE.model)
    return CausalLM(source, torch.device("cpu"), torch.float32)


def file_length(tensors: Any) -> int:
    """Of the file that the engine writes."""
    from engine.checkpoints.tensorfile import safetensors_chunks

    return sum(map(len, safetensors_chunks(tensors)))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_finished_block_takes_what_was_planned_to_the_byte(grid: GridConfig) -> None:
    lm = tiny()
    from engine.methods.blockwise.rtn import round_to_nearest

    packed = round_to_nearest(lm.load_block(1), lm.linear_names(1), grid)
    assert block_bytes(architecture(TINY_LLAMA), grid) == file_length(packed.tensors())
    scales = {
        f"{name}.{part}": getattr(weight, part)
        for name, weight in packed.linears.items()
        for part in ("scale", "zero_point")
    }
    assert scales_bytes(architecture(TINY_LLAMA), grid) == file_length(scales)


def snapshot_of_block_ap(config: RunConfig, progress: Any) -> None:
    import torch

    from engine.data.activations import make_store
    from engine.methods.blockwise.block_ap import train_block
    from engine.methods.blockwise.reconstruction import Streams

    lm, section = tiny(), config.block_ap
    shape = (section.sequences + section.val_sequences, section.sequence_length, lm.hidden_size)
    stores = [make_store("device", shape, torch.float32, lm.device) for _ in range(2)]
    for store in stores:
        store.write(0, torch.randn(shape))
    block = lm.load_block(0, dtype=torch.float32)
    streams = Streams(*stores, section.sequences)
    listening: Any = {"progress": progress, "keeper": progress}
    train_block(lm, 0, block, streams, section, config.grid, seed=0, dtype=torch.float32, **listening)


def snapshot_of_e2e_qp(config: RunConfig, progress: Any) -> None:
    import torch

    from engine.methods.blockwise.rtn import round_to_nearest
    from engine.methods.network.e2e_qp import train_scales
    from engine.methods.network.network import NetworkData

    lm, section = tiny(), config.e2e_qp
    blocks = [
        round_to_nearest(lm.load_block(i), lm.linear_names(i), config.grid).install(lm.load_block(i))
        for i in range(lm.blocks)
    ]
    shape = (section.sequences + section.val_sequences, section.sequence_length)
    data = NetworkData(torch.randint(0, lm.vocab_size, shape), section.sequences, None)
    section = msgspec.structs.replace(section, loss="cross_entropy")
    listening: Any = {"progress": progress, "keeper": progress}
    train_scales(lm, blocks, data, section, seed=0, dtype=torch.float32, **listening)


@pytest.mark.parametrize("changes", [{}, {"val_sequences": "0"}, {"train": "scales,zero_points"}], ids=str)
@pytest.mark.parametrize("phase", ["block_ap", "e2e_qp"])
@pytest.mark.parametrize("zero_point", ["learned", "fixed"])
def test_a_snapshot_takes_what_was_planned(zero_point: str, phase: str, changes: dict[str, str]) -> None:
    """Parameters, two moments and the best state: 16 bytes for each trained parameter, 12 without
    validation."""
    tiny()
    from engine.checkpoints.snapshots import random_state
    from engine.training.snapshot import Snapshot

    settings = {f"{phase}.{name}": value for name, value in changes.items()}
    config = resolve(apply_overrides(SMOKE, {**settings, "grid.zero_point": zero_point}))
    states: list[Any] = []

    class Listener:
        def due(self) -> bool:
            return False

        def metric(self, **values: Any) -> None: ...

        def warning(self, code: str, message: str, hint: str = "") -> None: ...

        def leave_if_asked(self) -> None: ...

        def step_boundary(self, state: Callable[[], Snapshot]) -> None:
            states[:] = [state()]

    {"block_ap": snapshot_of_block_ap, "e2e_qp": snapshot_of_e2e_qp}[phase](config, Listener())
    tensors = states[0].tensors | random_state(tiny().device)
    written, expected = file_length(tensors), snapshot_bytes(workload(config), phase)
    assert abs(written - expected) <= 64  # the header counts offsets in decimal digits
    trained = sum(t.numel() for name, t in tensors.items() if name.endswith(".value"))
    kept = sum(4 * t.numel() for t in tensors.values() if t.is_floating_point() and t.ndim)
    assert kept == (12 if "val_sequences" in changes else 16) * trained


def test_an_export_has_the_header_and_the_files_that_were_planned(tmp_path: Path) -> None:
    lm = tiny()
    from engine.architecture import headers
    from engine.export.checkpoint import tensor_names
    from engine.export.layout import layout_of

    reserved = 8 + headers.header_room(tensor_names(layout_of("gptq_v2"), lm))
    assert header_room(architecture(TINY_LLAMA), "gptq_v2") == pytest.approx(reserved, abs=headers.ALIGNMENT)
    lm.source.save_assets(tmp_path)
    written = sum(file.stat().st_size for file in tmp_path.iterdir())
    card = 4 << 10
    assert assets_bytes(describe("random://tiny-llama")) == pytest.approx(written + card, rel=0.15)


def test_constants_that_describe_the_engines_checkpoints_are_the_engines() -> None:
    torch = pytest.importorskip("torch")
    assert torch.get_rng_state().numel() == object_sizes.CPU_GENERATOR


# ----------------------------------------------------------------------------------------------- the table

TABLE: list[tuple[str, str, Machine, dict[str, Any]]] = [
    # 63 MiB are written in 0.2 s, of which a hundredth of the training has room for one every fifth block
    ("demo", "135m", TWO_CORES, {"streams": "stored", "warned": False, "snapshots": 0, "mib": 56}),
    # 130 GiB take 5 min to write, twice as long as a block is trained; computing them takes 23 s
    ("paper", "7b", H200, {"streams": "recomputed", "warned": False, "snapshots": 4, "mib": 3185}),
    # 13 GiB take 4.7 s to copy, and a step of E2E-QP three minutes
    ("paper", "70b", H200, {"streams": "recomputed", "warned": True, "snapshots": 34, "mib": 13464}),
]


@pytest.mark.parametrize(("preset", "model", "machine", "expected"), TABLE, ids=lambda value: str(value)[:8])
def test_recovery_plans_of_the_presets(
    planned: Callable[..., Plan], preset: str, model: str, machine: Machine, expected: dict[str, Any]
) -> None:
    plan = planned(preset, model, machine)
    found = plan.recovery
    assert found.streams == expected["streams"]
    assert found.checkpoint_bytes / MIB == pytest.approx(expected["mib"], rel=0.01)
    assert found.snapshots["e2e_qp"] >= expected["snapshots"]
    assert any("a kill can lose" in warning for warning in plan.warnings) == expected["warned"]
    assert (found.lost_seconds > 300) == expected["warned"]
    assert 0 < found.share <= 0.02
    assert found.streams_reason
    assert 12 < found.restart_seconds < 0.2 * plan.seconds


def test_storing_64_gib_streams_costs_more_than_it_saves(planned: Callable[..., Plan]) -> None:
    found = planned("paper", "7b", H200).recovery
    assert found.streams_bytes == found.streams_every == 0
    assert "storing takes 5 min" in found.streams_reason
    # where a block takes long and its stream is small, it is the other way round
    slow = planned("paper", "7b", H200, block_ap__epochs=200).recovery
    assert slow.streams == "stored"
    assert slow.streams_bytes == 4 * planned("paper", "7b", H200).stream_bytes
    assert slow.restart_seconds < found.restart_seconds


def test_streams_are_stored_where_that_is_wanted_and_never_where_it_is_not(
    planned: Callable[..., Plan],
) -> None:
    stored = planned("paper", "7b", H200, runtime__streams="stored").recovery
    assert (stored.streams, stored.streams_every) == ("stored", 32)  # more often is more than its share
    assert stored.streams_reason == "set by runtime.streams"
    never = planned("demo", "135m", TWO_CORES, runtime__streams="recomputed").recovery
    assert (never.streams, never.streams_every, never.streams_bytes) == ("recomputed", 0, 0)
    free = planned("demo", "135m", TWO_CORES, block_ap__enabled="false").recovery
    assert (free.streams, free.streams_reason) == ("recomputed", "no block is trained")


def test_streams_that_do_not_fit_on_the_disk_are_recomputed(planned: Callable[..., Plan]) -> None:
    more = {f"{part}__sequences": "52" for part in ("block_ap", "e2e_qp")}
    roomy = planned("demo", "135m", TWO_CORES, **more)
    tight = msgspec.structs.replace(TWO_CORES, disk_free=roomy.disk_bytes - 1)
    found = planned("demo", "135m", tight, **more)
    assert found.recovery.streams == "recomputed"
    assert found.recovery.streams_reason == "not enough disk for 122 MiB of streams"
    assert found.problems == ()
    wanted = planned("demo", "135m", tight, **more, runtime__streams="stored")
    assert [problem.hint for problem in wanted.problems] == ["runtime.streams = recomputed would fit"]


def test_without_snapshots_a_kill_loses_a_block_or_all_of_the_end_to_end_training(
    planned: Callable[..., Plan],
) -> None:
    plan = planned("paper", "7b", H200, runtime__checkpoint_minutes=0)
    found, seconds = plan.recovery, {phase.name: phase.seconds for phase in plan.phases}
    assert (found.interval_seconds, found.snapshots) == (0, {"block_ap": 0, "e2e_qp": 0})
    reading = 32 * CONSTANTS.block_load + plan.fp_bytes / CONSTANTS.read_rate  # is no training
    reading += CONSTANTS.gpu_compile_network  # nor is this, and it lies in a cache then
    assert found.lost_seconds == pytest.approx(seconds["e2e_qp"] - reading, rel=0.01)
    assert not any("a kill" in warning for warning in plan.warnings)
    alone = planned("paper", "7b", H200, runtime__checkpoint_minutes=0, e2e_qp__enabled="false")
    compiling = 30.0  # once a run, not in each block
    each = (seconds["block_ap"] - compiling) / 32
    assert alone.recovery.lost_seconds == pytest.approx(each, rel=0.01)


def test_a_plan_says_in_three_lines_what_an_interruption_costs(planned: Callable[..., Plan]) -> None:
    for preset, model, machine, _ in TABLE:
        lines = plan_text(planned(preset, model, machine).to_dict()).splitlines()
        said = [line for line in lines if line.startswith(("  checkpoints ", "  a kill ", "  streams "))]
        assert len(said) == 3
        assert all(len(line) <= 80 for line in said), said
    assert "every 7 min 51 s, 13.1 GiB and 4.7 s each" in said[0]


# ---------------------------------------------------------------------------------------------- properties

RUNS = st.fixed_dictionaries(
    {
        "model": st.sampled_from(["135m", "7b"]),
        "cuda": st.booleans(),
        "runtime__checkpoint_minutes": st.floats(0.5, 120),
        "runtime__checkpoint_share": st.floats(0.005, 0.5),
        "block_ap__sequences": st.sampled_from([16, 512, 4096]),
        "block_ap__val_sequences": st.sampled_from([0, 8]),
        "e2e_qp__sequences": st.sampled_from([16, 512, 4096]),
        "e2e_qp__loss": st.sampled_from(["kl", "cross_entropy"]),
        "e2e_qp__batch_size": st.sampled_from([4, 16]),
        "block_ap__epochs": st.sampled_from([1, 20]),
        "disk": st.integers(1, 2000),
    }
)


def drawn(planned: Callable[..., Plan], run: dict[str, Any]) -> Plan:
    settings_ = {name: value for name, value in run.items() if "__" in name}
    machine = msgspec.structs.replace(H200 if run["cuda"] else TWO_CORES, disk_free=run["disk"] * GIB)
    return planned("paper", run["model"], machine, e2e_qp__sequence_length=2048, **settings_)


@settings(max_examples=75, deadline=None)
@given(run=RUNS)
def test_checkpoints_take_no_more_than_their_share(planned: Callable[..., Plan], run: dict[str, Any]) -> None:
    """Finished blocks have to be written in any case."""
    results = {**run, "runtime__checkpoint_minutes": 0, "runtime__streams": "recomputed"}
    unavoidable = drawn(planned, results).recovery.share
    assert drawn(planned, run).recovery.share <= run["runtime__checkpoint_share"] + unavoidable


@settings(max_examples=75, deadline=None)
@given(run=RUNS)
def test_a_kill_loses_no_more_than_promised_or_the_plan_warns_of_it(
    planned: Callable[..., Plan], run: dict[str, Any]
) -> None:
    plan = drawn(planned, run)
    warned = [warning for warning in plan.warnings if "a kill can lose" in warning]
    assert bool(warned) == (plan.recovery.lost_seconds > 60 * run["runtime__checkpoint_minutes"])
    if warned:
        setting, _, value = warned[0].split("; ")[1].partition(" = ")
        run = {**run, setting.replace(".", "__"): float(value.split()[0])}
    assert not any("a kill can lose" in warning for warning in drawn(planned, run).warnings)


@settings(max_examples=60, deadline=None)
@given(run=RUNS)
def test_streams_are_stored_only_where_there_is_room(
    planned: Callable[..., Plan], run: dict[str, Any]
) -> None:
    plan = drawn(planned, run)
    if plan.recovery.streams == "stored":
        assert plan.recovery.streams_bytes < plan.disk_bytes <= plan.machine.disk_free
        assert 1 <= plan.recovery.streams_every < plan.blocks / 2


@settings(max_examples=60, deadline=None)
@given(run=RUNS, more=st.floats(1, 10))
def test_rarer_checkpoints_lose_more_and_take_less(
    planned: Callable[..., Plan], run: dict[str, Any], more: float
) -> None:
    run = {**run, "runtime__streams": "recomputed"}
    rarer = {**run, "runtime__checkpoint_minutes": run["runtime__checkpoint_minutes"] * more}
    often, seldom = drawn(planned, run).recovery, drawn(planned, rarer).recovery
    assert often.lost_seconds <= seldom.lost_seconds
    assert often.share >= seldom.share
    assert all(often.snapshots[phase] >= seldom.snapshots[phase] for phase in often.snapshots)


# ------------------------------------------------------------------------------------ memory and the disk


def test_the_copy_that_is_being_written_counts_as_host_memory(planned: Callable[..., Plan]) -> None:
    for preset, model, machine, _ in TABLE:
        plan = planned(preset, model, machine)
        parts = {phase.name: phase.parts.get("checkpoint being written") for phase in plan.phases}
        assert max(parts["block_ap"], parts["e2e_qp"]) == plan.recovery.checkpoint_bytes
        assert {name for name, part in parts.items() if part} == {"block_ap", "e2e_qp"}
        for phase in plan.phases:
            assert phase.peak_host_bytes > (parts[phase.name] or 0)


def test_the_disk_holds_three_snapshots_of_a_long_training_and_one_of_a_short(
    planned: Callable[..., Plan],
) -> None:
    plan = planned("paper", "7b", H200)
    disk = {phase.name: phase.peak_disk_bytes for phase in plan.phases}
    config = resolve(apply_overrides(load("paper"), {"model.source": plan.model}))
    arch = describe(plan.model).architecture
    work = Workload(arch=arch, config=config, cuda=True, windows=100)
    blocks = 32 * block_bytes(arch, config.grid)
    assert plan.recovery.snapshots["block_ap"] == 0
    assert disk["e2e_qp"] == pytest.approx(blocks + 3 * snapshot_bytes(work, "e2e_qp"), rel=0.01)
    assert disk["block_ap"] == pytest.approx(blocks, rel=0.01)
    assert plan.disk_bytes == max(disk.values())
    short = planned("paper", "7b", H200, e2e_qp__enabled="false", export__formats="")
    stopped = blocks + snapshot_bytes(work, "block_ap")
    assert short.disk_bytes == pytest.approx(stopped, rel=0.01)


def test_streams_are_gone_when_the_export_is_written(planned: Callable[..., Plan]) -> None:
    """The peak is of what exists at one moment, not the sum of all that ever did."""
    same = {"e2e_qp__sequences": "16"}  # as many as the blocks have
    stored = planned("demo", "135m", TWO_CORES, **same)
    never = planned("demo", "135m", TWO_CORES, runtime__streams="recomputed", **same)
    one, other = ({phase.name: phase.peak_disk_bytes for phase in plan.phases} for plan in (stored, never))
    assert one["block_ap"] - other["block_ap"] > 1.5 * stored.stream_bytes
    assert one["e2e_qp"] - other["e2e_qp"] == stored.stream_bytes  # the teacher
    assert one["export"] == other["export"]


def test_what_a_run_has_written_does_not_stand_in_the_way_of_its_resumption(tmp_path: Path) -> None:
    """It is part of the need, so it counts as free. Others write to the same disk meanwhile, so it is tried
    until they were quiet for a moment."""

    def counts(number: int) -> bool:
        run = tmp_path / f"run{number}"
        for folder in ("control", "checkpoints"):
            (run / folder).mkdir(parents=True)
        before = detect(run, "cpu").disk_free
        (run / "checkpoints" / "large").write_bytes(bytes(64 * MIB))
        (run / "config.toml").write_text("")
        with_run, beside_it = detect(run, "cpu").disk_free, detect(tmp_path, "cpu").disk_free
        return abs(with_run - before) < 32 * MIB and beside_it < before - 32 * MIB

    assert any(counts(number) for number in range(10))


# --------------------------------------------------------------------------------------------- out of memory


def test_out_of_gpu_memory_names_what_a_resumed_run_may_change_first(models: Path) -> None:
    config = resolve(apply_overrides(load("paper"), {"model.source": str(models / "7b")}))
    keeps_all = apply_overrides(config, {"e2e_qp.activation_checkpointing": "off"})

    def with_free(gib: float) -> Machine:
        return msgspec.structs.replace(H200, gpu_free=int(gib * GIB))

    assert out_of_memory_remedy(keeps_all, with_free(12)) == "set e2e_qp.activation_checkpointing = on"
    small = apply_overrides(config, {"block_ap.sequences": "1024", "e2e_qp.sequences": "1024"})
    work = Workload(arch=describe(str(models / "7b")).architecture, config=small, cuda=True, windows=160)
    assert choose_store(work, H200)[0] == "device"
    assert out_of_memory_remedy(small, with_free(12)) == "set runtime.activation_store = host"
    longer = out_of_memory_remedy(config, with_free(6.5))
    assert longer.startswith("free the GPU (a new run with ")
    assert "sequence_length = " in longer
    assert "batch_size" not in longer  # every batch had been halved down to one sequence
    assert out_of_memory_remedy(config, with_free(0.1)) == ""


def test_a_model_that_is_gone_when_memory_runs_out_is_no_second_failure(models: Path) -> None:
    config = apply_overrides(load("paper"), {"model.source": str(models / "gone")})
    assert out_of_memory_remedy(config, H200) == ""
