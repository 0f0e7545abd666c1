"""Whole runs whose zero points are fixed: no stage and no interruption moves one of them."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable

import pytest
from engine_runs import Child, exported, of, output, run_here
from safetensors.torch import load_file

from engine.export.gptq_v2 import GPTQv2Reader
from engine.run import events
from engine.run.directory import RunDirectory

Make = Callable[..., RunDirectory]
HELD = {2: 1, 3: 4, 4: 8, 8: 128}
LONG = {"block_ap.sequences": 8, "block_ap.epochs": 4, "e2e_qp.sequences": 12, "e2e_qp.epochs": 5}


def fixed(bits: int) -> dict[str, object]:
    """Settings of a run with fixed zero points that learns fast enough to move whatever can be moved."""
    rates = {"block_ap.lr_quant": 0.1, "e2e_qp.lr": 0.05}
    return {"grid.bits": bits, "grid.group_size": 32, "grid.zero_point": "fixed", **rates}


def zero_points(run: RunDirectory) -> set[int]:
    """All that occur in the checkpoint's objects and in the export."""
    found: set[int] = set()
    stages = 0
    for path in (run.checkpoints_dir / "objects").glob("*.safetensors"):
        tensors = {name: value for name, value in load_file(path).items() if name.endswith(".zero_point")}
        stages += any(name.startswith("linear.") for name in tensors)
        found |= {value for tensor in tensors.values() for value in tensor.unique().tolist()}
    assert stages >= 4, "each block's"
    reader = GPTQv2Reader(run.export_dir / "gptq_v2")
    for index in range(4):
        for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
            found |= set(reader.linear(f"model.layers.{index}.{name}").zero_OG.unique().tolist())
    return found


@pytest.mark.parametrize("bits", HELD)
def test_every_zero_point_is_the_fixed_one_after_both_trainings(make: Make, bits: int) -> None:
    run = make(**fixed(bits))
    assert run_here(run) == 0, [e.message for e in of(run, events.Error)]
    assert zero_points(run) == {HELD[bits]}
    (export,) = of(run, events.Export)
    assert export.verified
    stated = json.loads((run.export_dir / "gptq_v2" / "config.json").read_text())["quantization_config"]
    assert stated["sym"] is (bits > 2), "a symmetric grid of 2 bits has its zero points at 2"
    (plan,) = [event.plan for event in of(run, events.Plan)]
    assert plan["zero_points"].startswith(f"all {HELD[bits]}: ")


@pytest.mark.parametrize("phase", ["block_ap", "e2e_qp"])
def test_a_resumed_run_keeps_them_and_ends_with_the_same_bytes(
    make: Make, engine: Callable[..., Child], finished_once: Make, phase: str
) -> None:
    settings = {**fixed(2), **LONG, "runtime.checkpoint_minutes": 0}
    run = make(**settings)
    child = engine(run)
    child.until(lambda: any(e.phase == phase for e in of(run, events.Metric)))
    child.send(signal.SIGTERM)
    assert child.code() == 75, output(run)
    assert run_here(run) == 0
    assert zero_points(run) == {1}
    assert exported(run) == exported(finished_once(**settings))
