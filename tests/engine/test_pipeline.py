"""Whole runs, small: every phase, every switch, and the same bytes whenever the same is asked for."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from engine_runs import Child, exported, failure, log, of, run_here
from safetensors import safe_open

from engine.config.overrides import apply_overrides
from engine.plan.plan import make_plan
from engine.run import events
from engine.run.directory import RunDirectory
from engine.run.liveness import run_state
from engine.run.state import load_state

Make = Callable[..., RunDirectory]
EVERY_PHASE = [
    "prepare",
    "evaluate_fp",
    "block_ap",
    "evaluate_rtn",
    "evaluate_block_ap",
    "e2e_qp",
    "evaluate_e2e_qp",
    "export",
]


def phases(run: RunDirectory) -> list[str]:
    """Phases in the order they finished."""
    started = [e.phase for e in of(run, events.PhaseStarted)]
    finished = [e.phase for e in of(run, events.PhaseFinished)]
    assert started == finished
    return list(finished)


def completed(run: RunDirectory) -> RunDirectory:
    """Run it to its end, and check it."""
    assert run_here(run) == 0, [e.message for e in of(run, events.Error)]
    return checked(run)


def checked(run: RunDirectory) -> RunDirectory:
    """What every completed run has in common."""
    assert run_state(run) == "done"
    blocks = [e.block for e in of(run, events.BlockFinished)]
    assert blocks == list(range(of(run, events.BlockStarted)[0].blocks))
    for export in of(run, events.Export):
        assert export.verified
        assert export.max_logit_diff is not None
        assert export.max_logit_diff < 1e-2
        assert (run.path / export.path).is_dir()
    assert not run.cache_dir.exists() or not any(run.cache_dir.iterdir())
    return run


def quantization(run: RunDirectory) -> dict[str, object]:
    config = json.loads((run.export_dir / "gptq_v2" / "config.json").read_text())
    found: dict[str, object] = config["quantization_config"]
    return found


# -- all of it -----------------------------------------------------------------------------------------


def test_every_phase_runs_and_the_events_say_so(finished_once: Make) -> None:
    run = checked(finished_once())
    assert phases(run) == EVERY_PHASE
    numbers = [e.seq for e in log(run)]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers))), "no event was lost"
    stages = {e.stage: e for e in of(run, events.Eval)}
    assert list(stages) == ["fp", "rtn", "block_ap", "e2e_qp"]
    for stage in stages.values():
        assert stage.tokens == 4 * 15
        assert stage.perplexity is not None
        assert 1 < stage.perplexity < 1e4
    for block in of(run, events.BlockFinished):
        assert None not in (block.initial_loss, block.final_loss, block.val_loss)
        assert not block.restored
    commits = of(run, events.CheckpointCommitted)
    assert [e.generation for e in commits] == list(range(1, len(commits) + 1))
    blocks = [e.block for e in commits if e.phase == "block_ap"]
    assert sorted(set(blocks)) == [0, 1, 2, 3]
    assert blocks == sorted(blocks)
    state = load_state(run)
    assert state.outcome == "done"
    assert state.exit_code == 0
    manifest = run.manifest()
    assert manifest is not None
    assert manifest["id"] == run.id
    assert len(manifest["identity"]["model"]) == 64


def test_the_same_configuration_gives_the_same_bytes(make: Make, finished_once: Make) -> None:
    first, second = completed(make()), checked(finished_once())
    assert exported(first) == exported(second)
    other = completed(make(**{"runtime.seed": 1}))
    assert exported(other).keys() == exported(first).keys()
    assert exported(other)["model.safetensors"] != exported(first)["model.safetensors"]


@pytest.mark.parametrize("store", ["host", "disk"])
def test_where_activations_live_does_not_change_a_bit(make: Make, finished_once: Make, store: str) -> None:
    device = checked(finished_once(**{"runtime.activation_store": "device"}))
    other = completed(make(**{"runtime.activation_store": store}))
    assert exported(other) == exported(device)


def test_a_second_run_in_the_same_directory_trains_nothing_and_exports_the_same(finished_copy: Make) -> None:
    run = checked(finished_copy())
    before = exported(run)
    assert run_here(run) == 0
    assert exported(run) == before
    again = of(run, events.BlockFinished, attempt=2)
    assert [e.block for e in again] == [0, 1, 2, 3]
    assert all(e.restored for e in again)
    first = of(run, events.BlockFinished, attempt=1)
    assert [e.final_loss for e in again] == [e.final_loss for e in first]
    assert not of(run, events.Metric, attempt=2)
    assert [e.perplexity for e in of(run, events.Eval, attempt=2)] == [
        e.perplexity for e in of(run, events.Eval, attempt=1)
    ]


# -- switches ------------------------------------------------------------------------------------------


def test_without_block_ap_the_scales_train_from_round_to_nearest(make: Make) -> None:
    run = completed(make(**{"block_ap.enabled": False}))
    assert phases(run) == [
        "prepare",
        "evaluate_fp",
        "rtn",
        "evaluate_rtn",
        "e2e_qp",
        "evaluate_e2e_qp",
        "export",
    ]
    assert {e.phase for e in of(run, events.Metric)} == {"e2e_qp"}
    rounded = completed(make(**{"block_ap.enabled": False, "e2e_qp.enabled": False}))
    assert phases(rounded) == ["prepare", "evaluate_fp", "rtn", "evaluate_rtn", "export"]
    for name in ("qweight", "scales"):
        same = tensor(run, name).equal(tensor(rounded, name))
        assert same == (name == "qweight"), "end-to-end training moves the scales and only them"


def tensor(run: RunDirectory, suffix: str):  # type: ignore[no-untyped-def]
    with safe_open(run.export_dir / "gptq_v2" / "model.safetensors", "pt") as file:
        return file.get_tensor(f"model.layers.0.self_attn.q_proj.{suffix}")


def test_each_phase_can_be_left_out(make: Make) -> None:
    run = completed(make(**{"e2e_qp.enabled": False}))
    assert "e2e_qp" not in phases(run)
    assert "evaluate_e2e_qp" not in phases(run)
    run = completed(make(**{"evaluation.enabled": False}))
    assert phases(run) == ["prepare", "block_ap", "e2e_qp", "export"]
    assert not of(run, events.Eval)
    assert of(run, events.Export)[0].verified
    run = completed(make(**{"export.formats": []}))
    assert phases(run) == EVERY_PHASE[:-1]
    assert not of(run, events.Export)


def test_an_export_can_be_asked_for_later(make: Make, finished_once: Make) -> None:
    run = completed(make(**{"export.formats": []}))
    assert run_here(run, "--task", "export", "--format", "gptq_v2") == 0
    assert exported(run) == {**exported(finished_once()), **card_of(run)}


def card_of(run: RunDirectory) -> dict[str, str]:
    """The card states the command, and so differs between runs of other configurations."""
    return {name: digest for name, digest in exported(run).items() if name == "README.md"}


def test_evaluation_can_be_repeated_and_agrees(finished_copy: Make) -> None:
    run = checked(finished_copy())
    assert run_here(run, "--task", "eval") == 0
    again = of(run, events.Eval, attempt=2)
    assert [e.stage for e in again] == ["e2e_qp"]
    assert again[0].perplexity == of(run, events.Eval, attempt=1)[-1].perplexity


def test_tasks_refuse_a_run_that_has_not_trained(make: Make) -> None:
    run = make()
    assert run_here(run, "--task", "export") == 2
    assert "has not finished training" in failure(run, 2).message


def test_losses_are_switches(make: Make) -> None:
    runs = {
        (block, e2e): completed(make(**{"block_ap.loss": block, "e2e_qp.loss": e2e}))
        for block, e2e in (("mse", "cross_entropy"), ("token_relative_mse", "kl"))
    }
    models = {exported(run)["model.safetensors"] for run in runs.values()}
    assert len(models) == 2


def test_without_validation_the_last_state_is_kept(make: Make) -> None:
    run = completed(make(**{"block_ap.val_sequences": 0, "e2e_qp.val_sequences": 0}))
    assert all(e.val_loss is None for e in of(run, events.BlockFinished))
    assert all(e.val_loss is None for e in of(run, events.Metric))


def test_the_teacher_is_recomputed_when_both_phases_train_on_different_text(make: Make) -> None:
    run = completed(make(**{"e2e_qp.sequences": 6, "e2e_qp.sequence_length": 24}))
    assert of(run, events.Metric)[-1].phase == "e2e_qp"


def test_phases_may_compute_in_different_precision(make: Make, finished_once: Make) -> None:
    half = completed(make(**{"block_ap.compute_dtype": "bfloat16", "e2e_qp.compute_dtype": "float32"}))
    assert run_here(half) == 0
    full = finished_once()
    assert exported(half)["model.safetensors"] != exported(full)["model.safetensors"]
    low = completed(make(**{"e2e_qp.compute_dtype": "bfloat16"}))
    assert exported(low)["model.safetensors"] != exported(full)["model.safetensors"], "it was not used"


@pytest.mark.parametrize(
    ("bits", "group", "symmetric"),
    [
        (2, 32, False),
        (3, 64, False),
        (4, -1, False),
        (8, 32, False),
        (2, -1, True),
        (3, 32, True),
        (4, 64, True),
    ],
)
def test_grids(make: Make, bits: int, group: int, symmetric: bool) -> None:
    run = completed(make(**{"grid.bits": bits, "grid.group_size": group, "grid.symmetric": symmetric}))
    stated = quantization(run)
    assert (stated["bits"], stated["group_size"], stated["sym"]) == (bits, group, symmetric)
    event = of(run, events.Export)[0]
    assert bits < event.bits_per_weight < bits + 2
    perplexity = {e.stage: e.perplexity for e in of(run, events.Eval)}
    assert all(value is not None and math.isfinite(value) for value in perplexity.values())


# -- real models ---------------------------------------------------------------------------------------


def test_a_group_size_that_does_not_divide_a_layer_is_refused_before_anything_is_loaded(
    make: Make, stories: Path
) -> None:
    run = make(**{"model.source": str(stories), "grid.group_size": 64})
    assert run_here(run) == 3
    error = failure(run, 3)
    assert error.where == "model.layers.0.mlp.down_proj"
    assert "172" in error.message
    assert "64" in error.message
    assert not of(run, events.PhaseStarted)
    assert not run.run_json.exists()


def test_a_trained_model_gets_better_with_training(make: Make, stories: Path) -> None:
    """Only whole rows divide its 172 inputs of down_proj, and only 8 bits make whole words of them."""
    run = completed(make(**{"model.source": str(stories), "grid.bits": 8, "grid.group_size": -1}))
    perplexity = {e.stage: e.perplexity for e in of(run, events.Eval)}
    assert None not in perplexity.values()
    for stage in ("rtn", "block_ap", "e2e_qp"):
        assert perplexity[stage] == pytest.approx(perplexity["fp"], rel=0.02)
    assert quantization(run)["group_size"] == -1


# -- memory --------------------------------------------------------------------------------------------


def test_a_small_budget_is_kept_by_putting_activations_on_disk_and_gives_the_same_bits(
    make: Make, engine: Callable[..., Child]
) -> None:
    sizes = {
        "block_ap.sequences": 1024,
        "block_ap.val_sequences": 0,
        "block_ap.sequence_length": 64,
        "block_ap.batch_size": 64,
        "e2e_qp.enabled": False,
        "evaluation.enabled": False,
    }
    streams = 2 * 1024 * 64 * 64 * 4
    roomy = make(**sizes)
    assert make_plan(roomy.config()).activation_store == "host"
    needed = {
        store: make_plan(apply_overrides(roomy.config(), {"runtime.activation_store": store})).peak_host_bytes
        for store in ("host", "disk")
    }
    assert needed["host"] - needed["disk"] > 0.8 * streams
    budget = needed["disk"] + streams // 4
    tight = make(**sizes, **{"runtime.host_memory_gib": budget / 2**30})
    assert make_plan(tight.config()).activation_store == "disk"

    peaks = {}
    for name, run in (("roomy", roomy), ("tight", tight)):
        assert engine(run).code() == 0
        peaks[name] = max(e.peak_host_bytes or 0 for e in of(run, events.PhaseFinished))
    assert exported(tight) == {**exported(roomy), **card_of(tight)}
    assert peaks["roomy"] - peaks["tight"] > 0.8 * streams
    assert peaks["tight"] < budget
