"""Words, shapes and configuration are those that the library compressed-tensors writes itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from packed_models import compare, open_model, packed_blocks, random_weight, save_model, some_ids, write

from engine.architecture.description import describe
from engine.architecture.refusals import refuse
from engine.config.grid import Grid, GridConfig
from engine.errors import PreflightError
from engine.export.layout import Linear, layout_of

CT = layout_of("compressed-tensors")
SHAPE = {"hidden_size": 160, "intermediate_size": 160, "head_dim": 20, "num_attention_heads": 8}


def stream(words: list[int], bits: int, count: int) -> list[int]:
    """Element j is bits [b*j, b*j+b) of the stream whose word k holds bits [32k, 32k+32)."""
    whole = sum((word & 0xFFFFFFFF) << (32 * k) for k, word in enumerate(words))
    return [(whole >> (bits * j)) & ((1 << bits) - 1) for j in range(count)]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("outputs", [32, 20])
def test_integers_run_along_inputs_and_zero_points_along_outputs(bits: int, outputs: int) -> None:
    weight = random_weight(outputs, 64, bits, 32, False, seed=bits)
    tensors = dict(CT.tensors("l", weight))
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == {
        "l.weight_packed": ((outputs, 2 * bits), torch.int32),
        "l.weight_scale": ((outputs, 2), torch.float16),
        "l.weight_zero_point": ((-(-outputs * bits // 32), 2), torch.int32),
        "l.weight_shape": ((2,), torch.int64),
    }
    for row in range(outputs):
        assert stream(tensors["l.weight_packed"][row].tolist(), bits, 64) == weight.codes()[row].tolist()
    for group in range(2):
        column = tensors["l.weight_zero_point"][:, group].tolist()
        assert stream(column, bits, outputs) == weight.zero_point[:, group].tolist()
        assert sum((w & 0xFFFFFFFF) << (32 * k) for k, w in enumerate(column)) >> (bits * outputs) == 0
    assert tensors["l.weight_shape"].tolist() == [outputs, 64]
    assert torch.equal(tensors["l.weight_scale"], weight.scale)


@pytest.mark.parametrize("symmetric", [False, True])
def test_outputs_that_do_not_fill_words_are_read_back(tmp_path: Path, symmetric: bool) -> None:
    """Two key heads of 20 channels: 40 outputs of 3 bits are three words and three quarters."""
    folder = save_model(tmp_path / "fp", **SHAPE)
    source, lm = open_model(folder)
    blocks = packed_blocks(lm, 3, 32, symmetric)
    assert blocks[0].linears["self_attn.k_proj"].out_features == 40
    result = write(tmp_path / "out", lm, source, blocks.__getitem__, layout=CT)
    assert compare(result.path, lm, blocks.__getitem__, some_ids(1, 8), CT).problems == ()
    arch, grid = describe(str(folder)).architecture, GridConfig(bits=3, group_size=32, symmetric=symmetric)
    refuse(arch, describe(str(folder)).config, grid, ["compressed-tensors"])
    with pytest.raises(PreflightError, match="output features of 3 bits") as caught:
        refuse(arch, describe(str(folder)).config, grid, ["gptq_v2"])
    assert caught.value.hint.endswith("leave gptq_v2 out of export.formats, compressed-tensors fits")


@pytest.mark.parametrize(
    ("grid", "says"),
    [
        (Grid(2, 64), {"strategy": "group", "group_size": 64, "symmetric": False, "num_bits": 2}),
        (Grid(3, 32, True), {"strategy": "group", "group_size": 32, "symmetric": True, "num_bits": 3}),
        (Grid(4, -1), {"strategy": "channel", "group_size": None, "symmetric": False, "num_bits": 4}),
    ],
)
def test_the_configuration_says_grid_library_and_what_is_not_quantized(
    tmp_path: Path, grid: Grid, says: dict[str, object]
) -> None:
    source, lm = open_model(save_model(tmp_path / "fp", "gpt_neox", num_key_value_heads=4))
    blocks = packed_blocks(lm, grid.bits, grid.group_size, grid.symmetric)
    result = write(tmp_path / "out", lm, source, blocks.__getitem__, layout=CT)
    said = json.loads((result.path / "config.json").read_text())["quantization_config"]
    group = said["config_groups"]["group_0"]
    assert (said["quant_method"], said["format"]) == ("compressed-tensors", "pack-quantized")
    assert said["version"] == "0.20.0"
    assert says.items() <= group["weights"].items()
    assert said["ignore"] == ["embed_out"]
    assert not (result.path / "quantize_config.json").exists()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_library_unpacks_the_trained_weights(bits: int, symmetric: bool) -> None:
    library = pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    assert library.__version__ >= "0.18"
    weight = random_weight(20, 64, bits, 32, symmetric, seed=bits)
    config = CT.config({"model.layers.0.l": Linear.of(weight)})
    scheme = QuantizationConfig.model_validate(config).config_groups["group_0"]
    state = {name.removeprefix("l."): tensor for name, tensor in CT.tensors("l", weight)}
    unpacked = BaseCompressor.get_value_from_registry("pack-quantized").decompress(state, scheme)
    assert torch.equal(unpacked["weight"], weight.dequantize(torch.float16))
