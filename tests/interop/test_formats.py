"""Every format is loaded by the loader it is meant for, which computes what was trained.

Models of three shapes (Llama with biases, Qwen3 with norms of queries and keys, Gemma 3 with two kinds of
attention), heads tied and not. ``make interop`` runs this in an environment of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from loaders import LOADERS
from onnx_traces import traced_once
from packed_models import (
    open_model,
    packed_blocks,
    rounded_heads,
    save_model,
    some_ids,
    trained_logits,
    write,
)
from table import Tried

from engine.config.formats import FORMATS
from engine.config.grid import Grid
from engine.export.layout import form_of
from eqat_tui.views.result import loading_snippet

pytest.importorskip("gptqmodel", reason="run by `make interop` in an environment of its own")

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True, "head_dim": 64}),
    "gemma3": (
        "gemma3_text",
        {
            "head_dim": 64,
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window_pattern": 2,  # the same in the words that mlx-lm reads
            "sliding_window": 8,
            "query_pre_attn_scalar": 64,
        },
    ),
}
GRIDS = [Grid(2, 64), Grid(3, 64), Grid(4, 128), Grid(8, 32), Grid(4, -1), Grid(3, 32, True)]
NO_ZERO = ("gptq",)
FOLDERS = [name for name in FORMATS.names() if name != "gguf"]
"""Formats whose exports have tokenizer and configuration beside them; GGUF has a file of tests of its own."""


class Case(NamedTuple):
    format: str
    model: str
    grid: Grid

    def __str__(self) -> str:
        grid = f"w{self.grid.bits}g{self.grid.group_size}{'s' * self.grid.symmetric}"
        return f"{self.format}-{self.model}-{grid}"


CASES = [
    Case(name, model, grid)
    for name in LOADERS
    for index, model in enumerate(MODELS)
    for number, grid in enumerate(grid for grid in GRIDS if not FORMATS[name].lacks(grid))
    # Each model with the three widths that are trained, the first with every grid.
    if index == 0 or number < 3
]


@pytest.fixture(scope="module", autouse=True)
def _networks_traced_once() -> Iterator[None]:
    with traced_once():
        yield


def test_every_format_of_the_table_has_a_loader_here() -> None:
    assert set(LOADERS) == set(FOLDERS)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_loader_computes_what_was_trained(tmp_path: Path, tried: list[Tried], case: Case) -> None:
    model_type, changes = MODELS[case.model]
    source, lm = open_model(save_model(tmp_path / "fp", model_type, **changes))
    blocks = packed_blocks(lm, case.grid.bits, case.grid.group_size, case.grid.symmetric)
    if case.format in NO_ZERO:
        for block in blocks:
            for weight in block.linears.values():
                weight.zero_point.clamp_(min=1)
    form, ids = form_of(case.format), some_ids(4, 96)
    result = write(
        tmp_path / "out", lm, source, blocks.__getitem__, layout=form, dtype="float16", shard_bytes=300_000
    )
    have, weights = LOADERS[case.format].load(result.path, ids)
    want = trained_logits(lm, blocks, ids, "float16")
    # The two best of a random model are often closer than arithmetic of 16 bits can tell.
    best = want.topk(2).values
    decided = best[..., 0] - best[..., 1] > 0.05 * want.std()
    agree = (have.argmax(-1) == want.argmax(-1))[decided].float().mean().item()
    worst = ((have - want).abs().max() / want.std()).item()
    for index, block in enumerate(blocks):
        for name, weight in block.linears.items():
            if weights:
                read = weights[f"{lm.block_prefix(index)}.{name}.weight"]
                # mlx unpacks to float32; the others hand out, or hold, what float16 makes of a weight.
                exact = torch.float32 if case.format == "mlx" else torch.float16
                assert torch.equal(read, weight.dequantize(exact).to(read.dtype)), name
    # Exact weights and arithmetic differ by the order of sums; kernels compute in float16.
    assert worst < (0.1 if weights else 0.25)
    assert agree >= 0.99
    grid, words = case.grid, LOADERS[case.format].words
    tried.append(
        Tried(
            format=case.format,
            model=case.model,
            bits=grid.bits,
            group_size=grid.group_size,
            symmetric=grid.symmetric,
            loader=words,
            weights_equal=bool(weights),
            agree=agree,
            worst=worst,
        )
    )


@pytest.mark.parametrize("name", FOLDERS)
def test_the_lines_that_screen_and_card_show_load_it(tmp_path: Path, name: str) -> None:
    source, lm = open_model(save_model(tmp_path / "fp", tie_word_embeddings=True))
    blocks = packed_blocks(lm, 4, 64, symmetric=name in NO_ZERO)
    result = write(tmp_path / "an export", lm, source, blocks.__getitem__, layout=form_of(name))
    found: dict[str, Any] = {}
    exec(loading_snippet(result.path, name), found)
    assert found["tokenizer"].encode("hello")
    card = (result.path / "README.md").read_text().partition("## Loading")[2]
    shown = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    here = [lines for lines in shown if "from vllm import" not in lines]  # test_vllm.py loads so
    assert here
    for lines in here:
        found = {}
        exec(lines.replace("path/to/this/directory", str(result.path)), found)
        assert found["model"] is not None


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", [name for name in LOADERS if FORMATS[name].head_bits])
def test_the_loader_computes_with_a_quantized_embedding_and_head(
    name: str, bits: int, tied: bool, tmp_path: Path
) -> None:
    source, lm = open_model(save_model(tmp_path / "fp", tie_word_embeddings=tied))
    blocks, heads = packed_blocks(lm, 3, 64), rounded_heads(lm, bits, 64)
    ids = some_ids(4, 96)
    result = write(
        tmp_path / "out",
        lm,
        source,
        blocks.__getitem__,
        layout=form_of(name),
        dtype="float16",
        heads=heads,
    )
    have, _ = LOADERS[name].load(result.path, ids)
    want = trained_logits(lm, blocks, ids, "float16", heads)
    assert ((have - want).abs().max() / want.std()).item() < 0.1
    other = trained_logits(lm, blocks, ids, "float16")
    assert (have - want).abs().mean() < 0.5 * (have - other).abs().mean(), "it has the original head"
