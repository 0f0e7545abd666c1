"""Whole runs in which integers change by factors of low rank, and those that they are compared with."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest
import torch
from engine_runs import (
    FACTORS,
    FROM_LATENTS,
    Child,
    exported,
    inside,
    interrupted_inside,
    metrics,
    of,
    run_here,
)
from safetensors.torch import load_file

from engine.architecture.description import describe
from engine.checkpoints.identity import deciding_fields, default_fields
from engine.config.derived import resolve
from engine.config.kept_latents import kept_latents
from engine.config.loading import load, load_run
from engine.config.overrides import apply_overrides
from engine.config.sameness import config_hash
from engine.config.validation import validate
from engine.config.writing import to_toml
from engine.errors import UsageError
from engine.plan.object_sizes import block_bytes, integers_bytes
from engine.quant.packed import PackedBlock
from engine.run import events
from engine.run.directory import RunDirectory
from engine.run.usable import newest_usable

Make = Callable[..., RunDirectory]
LOW_RANK = {
    **FACTORS,
    "grid.bits": 2,
    "grid.group_size": 32,
    "lr_qat.train": ["factors", "scales", "norms"],
}
FULL = {
    **FROM_LATENTS,
    "grid.bits": 3,
    "block_ap.enabled": False,
    "e2e_qat.train": ["weights", "scales", "norms"],
    "evaluation.enabled": False,
}
OFTEN = {"runtime.checkpoint_minutes": 1e-6, "runtime.checkpoint_share": 1.0}
LONG_LOW_RANK = LOW_RANK | OFTEN | {"block_ap.enabled": False, "lr_qat.epochs": 20}
LONG_FULL = FULL | OFTEN | {"e2e_qat.epochs": 20}


def entries(run: RunDirectory, prefix: str) -> list[str]:
    """Files of the newest generation's entries that begin so, in order."""
    found = newest_usable(run.checkpoints_dir)
    assert found is not None
    named = sorted(
        (name, digest) for name, digest in found.generation.entries.items() if name.startswith(prefix)
    )
    return [str(run.checkpoints_dir / "objects" / f"{digest}.safetensors") for _, digest in named]


def test_behind_block_ap_integers_move_from_its_latents_and_are_exported(finished_once: Make) -> None:
    run = finished_once(**LOW_RANK)
    assert [event.stage for event in of(run, events.Eval)] == ["fp", "rtn", "block_ap", "lr_qat"]
    assert all(export.verified for export in of(run, events.Export))
    assert not [w for w in of(run, events.Warning) if w.code == "latents"]
    config = load_run(run.path)
    arch = describe(config.model.source).architecture
    assert kept_latents(config) == "fixed"
    moved = 0
    for before, after in zip(entries(run, "block-"), entries(run, "lowrank-"), strict=True):
        old, new = load_file(before), load_file(after)
        with open(before, "rb") as one, open(after, "rb") as other:
            assert len(one.read()) == block_bytes(arch, config.grid, "fixed")
            assert len(other.read()) == integers_bytes(arch, config.grid, norms=True)
        packed = PackedBlock.from_tensors(old, config.grid.shared)
        assert not any(name.startswith("latent") for name in packed.others)
        for name, weight in packed.linears.items():
            assert old[f"latent.{name}"].dtype == torch.int8
            assert old[f"latent.{name}"].shape == (weight.out_features, weight.in_features)
            moved += int((new[f"{name}.words"] != weight.words).sum())
        assert not torch.equal(new["other.input_layernorm.weight"], old["other.input_layernorm.weight"])
    assert moved > 0
    perplexity = {event.stage: event.perplexity for event in of(run, events.Eval)}
    assert perplexity["lr_qat"] < perplexity["block_ap"]


@pytest.mark.parametrize(
    ("stage", "knobs"), [("lr_qat", LONG_LOW_RANK), ("e2e_qat", LONG_FULL)], ids=["lr_qat", "full QAT"]
)
def test_killed_in_the_middle_a_training_goes_on_there_and_ends_with_the_same_bytes(
    make: Make, engine: Callable[..., Child], finished_once: Make, stage: str, knobs: dict[str, object]
) -> None:
    """LR-QAT, and full QAT: every weight, scale and norm from the weights that were rounded.

    Checkpoints are made inside of the training, so that a process that is killed leaves one of its middle.
    """
    run = interrupted_inside(
        lambda: make(**knobs), engine, lambda run: len(inside(run, stage)) >= 2, signal.SIGKILL
    )
    left = inside(run, stage)[-1].step
    assert run_here(run) == 0
    first = metrics(run, stage, 2)[0].step
    assert first > 1, "it began the training again"
    assert left is not None
    assert first >= left
    assert exported(run) == exported(finished_once(**knobs))


def test_full_training_needs_no_blocks_trained_before(finished_once: Make) -> None:
    whole = finished_once(**LONG_FULL)
    phases = [event.phase for event in of(whole, events.PhaseStarted)]
    assert phases == ["prepare", "rtn", "e2e_qat", "export"]
    assert all(export.verified for export in of(whole, events.Export))
    assert not entries(whole, "scales-")
    assert "other.input_layernorm.weight" in load_file(entries(whole, "integers-")[0])


def test_a_run_that_uses_nothing_of_it_is_the_run_that_it_was() -> None:
    """Its hash, and what its checkpoints depend on, are those of versions that had no such section."""
    config = resolve(load("smoke", overrides={"e2e_qp.enabled": False, "e2e_qat.enabled": True}))
    assert not [name for name in deciding_fields(config) if name.startswith("lr_qat")]
    assert "lr_qat" not in to_toml(config)
    named = apply_overrides(config, {"e2e_qat.start": "integers", "lr_qat.rank": "32"})
    assert config_hash(named) == config_hash(config)
    assert default_fields(config)["e2e_qat.start"] == '"integers"'
    assert "start" in type(config.e2e_qat).younger()


def test_only_one_stage_trains_the_scales_and_its_refusal_names_both() -> None:
    for other, words in (
        ("e2e_qp", "LR-QAT trains what E2E-QP does"),
        ("e2e_qat", "LR-QAT trains what E2E-QAT"),
    ):
        changes = {"e2e_qp.enabled": "false", f"{other}.enabled": "true", "lr_qat.enabled": "true"}
        with pytest.raises(UsageError, match=words) as refused:
            validate(apply_overrides(load("smoke"), changes))
        assert f"{other}.enabled = false" in refused.value.hint
        assert refused.value.where == "lr_qat.enabled"


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"rank": "0"}, "lr_qat.rank"),
        ({"rank": "5000"}, "lr_qat.rank"),
        ({"alpha": "0"}, "lr_qat.alpha"),
        ({"alpha": "inf"}, "lr_qat.alpha"),
        ({"train": "zero_points"}, "lr_qat.train"),
        ({"lr_factors": "-1"}, "lr_qat.lr_factors"),
        ({"downcast": "float8"}, "lr_qat.downcast"),
        ({"micro_batch_size": "3"}, "lr_qat.micro_batch_size"),
    ],
)
def test_what_cannot_work_is_refused_by_its_name(changes: dict[str, str], where: str) -> None:
    on = {"e2e_qp.enabled": "false", "lr_qat.enabled": "true", "grid.symmetric": "true"}
    with pytest.raises(UsageError) as refused:
        validate(apply_overrides(load("smoke"), on | {f"lr_qat.{k}": v for k, v in changes.items()}))
    assert refused.value.where.startswith(where)
    assert "\n" not in str(refused.value)
