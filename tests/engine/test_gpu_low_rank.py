"""LR-QAT on a GPU: compiled and recorded steps are the plain ones, the CPU agrees, no weight stays behind."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from engine_runs import of, run_here
from torch import Tensor

from engine.config.grid import Grid, GridConfig
from engine.config.lr_qat import LRQATConfig
from engine.config.model import ModelConfig
from engine.data.activations import make_store
from engine.methods.blockwise.rtn import round_to_nearest
from engine.methods.network.lr_qat import low_rank_linears, train_factors
from engine.methods.network.network import NetworkData
from engine.methods.network.teacher import Teacher
from engine.models.causal_lm import CausalLM
from engine.models.source import ModelSource
from engine.quant.fake_linear import FakeQuantLinear, latent_linears, steps_of
from engine.quant.low_rank import Kernel, LowRank, LowRankLinear
from engine.quant.slots import slots
from engine.run import events

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def _exact_float32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32, Kernel.on
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, Kernel.on = before


class Listening:
    """Progress that keeps losses and warnings."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.losses: list[float] = []
        self.warnings: list[str] = []

    def due(self) -> bool:
        return True

    def metric(self, *, loss: float, **rest: Any) -> None:
        self.losses.append(loss)

    def warning(self, code: str, message: str, hint: str = "") -> None:
        self.warnings.append(f"{code}: {message}")

    def expect_silence(self, seconds: float) -> None:
        pass

    def leave_if_asked(self) -> None:
        pass


def trained(
    device: torch.device, dtype: torch.dtype, *, fast: bool, recompute: bool = False, **changes: Any
) -> tuple[Tensor, list[float]]:
    """Merged weights in a row, and the losses; ``fast`` with kernels, compiled and recorded."""
    Kernel.on = False
    if fast:
        Kernel.switch_on(device)
    values: dict[str, Any] = {"rank": 8, "micro_batch_size": 2, "lr_factors": 0.02} | changes
    config = LRQATConfig(
        enabled=True, sequences=16, val_sequences=4, sequence_length=32, batch_size=4, epochs=3, **values
    ).resolved(GridConfig(bits=3, group_size=32))
    lm = CausalLM(ModelSource.open(ModelConfig(source="random://tiny-llama")), device, torch.float32)
    grid = GridConfig(bits=3, group_size=32)
    blocks, linears = [], []
    for index in range(lm.blocks):
        original = lm.load_block(index)
        packed = round_to_nearest(lm.load_block(index), lm.linear_names(index), grid)
        latents = {
            slot.name: steps_of(slot.linear().weight.detach(), packed.linears[slot.name].scale)
            for slot in slots(original, packed.linears)
        }
        block = lm.load_block(index, dtype=dtype)
        linears += low_rank_linears(block, latent_linears(block, packed, latents), config, index).values()
        blocks.append(block)
    ids = torch.randint(0, lm.vocab_size, (20, 32), generator=torch.Generator().manual_seed(0))
    store = make_store("device", (20, 32, lm.hidden_size), dtype, device)
    store.write(0, torch.randn(20, 32, lm.hidden_size, generator=torch.Generator().manual_seed(1)))
    heard = Listening(device)
    train_factors(
        *(lm, blocks, NetworkData(ids, 16, Teacher(store)), config),
        seed=0,
        dtype=dtype,
        progress=heard,
        recompute=recompute,
        compiles=fast,
        records=fast,
    )
    assert not heard.warnings
    return torch.cat([linear.freeze().dequantize().flatten().cpu() for linear in linears]), heard.losses


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fast_steps_are_the_plain_ones(dtype: torch.dtype, recompute: bool) -> None:
    plain, losses = trained(GPU, dtype, fast=False, recompute=True)
    fast, fast_losses = trained(GPU, dtype, fast=True, recompute=recompute)
    tolerance = 1e-3 if dtype == torch.float32 else 2e-2
    assert fast_losses == pytest.approx(losses, rel=tolerance)
    assert (fast - plain).norm() < 10 * tolerance * plain.norm()


@pytest.mark.parametrize("form", ["bfloat16", "float16", "fixed", "integer"])
def test_the_cpu_agrees(form: str) -> None:
    here, losses = trained(GPU, torch.float32, fast=True, downcast=form)
    there, other_losses = trained(CPU, torch.float32, fast=False, downcast=form)
    assert losses == pytest.approx(other_losses, rel=2e-3)
    assert (here - there).norm() < 0.02 * there.norm()


@pytest.mark.parametrize("kernel", [False, True])
def test_layers_leave_no_weights_behind_until_the_backward_pass(kernel: bool) -> None:
    """Sixteen layers of 4096 x 4096: their float weights would be 512 MiB in bfloat16."""
    size, count = 4096, 16
    Kernel.on = False
    if kernel:
        Kernel.switch_on(GPU)
    layers = []
    for seed in range(count):
        steps = torch.randn(size, size, device=GPU) * 3
        scale = torch.full((size, 1), 0.001, device=GPU)
        zero = torch.full((size, 1), 8.0, device=GPU)
        linear = FakeQuantLinear(steps, scale, zero, Grid(4, -1), in_steps=True)
        layers.append(LowRankLinear(linear, LowRank(), seed))
        for parameter in (layers[-1].a, layers[-1].b, layers[-1].scale):
            parameter.requires_grad_(True)
        del steps, linear
    x = torch.randn(8, size, device=GPU, dtype=torch.bfloat16, requires_grad=True)
    x.detach() @ x.detach().t()  # what torch keeps for products of matrices
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for layer in layers:
        x = layer(x)
    assert torch.cuda.memory_allocated() - before < 16 << 20
    torch.cuda.reset_peak_memory_stats()
    x.float().sum().backward()
    # One weight at a time: latents and integers in float32, the weight and its gradient in 16 bits.
    assert torch.cuda.max_memory_allocated() - before < 20 * size * size


def test_a_run_on_the_gpu_is_recorded_and_exported(make: Any) -> None:
    run = make(
        **{
            "runtime.device": "cuda",
            "e2e_qp.enabled": False,
            "lr_qat.enabled": True,
            "lr_qat.rank": 8,
            "lr_qat.sequences": 16,
            "lr_qat.sequence_length": 32,
            "lr_qat.batch_size": 4,
        }
    )
    assert run_here(run) == 0
    assert not [warning for warning in of(run, events.Warning) if warning.code == "compile"]
    perplexity = {event.stage: event.perplexity for event in of(run, events.Eval)}
    assert perplexity["lr_qat"] < perplexity["rtn"]
    assert all(export.verified for export in of(run, events.Export))
