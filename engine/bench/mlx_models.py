"""MLX exports by mlx-lm: on Apple's machines their GPU, elsewhere the processor."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm import load
from mlx_lm.models.cache import make_prompt_cache

from engine.bench.measuring import HostMemory, Memory, UnknownMemory
from engine.run.benched import Request


def _on_gpu(device: str) -> bool:
    return device != "cpu" and bool(mx.default_device().type == mx.DeviceType.gpu)


class MLX:
    """A model of mlx-lm's."""

    precision = ""

    def __init__(self, request: Request) -> None:
        self.device = "gpu" if _on_gpu(request.device) else "cpu"
        mx.set_default_device(mx.gpu if _on_gpu(request.device) else mx.cpu)
        self._model, _ = load(request.folder)
        mx.eval(self._model.parameters())
        self._cache: Any = None

    @staticmethod
    def memory(device: str) -> Memory:
        """Apple's GPUs share the memory of the host."""
        return UnknownMemory() if _on_gpu(device) and sys.platform != "darwin" else HostMemory()

    def prefill(self, prompt: Sequence[int]) -> int:
        # As mlx-lm generates: only the last token's logits are wanted.
        self._cache = make_prompt_cache(self._model)
        if len(prompt) > 1:
            self._model(mx.array([list(prompt[:-1])]), cache=self._cache)
            mx.eval([each.state for each in self._cache])
        return self.decode(prompt[-1])

    def decode(self, token: int) -> int:
        logits = self._model(mx.array([[token]]), cache=self._cache)
        return int(mx.argmax(logits[0, -1]).item())
