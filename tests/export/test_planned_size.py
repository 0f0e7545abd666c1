"""What the plan says an export will weigh, from config.json and headers alone, is what it weighs."""

from __future__ import annotations

import json
from pathlib import Path

import more_families
import pytest
import tiny
import torch
from packed_models import GPTQ_V2, compare, open_model, packed_blocks, rounded_heads, write
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from engine.architecture.description import describe
from engine.architecture.families import architecture
from engine.config.grid import GridConfig
from engine.export.layout import layout_of
from engine.models.carried import carried
from engine.plan.export_sizes import exported_bytes

EVERY = [*tiny.ARCHITECTURES, *more_families.FAMILIES]
GRID = GridConfig(bits=4, group_size=32)
IDS = torch.arange(3, 11)[None]


def build(folder: Path, name: str) -> Path:
    if name in tiny.ARCHITECTURES:
        return tiny.build(folder, name, dtype=torch.float16)
    return more_families.build(folder, name, dtype=torch.float16)


def tensor_bytes(folder: Path) -> int:
    return sum(
        tensor.numel() * tensor.element_size()
        for file in folder.glob("*.safetensors")
        for tensor in load_file(file).values()
    )


def change(folder: Path, extra: dict[str, torch.Tensor]) -> None:
    file = folder / "model.safetensors"
    save_file({**load_file(file), **extra}, file, metadata={"format": "pt"})


EXTRA = {
    "model.layers.3.self_attn.q_proj.weight": torch.ones(300, 200),
    "model.layers.3.eh_proj.weight": torch.ones(500, 400),
    "model.mtp.layers.0.mlp.up_proj.weight": torch.ones(30, 20),
    "mtp.fc.weight": torch.ones(30, 20),
    "score.weight": torch.ones(2, 64),
    "model.layers.1.mlp.third_proj.weight": torch.ones(256, 128),
    "model.layers.1.mlp.table": torch.ones(8, 8, 8),
    "model.layers.0.self_attn.q_proj.bias": torch.ones(64),
    "model.rotary_emb.inv_freq": torch.ones(8),
    "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
}


@pytest.mark.parametrize("name", EVERY)
def test_the_planned_size_is_that_of_the_tensors_written(tmp_path: Path, name: str) -> None:
    folder = build(tmp_path / "source", name)
    source, lm = open_model(folder)
    write(tmp_path / "out", lm, source, packed_blocks(lm, 4, 32).__getitem__)
    arch = describe(str(folder)).architecture
    assert arch.params == lm.parameters_count
    assert exported_bytes(arch, GRID, GPTQ_V2.format.name) == tensor_bytes(tmp_path / "out")
    outer = sum(tensor.numel() for tensor in lm.outer_state().values())
    assert arch.rest_params == outer
    assert arch.carried == ()


@pytest.mark.parametrize("name", ["llama2", "qwen2", "opt", "gptj", "gpt_neox", "gpt_bigcode"])
def test_so_it_is_where_embedding_and_head_are_quantized(tmp_path: Path, name: str) -> None:
    """Untied and tied, a head with biases, other names, learned positions."""
    folder = build(tmp_path / "source", name)
    source, lm = open_model(folder)
    heads, mlx = rounded_heads(lm, 8, 32), layout_of("mlx")
    blocks = packed_blocks(lm, 4, 32)
    result = write(tmp_path / "out", lm, source, blocks.__getitem__, layout=mlx, heads=heads)
    assert compare(result.path, lm, blocks.__getitem__, IDS, mlx, heads=heads).problems == ()
    arch = describe(str(folder)).architecture
    grid = GridConfig(bits=4, group_size=32, head_bits=8)
    assert exported_bytes(arch, grid, "mlx") == tensor_bytes(tmp_path / "out")
    assert arch.head_weights == sum(each.out_features * each.in_features for each in heads.values())


@pytest.mark.parametrize("name", ["opt", "gpt_bigcode", "biogpt", "gpt_neo", "gptj"])
def test_learned_positions_count_where_only_the_configuration_is_known(tmp_path: Path, name: str) -> None:
    described = describe(str(build(tmp_path / "source", name)))
    known = described.architecture.other_outer_params
    assert architecture(described.config).other_outer_params == known
    assert (known > 0) is (name != "gptj"), "GPT-J computes its positions"


def test_what_is_carried_over_is_counted_once_and_as_it_is_stored(tmp_path: Path) -> None:
    folder = tiny.build(tmp_path / "source", "llama2")
    before = describe(str(folder)).architecture
    change(folder, EXTRA)
    source, lm = open_model(folder)
    arch = describe(str(folder)).architecture
    assert dict(arch.carried) == {each.name: each.nbytes for each in carried(lm)}
    assert (arch.params, arch.linears) == (before.params, before.linears)
    write(tmp_path / "out", lm, source, packed_blocks(lm, 4, 32).__getitem__)
    assert exported_bytes(arch, GRID, GPTQ_V2.format.name) == tensor_bytes(tmp_path / "out")


def test_of_a_larger_model_the_plan_counts_the_language_models_tensors(tmp_path: Path) -> None:
    folder = tiny.build(tmp_path / "source", "gemma3")
    before = describe(str(folder)).architecture
    config = json.loads((folder / "config.json").read_text())
    AutoConfig.for_model("gemma3", text_config=config).save_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    save_file(
        {
            **{f"language_model.{name}": tensor for name, tensor in stored.items()},
            **{f"vision_tower.encoder.layers.{index}.mlp.weight": torch.ones(900, 900) for index in range(3)},
            "multi_modal_projector.weight": torch.ones(70, 60),
            "language_model.model.layers.3.mlp.up_proj.weight": torch.ones(10, 4),
        },
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    arch = describe(str(folder)).architecture
    source, lm = open_model(folder)
    assert (arch.params, arch.block_prefix) == (before.params, "language_model.model.layers")
    assert [nbytes for _, nbytes in arch.carried] == [each.nbytes for each in carried(lm)] == [160]
    write(tmp_path / "out", lm, source, packed_blocks(lm, 4, 32).__getitem__)
    assert exported_bytes(arch, GRID, GPTQ_V2.format.name) == tensor_bytes(tmp_path / "out")


@pytest.mark.parametrize("name", EVERY)
def test_blocks_and_outer_tensors_are_told_apart_as_the_model_tells_them(tmp_path: Path, name: str) -> None:
    folder = build(tmp_path / "source", name)
    _, lm = open_model(folder)
    arch = describe(str(folder)).architecture
    assert arch.block_prefix == lm.block_prefix(0).removesuffix(".0")
    assert {each.name for each in arch.linears} == set(lm.linear_names(0))
