"""ONNX exports by ONNX Runtime.

Their graph has no cache of keys and values, so each new token is a pass over all tokens so far: that is what
whoever loads such a file gets, and what is timed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime

from engine.bench.measuring import HostMemory, Memory, UnknownMemory
from engine.bench.threads import threads
from engine.run.benched import Request

CUDA = "CUDAExecutionProvider"


def _on_gpu(device: str) -> bool:
    return device != "cpu" and CUDA in onnxruntime.get_available_providers()


class ONNXRuntime:
    """A session of ONNX Runtime's."""

    precision = "float32"

    def __init__(self, request: Request) -> None:
        self.device = "gpu" if _on_gpu(request.device) else "cpu"
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads()
        providers = [*([CUDA] if _on_gpu(request.device) else []), "CPUExecutionProvider"]
        path = str(Path(request.folder) / "model.onnx")
        self._session = onnxruntime.InferenceSession(path, options, providers=providers)
        self._tokens: list[int] = []

    @staticmethod
    def memory(device: str) -> Memory:
        return UnknownMemory() if _on_gpu(device) else HostMemory()

    def prefill(self, prompt: Sequence[int]) -> int:
        self._tokens = []
        return self._read(prompt)

    def decode(self, token: int) -> int:
        return self._read([token])

    def _read(self, tokens: Sequence[int]) -> int:
        self._tokens += tokens
        ids_1T = np.array([self._tokens], dtype=np.int64)
        inputs = {"input_ids": ids_1T, "attention_mask": np.ones_like(ids_1T)}
        return int(self._session.run(["logits"], inputs)[0][0, -1].argmax())
