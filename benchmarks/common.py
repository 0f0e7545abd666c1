"""What the benchmarks share: shapes of published models, models of random weights, ceilings of the GPU."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch.nn import functional
from transformers import LlamaConfig

from engine.models.causal_lm import CausalLM
from engine.models.random_weights import RandomReader
from engine.models.source import ModelSource
from engine.setup import device_name, package_versions

SHAPES: dict[str, dict[str, int]] = {
    "SmolLM2-135M": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "Llama-2-7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32},
    "Llama-3-8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "Llama-2-13B": {"hidden_size": 5120, "intermediate_size": 13824, "num_attention_heads": 40},
    "Llama-2-70B": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}


def model(
    shape: dict[str, int], device: torch.device, *, blocks: int = 1, vocabulary: int = 1024
) -> CausalLM:
    """A Llama of that shape with random weights; its blocks do not exist until they are loaded."""
    config = LlamaConfig(
        num_hidden_layers=blocks, vocab_size=vocabulary, max_position_embeddings=4096, **shape
    )
    config._attn_implementation = "sdpa"
    source = ModelSource("random", "random", config, RandomReader(config))
    return CausalLM(source, device, torch.bfloat16 if device.type == "cuda" else torch.float32)


@dataclass(frozen=True)
class Linears:
    """Sizes of a block that floors are made of."""

    weights: int
    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, shape: dict[str, int]) -> Linears:
        hidden, inner, heads = shape["hidden_size"], shape["intermediate_size"], shape["num_attention_heads"]
        kv_heads = shape.get("num_key_value_heads", heads)
        kv = hidden // heads * kv_heads
        return cls(
            2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inner, heads, kv_heads, hidden // heads
        )


def milliseconds(work: Callable[[], object], repeat: int = 20) -> float:
    """Median time of ``work`` on the GPU."""
    for _ in range(3):
        work()
    times = []
    for _ in range(repeat):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


@cache
def matrix_rate() -> float:
    """FLOP/s of a large bfloat16 product of random numbers."""
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    return 2 * 8192**3 / milliseconds(lambda: a @ b) * 1e3


@cache
def bandwidth() -> float:
    """Bytes/s of a large copy, read and written bytes counted."""
    source = torch.randn(1 << 29, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / milliseconds(lambda: target.copy_(source)) * 1e3


@cache
def attention_ms(batch: int, heads: int, kv_heads: int, length: int, head_dim: int, backward: bool) -> float:
    """Causal attention by torch's fastest kernel, and with ``backward`` its gradients."""
    q, k, v = (
        torch.randn(batch, n, length, head_dim, device="cuda").bfloat16().requires_grad_(backward)
        for n in (heads, kv_heads, kv_heads)
    )

    def work() -> None:
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != kv_heads)
        if backward:
            torch.autograd.grad(out, (q, k, v), out.detach())

    return milliseconds(work)


def ceilings() -> str:
    """For the line below a table."""
    rate, copy = matrix_rate() / 1e12, bandwidth() / 1e12
    return f"{rate:.0f} TFLOP/s in a bfloat16 product of 8192^3, {copy:.2f} TB/s in a copy"


def where() -> str:
    """Device and versions."""
    packages = package_versions()
    versions = ", ".join(
        f"{name} {packages[name]}" for name in ("torch", "transformers", "triton") if name in packages
    )
    return f"{device_name(torch.device('cuda'))}; {versions}; {ceilings()}"


def table(header: str, rows: list[list[str]]) -> None:
    """In Markdown."""
    names = [name.strip() for name in header.split("|")]
    print("| " + " | ".join(names) + " |")
    print("|" + "---|" * len(names))
    for row in rows:
        print("| " + " | ".join(row) + " |")
