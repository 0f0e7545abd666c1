"""What the benchmarks share: shapes of published models, models of random weights, ceilings of the GPU."""

from __future__ import annotations

import copy
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig

from engine.config.grid import Grid
from engine.config.runtime import StoreKind
from engine.data.activations import ActivationStore, make_store
from engine.models.causal_lm import CausalLM
from engine.models.random_weights import RandomReader
from engine.models.source import ModelSource
from engine.process import device_name, package_versions
from engine.quant.packed import PackedBlock, PackedWeight

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""The scripts are for GPUs; on a CPU, with the shape "tiny", they show that they run."""
GIB = 2**30

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 320,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
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


@cache
def random_block(shape: str) -> nn.Module:
    """A block of that shape in host memory, float32. Random weights are slow to draw, so once has to do."""
    return model(SHAPES[shape]).load_block(0, dtype=torch.float32, device=torch.device("cpu"))


def random_store(
    kind: StoreKind, sequences: int, length: int, hidden: int, seed: int, path: Path | None = None
) -> ActivationStore:
    """An activation store with normal numbers."""
    store = make_store(kind, (sequences, length, hidden), dtype(), DEVICE, path)
    generator = torch.Generator(DEVICE).manual_seed(seed)
    for row in range(sequences):
        store.write(row, torch.randn(1, length, hidden, device=DEVICE, generator=generator).to(dtype()))
    return store


def packed_like(block: nn.Module, names: Sequence[str], grid: Grid | None = None) -> PackedBlock:
    """Random integers in the shapes of a block's linears, of 2 bits in groups of 64 where no ``grid`` is
    named."""
    grid, linears, whole = grid or Grid(2, 64), {}, (-(2**31), 2**31 - 1)
    for name in names:
        linear = block.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        out, inputs = linear.weight.shape
        linears[name] = PackedWeight(
            torch.randint(*whole, (out, inputs * grid.bits // 32), dtype=torch.int32, device=DEVICE),
            torch.full((out, grid.groups(inputs)), 0.8 * inputs**-0.5, dtype=torch.float16, device=DEVICE),
            torch.full((out, grid.groups(inputs)), grid.top // 2, dtype=torch.uint8, device=DEVICE),
            grid,
        )
    return PackedBlock(linears, {})


@cache
def packed_block(shape: str) -> nn.Module:
    """:func:`random_block` on the device, its linears :func:`packed_like`."""
    block = copy.deepcopy(random_block(shape)).to(DEVICE, dtype())
    return packed_like(block, model(SHAPES[shape]).linear_names(0)).install(block)


def model(
    shape: dict[str, int], device: torch.device | None = None, *, blocks: int = 1, vocabulary: int = 1024
) -> CausalLM:
    """A Llama of that shape with random weights; its blocks do not exist until they are loaded."""
    config = LlamaConfig(
        num_hidden_layers=blocks, vocab_size=vocabulary, max_position_embeddings=4096, **shape
    )
    config._attn_implementation = "sdpa"
    source = ModelSource("random", "random", config, RandomReader(config))
    device = device or DEVICE
    return CausalLM(source, device, dtype(device))


def compile_passages(lm: CausalLM) -> None:
    """As in a long run; one that cannot be compiled must not be measured as one that is."""
    told = Marks()
    lm.compile(expect_silence=told.expect_silence, on_failure=lambda why: told.warning("compile", why))


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


class Marks:
    """What a training talks to; marks every step on the GPU's own time line."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def due(self) -> bool:
        return False

    def wants_state(self) -> bool:
        return False

    def step_boundary(self, state: Any) -> None:
        self.events.append(mark())

    def warning(self, code: str, message: str, hint: str = "") -> None:
        """A form that silently becomes a slower one must not be measured."""
        raise RuntimeError(message)

    def leave_if_asked(self) -> None: ...

    def expect_silence(self, seconds: float) -> None: ...

    def metric(self, **values: Any) -> None: ...

    def steps(self, skip: int = 8) -> list[float]:
        """Milliseconds of every step but the first ones."""
        synchronize()
        marks = self.events[min(skip, max(0, len(self.events) - 3)) :]
        return [between(a, b) for a, b in itertools.pairwise(marks)]


