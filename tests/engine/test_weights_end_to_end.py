"""Whole runs in which integers, or norms beside scales, are trained end to end."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest
import torch
from engine_runs import Child, exported, of, output, run_here
from safetensors.torch import load_file

from engine.architecture.description import describe
from engine.config.loading import load, load_run
from engine.config.overrides import apply_overrides
from engine.config.validation import validate
from engine.errors import UsageError
from engine.plan.object_sizes import integers_bytes, scales_bytes
from engine.quant.packing import bitunpack
from engine.run import events
from engine.run.directory import RunDirectory
from engine.run.usable import newest_usable

Make = Callable[..., RunDirectory]
SETTINGS = {
    "grid.bits": 2,
    "grid.group_size": 32,
    "e2e_qp.enabled": False,
    "e2e_qat.enabled": True,
    "e2e_qat.sequences": 16,
    "e2e_qat.val_sequences": 0,
    "e2e_qat.sequence_length": 32,
    "e2e_qat.batch_size": 4,
    "e2e_qat.epochs": 6,
    "e2e_qat.lr_weight": 0.1,
}

NORMS_TOO = {
    "grid.bits": 2,
    "e2e_qp.train": ["scales", "norms"],
    "e2e_qp.sequences": 16,
    "e2e_qp.sequence_length": 32,
    "e2e_qp.batch_size": 4,
    "e2e_qp.epochs": 6,
}


def entries(run: RunDirectory, prefix: str) -> list[str]:
    """Files of the newest generation's entries that begin so, in order."""
    found = newest_usable(run.checkpoints_dir)
    assert found is not None
    named = sorted(
        (name, digest) for name, digest in found.generation.entries.items() if name.startswith(prefix)
    )
    return [str(run.checkpoints_dir / "objects" / f"{digest}.safetensors") for _, digest in named]


def test_integers_change_and_what_is_exported_has_the_new_ones(finished_once: Make) -> None:
    run = finished_once(**SETTINGS)
    assert [event.stage for event in of(run, events.Eval)] == ["fp", "rtn", "block_ap", "e2e_qat"]
    assert all(export.verified for export in of(run, events.Export))
    before = [load_file(file) for file in entries(run, "block-")]
    after = [load_file(file) for file in entries(run, "integers-")]
    assert len(before) == len(after) == 4
    moved = 0
    for old, new in zip(before, after, strict=True):
        for name in (name for name in new if name.endswith(".words")):
            one, other = (bitunpack(words, 2, dim=1) for words in (old[f"linear.{name}"], new[name]))
            moved += int((one != other).sum())
    assert moved > 0
    phases = [event.phase for event in of(run, events.PhaseStarted)]
    assert "e2e_qp" not in phases


def test_its_objects_are_as_large_as_planned(finished_once: Make) -> None:
    run = finished_once(**SETTINGS)
    config = load_run(run.path)
    arch = describe(config.model.source).architecture
    for file in entries(run, "integers-"):
        with open(file, "rb") as opened:
            assert len(opened.read()) == integers_bytes(arch, config.grid)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_interrupted_inside_it_a_run_ends_with_the_same_bytes(
    make: Make, engine: Callable[..., Child], finished_once: Make, number: int
) -> None:
    run = make(**SETTINGS)
    child = engine(run)
    child.until(lambda: any(e.phase == "e2e_qat" for e in of(run, events.Metric)))
    child.send(number)
    assert child.code() == (75 if number == signal.SIGTERM else -signal.SIGKILL), output(run)
    assert run_here(run) == 0
    assert exported(run) == exported(finished_once(**SETTINGS))


def test_norms_are_trained_beside_scales_and_are_exported(finished_once: Make) -> None:
    run = finished_once(**NORMS_TOO)
    assert all(export.verified for export in of(run, events.Export))
    config = load_run(run.path)
    arch = describe(config.model.source).architecture
    before = [load_file(file) for file in entries(run, "block-")]
    written = load_file(run.path / "export" / "gptq_v2" / "model.safetensors")
    for index, (old, file) in enumerate(zip(before, entries(run, "scales-"), strict=True)):
        new = load_file(file)
        with open(file, "rb") as opened:
            assert len(opened.read()) == scales_bytes(arch, config.grid, norms=True)
        assert not any(name.endswith(".words") for name in new)
        for norm in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            assert not torch.equal(new[f"other.{norm}"], old[f"other.{norm}"])
            stored = written[f"model.layers.{index}.{norm}"]
            assert torch.equal(stored, new[f"other.{norm}"].to(stored.dtype))


def test_stopped_while_norms_are_trained_a_run_ends_with_the_same_bytes(
    make: Make, engine: Callable[..., Child], finished_once: Make
) -> None:
    run = make(**NORMS_TOO)
    child = engine(run)
    child.until(lambda: any(e.phase == "e2e_qp" for e in of(run, events.Metric)))
    child.send(signal.SIGTERM)
    assert child.code() == 75, output(run)
    assert of(run, events.CheckpointCommitted)[-1].step, "in the middle of a training"
    assert run_here(run) == 0
    assert exported(run) == exported(finished_once(**NORMS_TOO))


def test_only_one_of_the_two_trains_scales() -> None:
    both = apply_overrides(load("smoke"), {"e2e_qat.enabled": "true"})
    with pytest.raises(UsageError, match="E2E-QAT trains what E2E-QP does") as refused:
        validate(both)
    assert "e2e_qp.enabled = false" in refused.value.hint
