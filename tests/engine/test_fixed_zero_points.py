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
KINDS = {2: "Q2_0_g64", 3: "Q4_0", 4: "Q4_0", 8: "Q8_0"}
"""GGUF's types for them."""
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
    formats = ["gptq_v2", "gguf", "gptq"] if bits == 2 else ["gptq_v2", "gguf"]
    run = make(**{**fixed(bits), "grid.group_size": 64, "export.formats": formats})
    assert run_here(run) == 0, [e.message for e in of(run, events.Error)]
    assert zero_points(run) == {HELD[bits]}
    assert {export.format: export.verified for export in of(run, events.Export)} == dict.fromkeys(
        formats, True
    )
    (file,) = (run.export_dir / "gguf").glob("*.gguf")
    assert file.stem.endswith(KINDS[bits]), "no bias is stored, and so none is rounded"
    stated = json.loads((run.export_dir / "gptq_v2" / "config.json").read_text())["quantization_config"]
    assert stated["sym"] is (bits > 2), "a symmetric grid of 2 bits has its zero points at 2"
    (plan,) = [event.plan for event in of(run, events.Plan)]
    assert not [warning for warning in plan["warnings"] if "zero point of 0" in warning]
    assert plan["zero_points"].startswith(f"all {HELD[bits]}: ")


def test_a_run_stopped_in_each_training_keeps_them_and_ends_with_the_same_bytes(
    make: Make, engine: Callable[..., Child], finished_once: Make
) -> None:
    settings = {**fixed(2), **LONG}
    run = make(**settings)
    for phase in ("block_ap", "e2e_qp"):
        child = engine(run)
        child.until(lambda phase=phase: any(e.phase == phase for e in of(run, events.Metric)))
        child.send(signal.SIGTERM)
        assert child.code() == 75, output(run)
    assert run_here(run) == 0
    assert zero_points(run) == {1}
    assert exported(run) == exported(finished_once(**settings))