class Profiled(Marks):
    """Lists what a step in the middle spends the GPU's time on."""

    def __init__(self, at: int | None) -> None:
        super().__init__()
        self._at = at
        self._profile = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])

    def step_boundary(self, state: object) -> None:
        super().step_boundary(state)
        if len(self.events) == self._at:
            synchronize()
            self._profile.start()
        elif self._at is not None and len(self.events) == self._at + 1:
            synchronize()
            self._profile.stop()
            key = "self_device_time_total" if DEVICE.type == "cuda" else "self_cpu_time_total"
            print(self._profile.key_averages().table(sort_by=key, row_limit=50, max_name_column_width=60))


def synchronize() -> None:
    """Wait for the device."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def mark() -> Any:
    """A moment on the device's time line."""
    if DEVICE.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(begin: Any, end: Any) -> float:
    """Milliseconds between two marks that have passed."""
    return 1e3 * (end - begin) if isinstance(begin, float) else float(begin.elapsed_time(end))


def seconds(work: Callable[[], object]) -> float:
    """How long ``work`` takes, what it has the device do included."""
    synchronize()
    begun = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - begun


def milliseconds(work: Callable[[], object], repeat: int = 20) -> float:
    """Median time of ``work`` on the device."""
    for _ in range(3):
        work()
    times = []
    for _ in range(repeat):
        begin = mark()
        work()
        end = mark()
        synchronize()
        times.append(between(begin, end))
    return statistics.median(times)


def reset_peak() -> None:
    """Forget the peak of allocated memory."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib(beside: int = 0) -> float:
    """Peak of allocated GPU memory, without ``beside`` bytes."""
    return (torch.cuda.max_memory_allocated() - beside) / GIB if DEVICE.type == "cuda" else 0.0


def allocated() -> int:
    """Bytes of GPU memory in use."""
    return torch.cuda.memory_allocated() if DEVICE.type == "cuda" else 0


def median_of(values: Sequence[float], form: str = ".2f") -> str:
    """For a table: the median, and the range of what was repeated."""
    middle = format(statistics.median(values), form)
    if len(values) < 2:
        return middle
    return f"{middle} ({min(values):{form}} to {max(values):{form}})"


@cache
def matrix_rate() -> float:
    """FLOP/s of a large product of random numbers, bfloat16 on a GPU; for half a second, after which a GPU
    that has reached its power limit is slower than in the first moment."""
    size = 8192 if DEVICE.type == "cuda" else 512
    a, b = (torch.randn(size, size, device=DEVICE).to(dtype()) for _ in range(2))
    return 2 * size**3 / milliseconds(lambda: a @ b, repeat=400 if DEVICE.type == "cuda" else 20) * 1e3


@cache
def bandwidth() -> float:
    """Bytes/s of a large copy, read and written bytes counted."""
    source = torch.randn(1 << (29 if DEVICE.type == "cuda" else 22), device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / milliseconds(lambda: target.copy_(source)) * 1e3


def dtype(device: torch.device | None = None) -> torch.dtype:
    """Of the arithmetic on a device, by default on the one that is measured."""
    return torch.bfloat16 if (device or DEVICE).type == "cuda" else torch.float32


@cache
def attention_ms(batch: int, heads: int, kv_heads: int, length: int, head_dim: int, backward: bool) -> float:
    """Causal attention by torch's fastest kernel, and with ``backward`` its gradients."""
    q, k, v = (
        torch.randn(batch, n, length, head_dim, device=DEVICE).to(dtype()).requires_grad_(backward)
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
    return f"{rate:.4g} TFLOP/s in a large product, {copy:.3g} TB/s in a copy"


def where() -> str:
    """Device and versions."""
    packages = package_versions()
    versions = ", ".join(
        f"{name} {packages[name]}" for name in ("torch", "transformers", "triton") if name in packages
    )
    return f"{device_name(DEVICE)}; {versions}; {ceilings()}"


def table(header: str, rows: list[list[str]]) -> None:
    """In Markdown."""
    names = [name.strip() for name in header.split("|")]
    print("| " + " | ".join(names) + " |")
    print("|" + "---|" * len(names))
    for row in rows:
        print("| " + " | ".join(row) + " |")
