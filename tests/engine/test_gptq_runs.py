"""Whole runs by GPTQ, and of Block-AP from where GPTQ leaves a block: what is made, and that no interruption
shows in it."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping

import pytest
import torch
from engine_runs import FACTORS, FROM_LATENTS, Child, exported, of, output, run_here
from safetensors.torch import load_file

from engine.architecture.description import describe
from engine.config.latents import Downcast
from engine.config.loading import load, load_run
from engine.plan.object_sizes import block_bytes
from engine.quant.downcast import upcast
from engine.quant.grid import quantize
from engine.quant.packed import PackedBlock
from engine.run import events
from engine.run.directory import RunDirectory
from engine.run.usable import newest_usable

Make = Callable[..., RunDirectory]
ALONE = {
    "grid.bits": 2,
    "block_ap.enabled": False,
    "e2e_qp.loss": "kl",
    "gptq.enabled": True,
    "gptq.sequences": 16,
    "gptq.sequence_length": 16,
    "gptq.batch_size": 4,
    "runtime.streams": "stored",
}
AS_START = {"grid.bits": 2, "block_ap.start": "gptq", "gptq.sequences": 3, "e2e_qp.enabled": False}

THEN_FACTORS = {**ALONE, **FACTORS, "gptq.scales": "search"}
THEN_WEIGHTS = {**ALONE, **FROM_LATENTS}


def test_it_is_a_method_like_the_others(finished_once: Make) -> None:
    run = finished_once(**ALONE)
    phases = [event.phase for event in of(run, events.PhaseStarted)]
    made = ["prepare", "evaluate_fp", "gptq", "evaluate_rtn", "evaluate_gptq"]
    assert phases == [*made, "e2e_qp", "evaluate_e2e_qp", "export"]
    assert all(export.verified for export in of(run, events.Export))
    finished = of(run, events.BlockFinished)
    assert [event.block for event in finished] == [0, 1, 2, 3]
    for event in finished:
        assert event.initial_loss is not None
        assert event.final_loss is not None
        assert 0 < event.final_loss < 0.9 * event.initial_loss
        assert event.val_loss is None
    config, found = load_run(run.path), newest_usable(run.checkpoints_dir)
    assert found is not None
    arch = describe(config.model.source).architecture
    for index in range(4):
        digest = found.generation.entries[f"block-{index:03d}"]
        file = run.checkpoints_dir / "objects" / f"{digest}.safetensors"
        assert file.stat().st_size == block_bytes(arch, config.grid)
    card = (run.export_dir / "gptq_v2" / "README.md").read_text()
    assert "after GPTQ" in card
    assert list(run.cache_dir.glob("*")) == []


def test_killed_while_it_commits_it_ends_with_the_same_bytes(
    make: Make, engine: Callable[..., Child], finished_once: Make
) -> None:
    run = make(**ALONE)
    assert engine(run, die_at=30).code() == -signal.SIGKILL
    assert 1 <= len(of(run, events.BlockFinished)) < 4
    assert run_here(run) == 0
    assert exported(run) == exported(finished_once(**ALONE))


def test_a_damaged_block_is_made_again_with_all_behind_it(finished_copy: Make, finished_once: Make) -> None:
    run = finished_copy(**ALONE)
    found = newest_usable(run.checkpoints_dir)
    assert found is not None
    digest = found.generation.entries["block-002"]
    file = run.checkpoints_dir / "objects" / f"{digest}.safetensors"
    file.chmod(0o644)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert run_here(run) == 0
    again = [event for event in of(run, events.BlockFinished, attempt=2) if not event.restored]
    assert [event.block for event in again] == [2, 3]
    assert exported(run) == exported(finished_once(**ALONE))


def test_block_ap_goes_on_from_it_and_resumes_to_the_same_bytes(
    make: Make, engine: Callable[..., Child], finished_once: Make
) -> None:
    whole = finished_once(**AS_START)
    assert [event.stage for event in of(whole, events.Eval)] == ["fp", "rtn", "block_ap"]
    run = make(**AS_START)
    child = engine(run)
    child.until(lambda: len(of(run, events.Metric)) >= 3)
    child.send(signal.SIGTERM)
    assert child.code() in (75, 0), output(run)
    assert run_here(run) == 0
    assert exported(run) == exported(whole)


def test_its_preset_trains_nothing() -> None:
    config = load("gptq")
    assert config.gptq.enabled
    assert not any(getattr(config, name).enabled for name in ("block_ap", "e2e_qp", "e2e_qat", "imported"))


@pytest.mark.parametrize(
    ("settings", "entries", "form"),
    [(THEN_FACTORS, "lowrank", "fixed"), (THEN_WEIGHTS, "integers", "float16")],
    ids=["lr_qat", "e2e_qat"],
)
def test_a_stage_behind_it_starts_from_what_it_rounded(
    finished_once: Make, settings: dict[str, object], entries: str, form: Downcast
) -> None:
    """Its latents are not the original weights: what was rounded earlier has moved them."""
    run = finished_once(**settings)
    assert all(export.verified for export in of(run, events.Export))
    assert not [w for w in of(run, events.Warning) if w.code == "latents"]
    config, found = load_run(run.path), newest_usable(run.checkpoints_dir)
    assert found is not None
    arch = describe(config.model.source).architecture
    moved = 0
    for index in range(4):
        names = (f"block-{index:03d}", f"{entries}-{index:03d}")
        before, after = (run.checkpoints_dir / "objects" / _file(found.generation.entries, n) for n in names)
        assert before.stat().st_size == block_bytes(arch, config.grid, form)
        old, new = load_file(before), load_file(after)
        for name, weight in PackedBlock.from_tensors(old, config.grid.shared).linears.items():
            latent = upcast(old[f"latent.{name}"], weight.zero_point, weight.grid)
            ones = torch.ones_like(weight.scale, dtype=torch.float32)
            codes = quantize(latent, ones, weight.zero_point.float(), weight.bits)
            # A latent on the border between two integers may lie across it once it is kept in fewer bits.
            assert (codes != weight.codes()).float().mean() < 0.02
            moved += int((new[f"{name}.words"] != weight.words).sum())
    assert moved > 0


def _file(entries: Mapping[str, str], name: str) -> str:
    return f"{entries[name]}.safetensors"
