"""Checkpoints that hold more than the model: the run says so, the plan counts it, the export keeps it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import more_families
import pytest
import tiny
import torch
from engine_runs import of, run_here
from safetensors.torch import load_file, save_file

from engine.architecture.description import describe
from engine.architecture.refusals import refuse
from engine.config.grid import GridConfig
from engine.config.model import ModelConfig
from engine.errors import PreflightError
from engine.models.causal_lm import CausalLM
from engine.models.source import ModelSource
from engine.plan.plan import make_plan
from engine.run import events
from engine.run.directory import RunDirectory

# Rounding alone: what a training does with the blocks is no question of this file.
ROUNDED = {
    "block_ap.enabled": False,
    "e2e_qp.enabled": False,
    "evaluation.enabled": False,
    "grid.bits": 4,
    "grid.group_size": 32,
}


def test_a_run_says_what_it_carries_and_skips_and_keeps_it(
    make: Callable[..., RunDirectory], tmp_path: Path
) -> None:
    folder = more_families.build(tmp_path / "model", "gpt_neox", dtype=torch.float16)
    file, layer = folder / "model.safetensors", "gpt_neox.layers.3.attention.dense.weight"
    extra = {layer: torch.randn(64, 64).half(), "mtp.fc.weight": torch.randn(32, 64).bfloat16()}
    computed = {"gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.full((8,), 9.0)}
    save_file({**load_file(file), **extra, **computed}, file, metadata={"format": "pt"})
    run = make(**{**ROUNDED, "model.source": str(folder)})
    assert run_here(run) == 0
    (said,) = [event for event in of(run, events.Warning) if event.code == "tensors"]
    assert said.message == (
        f"the checkpoint is not the model's alone: 2 tensors ({layer}, mtp.fc.weight) carried over as "
        "stored; 1 tensor (gpt_neox.layers.0.attention.rotary_emb.inv_freq) skipped: computed when the model "
        "is built"
    )
    (done,) = of(run, events.Export)
    assert done.verified
    written = load_file(run.path / done.path / "model.safetensors")
    for name, tensor in extra.items():
        assert written[name].dtype == tensor.dtype
        assert torch.equal(written[name], tensor)
    assert "embed_out.weight" in written
    assert not computed.keys() & written.keys()
    plan = make_plan(run.config())
    assert plan.export_bytes == sum(tensor.nbytes for tensor in written.values())
    assert any("besides the model" in warning and layer in warning for warning in plan.warnings)


def test_a_plain_checkpoint_is_nothing_to_speak_of(make: Callable[..., RunDirectory], tmp_path: Path) -> None:
    folder = tiny.build(tmp_path / "model", "llama2")
    run = make(**{**ROUNDED, "model.source": str(folder), "export.formats": []})
    assert run_here(run) == 0
    assert not [event for event in of(run, events.Warning) if event.code == "tensors"]


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.int8, torch.complex64])
def test_the_plan_refuses_coded_weights_in_the_words_of_the_run(
    make: Callable[..., RunDirectory], tmp_path: Path, stored: torch.dtype
) -> None:
    folder = tiny.build(tmp_path / "model", "llama2")
    file, name = folder / "model.safetensors", "model.layers.0.mlp.down_proj.weight"
    whole = load_file(file)
    save_file({**whole, name: whole[name].to(stored)}, file, metadata={"format": "pt"})
    model = describe(str(folder))
    with pytest.raises(PreflightError) as of_the_plan:
        refuse(model.architecture, model.config, GridConfig())
    with pytest.raises(PreflightError) as of_the_run:
        CausalLM(ModelSource.open(ModelConfig(source=str(folder))), torch.device("cpu"), torch.float32)
    assert name in str(of_the_plan.value)
    assert of_the_plan.value.message == of_the_run.value.message


@pytest.mark.parametrize(
    "lost", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight", "model.layers.2.", "model.layers.0."]
)
def test_the_plan_misses_the_weights_that_the_run_would_miss(tmp_path: Path, lost: str) -> None:
    folder = tiny.build(tmp_path / "model", "llama2")
    file = folder / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(file).items() if not name.startswith(lost)}
    save_file(kept, file, metadata={"format": "pt"})
    model = describe(str(folder))
    with pytest.raises(PreflightError, match=f"tensor '{lost}.*missing from the checkpoint"):
        refuse(model.architecture, model.config, GridConfig())
    with pytest.raises(PreflightError, match=f"tensor '{lost}.*missing from the checkpoint"):
        CausalLM(ModelSource.open(ModelConfig(source=str(folder))), torch.device("cpu"), torch.float32)


def test_fewer_layers_than_config_json_counts_are_missed_in_any_family(tmp_path: Path) -> None:
    folder = more_families.build(tmp_path / "model", "gpt_neox")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 5}))
    model = describe(str(folder))
    for ask in (
        lambda: refuse(model.architecture, model.config, GridConfig()),
        lambda: CausalLM(
            ModelSource.open(ModelConfig(source=str(folder))), torch.device("cpu"), torch.float32
        ),
    ):
        with pytest.raises(PreflightError, match=r"gpt_neox\.layers\.3\..*missing from the checkpoint"):
            ask()


def test_a_weight_in_the_files_but_not_in_their_index_is_planned_as_it_is_run(tmp_path: Path) -> None:
    folder = tiny.build(tmp_path / "model", "llama2", shard_size="100KB")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    before = describe(str(folder)).architecture
    del content["weight_map"]["model.layers.1.mlp.up_proj.weight"]
    index.write_text(json.dumps(content))
    assert describe(str(folder)).architecture == before
