"""An export as an ONNX graph, which ONNX Runtime loads, with its tensors in files beside it.

    model.onnx        the graph (:mod:`engine.export.onnx_graph`), and where each tensor lies
    model.onnx.data   the tensors one after another; of large models more files, model.onnx.data.2, ...

One quantized linear of N outputs, K inputs and groups of ``block_size``, all integers the trained ones::

    qweight  uint8    [N, G, block_size*b/8]   a little-endian bit stream along each group
    scales   float16  [N, G]
    qzeros   uint8    [N, ceil(G*b/8)]         a little-endian bit stream along the groups of a row; left out
                                               of symmetric grids, whose zero point is what the operator takes
                                               without one
    bias              [N]                      if the layer has one

    w[n, k] = (q[n, k] - z[n, g]) * s[n, g],   g = k // block_size

Blocks are asked for one at a time and appended, so an export holds one block; the graph, which is small, is
written when it is known where everything lies. Tokenizer and configuration lie beside it as in a folder of
Hugging Face's form. A graph has no place for tensors that it does not compute with, so what a checkpoint
holds besides the model stays behind.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import Tensor

from engine.checkpoints.tensorfile import tensor_bytes
from engine.export.card import model_card
from engine.export.checkpoint import (
    Export,
    block_buffers,
    blocks_name,
    each_block,
    outer_names,
    write_assets,
    write_card,
)
from engine.export.layout import Linear, finite_scale
from engine.export.onnx_graph import finished, traced
from engine.export.result import ExportResult
from engine.export.shards import write_durably
from engine.export.stored import dtype_name, stored_form
from engine.quant.packed import PackedWeight

if TYPE_CHECKING:
    from engine.models.causal_lm import CausalLM

MODEL, DATA = "model.onnx", "model.onnx.data"
ALIGNMENT = 64
_TYPES = {
    torch.float32: "FLOAT",
    torch.float16: "FLOAT16",
    torch.bfloat16: "BFLOAT16",
    torch.float64: "DOUBLE",
    torch.uint8: "UINT8",
    torch.int8: "INT8",
    torch.int16: "INT16",
    torch.int32: "INT32",
    torch.int64: "INT64",
    torch.bool: "BOOL",
}

_LOADING = """## Loading

An ONNX graph whose {bits}-bit linears are the operator `MatMulNBits` (com.microsoft), for ONNX Runtime
(`pip install onnxruntime transformers`): token numbers and their mask go in, of any batch and length, and
logits come out. It computes in float32; scales are stored in float16 as they were trained, and nothing was
rounded again. It keeps no cache of keys and values.

```python
import numpy as np
import onnxruntime
from transformers import AutoTokenizer

path = "path/to/this/directory"
tokenizer = AutoTokenizer.from_pretrained(path)
model = onnxruntime.InferenceSession(f"{{path}}/model.onnx")
ids = tokenizer("The capital of France is", return_tensors="np")["input_ids"]
for _ in range(16):
    mask = np.ones_like(ids)
    logits = model.run(["logits"], {{"input_ids": ids, "attention_mask": mask}})[0]
    ids = np.concatenate([ids, logits[:, -1:].argmax(-1)], axis=1)
print(tokenizer.decode(ids[0]))
```
"""


def write_file(export: Export, directory: Path) -> ExportResult:
    """The graph, its tensors, configuration, tokenizer and card, into the empty ``directory``."""
    lm, dtype = export.lm, export.stored_as
    graph = traced(lm, stored_buffers(lm))
    linears: dict[str, Linear] = {}
    names: dict[str, str] = {}
    packed = 0
    data = _Data(directory, export.shard_bytes)
    try:
        for name in outer_names(lm):
            names[name] = lm.names.exported(name)
            data.add(names[name], stored_form(name, lm.weights.load(name), dtype))
        for index, block in each_block(export):
            prefix = lm.block_prefix(index)
            for name, weight in block.linears.items():
                full = f"{prefix}.{name}"
                names[full], linears[full] = lm.names.exported_linear(full), Linear.of(weight)
                packed += sum(data.add(key, part) for key, part in tensors_of(names[full], weight))
            others = {f"{prefix}.{name}": tensor for name, tensor in block.others.items()}
            others |= {name: lm.weights.load(name) for name in block_buffers(lm, index)}
            for name, tensor in others.items():
                names[name] = lm.names.exported(name)
                data.add(names[name], stored_form(name, tensor, dtype))
        files = data.close()
    except BaseException:
        data.abandon()
        raise
    finished(graph, linears, data.described, names)
    write_durably(directory / MODEL, graph.SerializeToString(deterministic=True))
    dropped = write_assets(directory, lm, export.source, dtype=dtype, described={})
    weights = sum(each.out_features * each.in_features for each in linears.values())
    result = ExportResult(
        path=directory,
        format=export.form.format.name,
        bytes=sum(path.stat().st_size for path in files),
        fp_bytes=lm.fp_bytes(),
        bits_per_weight=8 * packed / max(1, weights),
        files=(MODEL, *(path.name for path in files)),
        blocks_name=blocks_name(lm),
        dropped_code=dropped,
        dtype=dtype_name(dtype),
    )
    bits = " and ".join(map(str, sorted({each.grid.bits for each in linears.values()})))
    loading = _LOADING.format(bits=bits)
    write_card(directory, model_card(export.card, result, linears, form=export.form, loading=loading))
    return result


def stored_buffers(lm: CausalLM) -> list[str]:
    """Buffers that a checkpoint stores, by the model's names."""
    parameters = lm.outer_state()
    outer = [name for name in outer_names(lm) if name not in parameters]
    return outer + [name for index in range(lm.blocks) for name in block_buffers(lm, index)]


