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
P = ParamSpec("P")
T = TypeVar("T")


class Compiled:
    """A function, compiled, that falls back to itself; ``on_failure`` is told why, once.

    ``expect_silence`` is told before the first call how many seconds compiling may take.
    """

    def __init__(
        self,
        function: Callable[P, T],
        *,
        expect_silence: Callable[[float], None],
        on_failure: Callable[[str], None],
    ) -> None:
        self._plain = function
        self._silence: Callable[[float], None] | None = expect_silence
        self._fast: Callable[..., Any] | None = _compile(function)
        self._on_failure = on_failure

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._fast is not None:
            if self._silence is not None:
                self._silence(COMPILING_SECONDS)
                self._silence = None
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


def _is_the_compilers(error: Exception) -> bool:
    """Whether compiling failed, rather than what was compiled."""
    return any(kind.__module__.startswith(COMPILER) for kind in type(error).__mro__)
