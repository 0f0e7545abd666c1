"""A step that cannot be compiled is slower, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from engine.gpu import compiled
from engine.gpu.compiled import Compiled


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
