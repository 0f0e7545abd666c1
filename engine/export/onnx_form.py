"""ONNX as an export format: what is asked of it before training, and whether the files are what was trained.

The integers, scales and zero points are compared as in any other format, through a reader of their own. The
network, which other formats leave to whoever loads them, is in the files here as well: so ONNX Runtime itself
computes the logits of a few tokens from them, which have to be the trained model's.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from engine.errors import PreflightError
from engine.export.comparing import linear_differences, parts_of
from engine.export.layout import Form, Linears
from engine.export.onnx_graph import HINT, INPUTS, OUTPUT, sketched
from engine.export.onnx_reader import ONNXReader, graph_file
from engine.export.reader import packed_model
from engine.export.stored import dtype_name
from engine.models.carried import CarriedTensor
from engine.models.foreign import foreign
from engine.quant.packed import PackedWeight

if TYPE_CHECKING:
    from engine.models.causal_lm import CausalLM

PREDICTED = 64
"""Tokens that ONNX Runtime is asked about."""
SHORTER = 3
"""By how many tokens the second text of a batch is shorter."""
SAME = 0.01
"""Largest difference of two logits of one token in two rows, in units of their standard deviation."""


class ONNX(Form):
    """A graph with MatMulNBits."""

    tags = ("onnx",)
    library = "onnx"

    def sentence(self, bits: str, dtype: str) -> str:
        return (
            f"The linear layers of the decoder blocks are {bits}-bit integers; embeddings, head and norms "
            f"are {dtype}, and everything is computed in float32."
        )

    def check(self, lm: CausalLM, stored: torch.dtype) -> None:
        self.format.require_libraries()
        graph = sketched(lm)
        with foreign(f"ONNX Runtime cannot run {type(lm.model).__name__}", lm.source.name, HINT):
            session_of(graph.SerializeToString())  # its weights are inputs: nothing is needed for them

    def carried(self, lm: CausalLM) -> list[CarriedTensor]:
        return []

    def reader(self, directory: Path) -> ONNXReader:
        return ONNXReader(directory)

    def open(
        self, directory: Path, device: torch.device, dtype: torch.dtype, *, trust_remote_code: bool = False
    ) -> CausalLM:
        return packed_model(directory, ONNXReader, device, dtype, trust_remote_code=trust_remote_code)

    def declared(self, packed: CausalLM, computed: torch.dtype) -> torch.dtype:
        return torch.float32  # whatever the type of what is not quantized

    def misdescribed(
        self, packed: CausalLM, lm: CausalLM, stored: torch.dtype, linears: Linears
    ) -> Iterator[str]:
        reader = cast("ONNXReader", packed.source.weights)
        for name, linear in linears.items():
            called = self.linear_called(lm, name)
            if called in reader.operators and reader.bits_of(called) != linear.grid.bits:
                yield f"{called} has {reader.bits_of(called)} bits, and {linear.grid.bits} were trained"
        said = packed.source.config.dtype
        if said != stored:
            yield f"config.json declares {dtype_name(said)}, and the tensors are {dtype_name(stored)}"

    def linear_differences(self, packed: CausalLM, name: str, weight: PackedWeight) -> list[str]:
        reader: Any = packed.source.weights
        return linear_differences(reader, name, parts_of(weight))

    def predicted(self, directory: Path, tokens_NT: Tensor) -> Tensor:
        ids_1T = tokens_NT[:1, :PREDICTED].cpu().numpy().astype(np.int64)
        shorter = max(1, ids_1T.shape[1] - SHORTER)
        ids_2T, mask_2T = ids_1T.repeat(2, axis=0), np.ones((2, ids_1T.shape[1]), np.int64)
        ids_2T[1, shorter:], mask_2T[1, shorter:] = 0, 0
        logits = torch.from_numpy(run(directory, ids_2T, mask_2T)).float()
        one, other = logits[0, :shorter], logits[1, :shorter]
        if not (one - other).abs().max() <= SAME * one.std():  # also when it is NaN
            raise PreflightError(
                "a text that is padded has other logits than by itself", where=str(directory)
            )
        return logits[:1]


def run(directory: Path, ids_BT: np.ndarray, mask_BT: np.ndarray) -> np.ndarray:
    """Logits ``[B, T, V]`` by ONNX Runtime, on the CPU."""
    session = session_of(str(graph_file(directory)))
    logits: np.ndarray = session.run([OUTPUT], dict(zip(INPUTS, (ids_BT, mask_BT), strict=True)))[0]
    return logits


def session_of(graph: str | bytes) -> Any:
    """ONNX Runtime with a graph, a file's path or its content, on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors, which are raised as well
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
