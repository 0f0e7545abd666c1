"""Compiling what is done many times, where that pays: training steps, and streams passing through blocks.

A block's step is some hundred small kernels around a few large matrix products. torch.compile fuses the small
ones: fake quantization reads and writes each weight once, the loss never leaves the registers. The first call
costs half a minute, and every block of the same shapes uses what the first one compiled.

A function that cannot be compiled here (no compiler for the host's part, a model whose code resists) is not
an error: the plain one takes its place, and the run says so once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

COMPILER = ("torch._dynamo", "torch._inductor", "triton")
COMPILING_SECONDS = 900.0
"""For which a slow machine may be silent."""
FORMS = 32
"""Of one function that are kept: for different shapes, kinds of layers, kinds of weights. torch gives up
compiling after 8 of them."""
SWITCH_HINT = "runtime.compile=off does not try"
"""For warnings that something is slower than it could be."""
P = ParamSpec("P")
T = TypeVar("T")


class Compiled:
    """A function, compiled, that falls back to itself; ``on_failure`` is told why, once.

    ``expect_silence`` is told how many seconds compiling may take: before the first call, and where a
    function has ``many_forms`` before each that looks like none before.
    """

    def __init__(
        self,
        function: Callable[P, T],
        *,
        expect_silence: Callable[[float], None],
        on_failure: Callable[[str], None],
        many_forms: bool = False,
    ) -> None:
        self._plain = function
        self._silence, self._many_forms = expect_silence, many_forms
        self._seen: set[Any] = set()
        self._fast: Callable[..., Any] | None = _compile(function)
        self._on_failure = on_failure

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._fast is not None:
            form = _form((args, kwargs)) if self._many_forms else None  # it walks through all modules
            if form not in self._seen:
                self._seen.add(form)
                self._silence(COMPILING_SECONDS)
            try:
                return self._fast(*args, **kwargs)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                if not _is_the_compilers(error):
                    raise
                self._fast = None
                self._on_failure(str(error).strip().splitlines()[0])
        return self._plain(*args, **kwargs)


@functools.cache
def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    """One compiled function for all blocks: what it compiled for the first serves the others."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, FORMS)
    compiled: Callable[..., Any] = torch.compile(function, dynamic=False)
    return compiled


def _form(value: Any) -> Any:
    """What a compiled form depends on, as far as it shows without asking the compiler."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.dtype
    if isinstance(value, torch.nn.Module):
        return tuple(map(type, value.modules())), frozenset(p.dtype for p in value.parameters())
    if isinstance(value, dict):
        return tuple((name, _form(one)) for name, one in value.items())
    return tuple(map(_form, value)) if isinstance(value, tuple | list) else type(value)


def _is_the_compilers(error: Exception) -> bool:
    """Whether compiling failed, rather than what was compiled."""
    return any(kind.__module__.startswith(COMPILER) for kind in type(error).__mro__)
