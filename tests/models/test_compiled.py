"""A step that cannot be compiled is slower, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from engine.config.grid import GridConfig
from engine.gpu import compiled
from engine.gpu.compiled import Compiled
from engine.methods.blockwise.reconstruction import reconstruction_loss
from engine.methods.network.head_loss import tail_loss
from engine.models.causal_lm import block_forward
from engine.models.skeleton import linear_names
from engine.quant.fake_linear import wrap_linears


def twice(x: Tensor) -> Tensor:
    return 2 * x


class Told:
    def __init__(self) -> None:
        self.silences: list[float] = []
        self.failures: list[str] = []

    def function(self) -> Compiled:
        return Compiled(twice, expect_silence=self.silences.append, on_failure=self.failures.append)


def refusing(error: Exception, monkeypatch: pytest.MonkeyPatch) -> Told:
    """Compiled functions raise ``error`` when they are called."""

    def compile_(function: object) -> object:
        def fast(x: Tensor) -> Tensor:
            raise error

        return fast

    monkeypatch.setattr(compiled, "_compile", compile_)
    return Told()


def test_a_compiler_that_fails_is_told_once_and_the_plain_function_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torch._dynamo.exc import InternalTorchDynamoError

    told = refusing(InternalTorchDynamoError("no compiler here\nand more"), monkeypatch)
    function = told.function()
    for _ in range(3):
        assert torch.equal(function(torch.ones(2)), torch.full((2,), 2.0))
    assert told.failures == ["no compiler here"]
    assert len(told.silences) == 1


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), ValueError("of the function itself")])
def test_what_the_function_raises_is_not_hidden(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    told = refusing(error, monkeypatch)
    with pytest.raises(type(error)):
        told.function()(torch.ones(2))
    assert told.failures == []


def test_whatever_may_be_compiled_is_announced_and_nothing_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_compile", lambda function: function)
    silences: list[float] = []

    def call(module: nn.Module, x: Tensor, options: dict[str, Tensor]) -> Tensor:
        return x

    function = Compiled(call, expect_silence=silences.append, on_failure=pytest.fail, many_forms=True)
    plain, other = nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Identity())
    for _ in range(2):
        function(plain, torch.ones(2), {"mask": torch.ones(1)})
    assert len(silences) == 1
    for new in (
        (other, torch.ones(2), {"mask": torch.ones(1)}),
        (plain, torch.ones(3), {"mask": torch.ones(1)}),
        (plain, torch.ones(2).double(), {"mask": torch.ones(1)}),
        (plain, torch.ones(2), {"mask": torch.ones(2)}),
        (nn.Sequential(nn.Linear(2, 2).double()), torch.ones(2), {"mask": torch.ones(1)}),
    ):
        before = len(silences)
        for _ in range(2):
            function(*new)
        assert len(silences) == before + 1


def traced(function: Callable[..., Tensor], *arguments: object) -> list[torch.fx.GraphModule]:
    """What torch.compile makes of a call, before anything is compiled."""
    found: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        found.append(graph)
        return graph.forward

    torch._dynamo.reset()
    with torch.autocast("cpu", torch.bfloat16):
        torch.compile(function, dynamic=False, backend=keep)(*arguments)
    return found


def test_the_next_process_finds_what_this_one_compiles() -> None:
    """torch keeps what it made of a graph only where it knows every function in it."""
    from torch._functorch._aot_autograd.autograd_cache import BypassAOTAutogradCache, check_cacheable

    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    model = LlamaForCausalLM(config)
    block, hidden = model.model.layers[0], torch.randn(2, 8, 64)
    arguments = {"position_embeddings": model.model.rotary_emb(hidden, torch.arange(8)[None])}
    grids = GridConfig(bits=2, group_size=64).of_each(linear_names(block))
    for linear in wrap_linears(block, grids).values():
        linear.quantized = nn.Parameter(linear.weight.detach().clone())  # as the fast steps have them
    labels = torch.arange(8)
    for function, given in (
        (reconstruction_loss, (block, hidden, arguments, hidden, "mse")),
        (partial(reconstruction_loss, drop=0.1), (block, hidden, arguments, hidden, "token_relative_mse")),
        (block_forward, (block, hidden.requires_grad_(True), arguments)),
        (tail_loss, (model.model.norm, model.lm_head, hidden[0], labels, hidden[1])),
    ):
        (graph,) = traced(function, *given)
        check_cacheable(graph)

    def enters(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return x @ x

    (graph,) = traced(enters, torch.ones(2, 2))
    with pytest.raises(BypassAOTAutogradCache, match="autocast"):
        check_cacheable(graph)
