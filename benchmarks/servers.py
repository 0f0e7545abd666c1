"""What servers multiply with: Humming's kernel on the words that our exports hold.

    pip install humming-kernels==0.1.19
    python benchmarks/servers.py Llama-2-7B --bits 2 3 4 --groups 64 128 --rows 1 16 512

Humming is vLLM's only kernel for asymmetric groups of 2 and 3 bits. Each linear is written by the layout of a
format, as an export would have it, handed to Humming under that format's own description, and multiplied with
random activations. "error" is the largest difference to the product with the dequantized weight in float32,
relative to its largest entry; "fp16" is torch's product with the dequantized weight. Both are timed inside a
recorded graph of 20 products, since a single launch takes longer than a small product; the weights of 20
copies, more than a cache holds, take turns. A width that Humming refuses has its words in place of a time.

Without a GPU or without Humming, only the words are made: a shape that a layout cannot write is seen then.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from common import DEVICE, SHAPES, milliseconds, table, where

from engine.config.grid import Grid
from engine.export.layout import Linear, layout_of
from engine.quant.packed import PackedWeight

IN_GRAPH = 20
"""Products in one graph."""
HUMMING = DEVICE.type == "cuda" and importlib.util.find_spec("humming") is not None


def random_weight(outputs: int, inputs: int, grid: Grid, seed: int) -> PackedWeight:
    """Integers and zero points over the whole grid, its ends included."""
    generator = torch.Generator().manual_seed(seed)
    top, groups = grid.top, grid.groups(inputs)
    codes = torch.randint(0, top + 1, (outputs, inputs), generator=generator)
    scale = 0.5 + torch.rand(outputs, groups, generator=generator)
    zero = torch.randint(0, top + 1, (outputs, groups), generator=generator)
    return PackedWeight.from_codes(codes, scale * inputs**-0.5 / top, zero, grid)


def described(format: str, weight: PackedWeight) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """How Humming is told what a linear of ``format`` is, and the tensors of it."""
    layout = layout_of(format)
    tensors = {name.removeprefix("x."): tensor for name, tensor in layout.tensors("x", weight)}
    config = layout.config({"x": Linear.of(weight)})
    if format == "compressed-tensors":
        (group,) = config["config_groups"].values()
        known = ("num_bits", "type", "symmetric", "strategy", "group_size", "actorder")
        weights = {key: value for key, value in group["weights"].items() if key in known}
        return {"quant_method": "compressed-tensors", "format": config["format"], **weights}, tensors
    known = ("quant_method", "bits", "group_size", "desc_act", "sym")
    return {key: config[key] for key in known}, tensors


def server(format: str, weight: PackedWeight) -> Callable[[Tensor], Tensor]:
    """Humming's product with a linear of ``format``."""
    from humming.layer import HummingLayer

    config, tensors = described(format, weight)
    layer = HummingLayer(
        shape_n=weight.out_features,
        shape_k=weight.in_features,
        weight_config=config,
        torch_dtype=torch.float16,
    ).cuda()
    layer.load_from_tensors({name: tensor.cuda() for name, tensor in tensors.items()})
    layer.transform()
    return layer


def in_graph(products: Sequence[Callable[[Tensor], Tensor]], x: Tensor) -> float:
    """Microseconds of one product, of those that are recorded one behind the other."""
    for product in products:
        product(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for product in products:
            product(x)
    return milliseconds(graph.replay) / len(products) * 1e3


def measured(format: str, weight: PackedWeight, rows: Sequence[int], copies: int) -> list[list[str]]:
    """A line of the table for each number of rows."""
    head = [format, str(weight.bits), str(weight.group_size), f"{weight.out_features} x {weight.in_features}"]
    dense = weight.dequantize(torch.float32).to(DEVICE)
    if not HUMMING:
        described(format, weight)
        return [[*head, str(count), "not run", "-", "-"] for count in rows]
    try:
        served = [server(format, weight) for _ in range(copies)]
        served[0](torch.zeros(1, weight.in_features, device=DEVICE, dtype=torch.float16))  # it refuses late
    except Exception as error:  # of whatever kind: what it refuses is a result
        return [[*head, "-", f"refused: {type(error).__name__} {str(error).strip()[:60]}", "-", "-"]]
    halves = [dense.half().clone() for _ in range(copies)]
    lines = []
    for count in rows:
        x = torch.randn(count, weight.in_features, device=DEVICE, dtype=torch.float16)
        wanted = x.float() @ dense.t()
        error = (served[0](x).float() - wanted).abs().max() / wanted.abs().max()
        ours = in_graph(served, x)
        theirs = in_graph([lambda x, half=half: x @ half.t() for half in halves], x)
        lines.append(
            [*head, str(count), f"{error:.1e}", f"{ours:.1f}", f"{theirs:.1f}, x {theirs / ours:.2f}"]
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--formats", nargs="+", default=["gptq_v2", "compressed-tensors"])
    parser.add_argument("--bits", nargs="+", type=int, default=[2, 3, 4])
    parser.add_argument("--groups", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 16, 512])
    given = parser.parse_args()
    shape = SHAPES[given.shape]
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    rows: list[list[str]] = []
    for format in given.formats:
        for bits in given.bits:
            for group in given.groups:
                for outputs, inputs in ((inner, hidden), (hidden, inner)):
                    if inputs % group == 0:
                        weight = random_weight(outputs, inputs, Grid(bits, group), bits * group)
                        rows += measured(format, weight, given.rows, IN_GRAPH)
    table("format | bits | group | out x in | rows | error | Humming, µs | fp16, µs", rows)
    print(f"\n{where()}; humming-kernels {_version()}; float16")


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("humming-kernels")
    except PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    main()