def tensors_of(linear: str, weight: PackedWeight) -> Iterator[tuple[str, Tensor]]:
    """Name and content of the tensors of a quantized linear that the files call ``linear``."""
    outputs, groups = weight.scale.shape
    yield f"{linear}.qweight", weight.words.contiguous().view(torch.uint8).reshape(outputs, groups, -1)
    yield f"{linear}.scales", finite_scale(linear, weight)
    if not weight.grid.symmetric:
        yield f"{linear}.qzeros", _packed_zeros(weight)


def _packed_zeros(weight: PackedWeight) -> Tensor:
    """Zero points ``[N, G]`` as whole bytes a row; what is left of the last one is zero."""
    each = 8 // weight.bits
    zero = weight.zero_point.cpu().to(torch.int32)
    zero = torch.nn.functional.pad(zero, (0, -zero.shape[1] % each))
    shifts = torch.arange(each, dtype=torch.int32) * weight.bits
    return (zero.reshape(len(zero), -1, each) << shifts).sum(-1).to(torch.uint8)


class _Data:
    """Appends tensors to files of at most ``most`` bytes each (one tensor may be larger), and says where
    each lies."""

    def __init__(self, directory: Path, most: int) -> None:
        self.directory, self.most = directory, most
        self.described: dict[str, Any] = {}
        """Of every tensor what the graph says of it, a ``TensorProto``."""
        self._files: list[Path] = []
        self._open: BinaryIO | None = None

    def add(self, name: str, tensor: Tensor) -> int:
        """Append one tensor; the bytes that it takes."""
        assert name not in self.described, f"tensor {name} is written twice"
        content = tensor_bytes(tensor)
        file, start = self._place(content.nbytes)
        file.write(content)
        self.described[name] = self._description(name, tensor, start, content.nbytes)
        return content.nbytes

    def close(self) -> list[Path]:
        """Wait until the disk has everything; the files, in order."""
        self._finish()
        return self._files

    def abandon(self) -> None:
        """Close the open file; the caller removes the directory."""
        if self._open is not None:
            with suppress(OSError):  # closing writes what is buffered, which a full disk refuses once more
                self._open.close()

    def _place(self, size: int) -> tuple[BinaryIO, int]:
        """The file for a tensor of that size, and where in it the next one begins."""
        if self._open is not None:
            start = self._open.tell()
            padding = -start % ALIGNMENT
            if start + padding + size <= self.most:
                self._open.write(bytes(padding))
                return self._open, start + padding
            self._finish()
        number = len(self._files) + 1
        self._files.append(self.directory / (DATA if number == 1 else f"{DATA}.{number}"))
        self._open = self._files[-1].open("wb")
        return self._open, 0

    def _finish(self) -> None:
        if self._open is not None:
            self._open.flush()
            os.fsync(self._open.fileno())
            self._open.close()
            self._open = None

    def _description(self, name: str, tensor: Tensor, start: int, size: int) -> Any:
        from onnx import StringStringEntryProto, TensorProto

        lies = {"location": self._files[-1].name, "offset": str(start), "length": str(size)}
        return TensorProto(
            name=name,
            data_type=TensorProto.DataType.Value(_TYPES[tensor.dtype]),
            dims=list(tensor.shape),
            data_location=TensorProto.EXTERNAL,
            external_data=[StringStringEntryProto(key=key, value=value) for key, value in lies.items()],
        )
