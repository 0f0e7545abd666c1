"""GGUF exports by llama.cpp, through llama-cpp-python."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import llama_cpp
import numpy as np

from engine.bench.measuring import HostMemory, Memory, UnknownMemory
from engine.bench.threads import threads
from engine.run.benched import Request


def _on_gpu(device: str) -> bool:
    return device != "cpu" and bool(llama_cpp.llama_supports_gpu_offload())


class LlamaCpp:
    """A model of llama.cpp's."""

    precision = "activations of 8 bits"

    def __init__(self, request: Request) -> None:
        (file,) = Path(request.folder).glob("*.gguf")
        self.device = "gpu" if _on_gpu(request.device) else "cpu"
        self._model = llama_cpp.Llama(
            str(file),
            n_ctx=request.prompt_tokens + request.new_tokens,
            n_threads=threads(),
            n_threads_batch=threads(),
            n_gpu_layers=-1 if _on_gpu(request.device) else 0,
            verbose=False,
        )

    @staticmethod
    def memory(device: str) -> Memory:
        return UnknownMemory() if _on_gpu(device) else HostMemory()

    def prefill(self, prompt: Sequence[int]) -> int:
        self._model.reset()
        return self._read(prompt)

    def decode(self, token: int) -> int:
        return self._read([token])

    def _read(self, tokens: Sequence[int]) -> int:
        self._model.eval(list(tokens))
        found = llama_cpp.llama_get_logits_ith(self._model.ctx, -1)
        size = self._model.n_vocab()
        logits = np.ctypeslib.as_array(ctypes.cast(found, ctypes.POINTER(ctypes.c_float)), shape=(size,))
        return int(logits.argmax())
