"""Reading an ONNX export back, from what the format's own documents say: the onnx package parses the graph,
numpy unpacks bytes. Nothing of what wrote the files is used.

The graph says what is a quantized linear (each operator ``MatMulNBits``, with the tensors it is handed), and
where every tensor lies: in a file beside it, or in the graph itself. So files of other programs are read as
well, whatever they call their tensors; what :class:`ONNXReader` calls a linear is the name of its integers.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.config.formats import FORMATS
from engine.errors import PreflightError
from engine.export.reader import (
    CheckpointReader,
    Entry,
    PlainLinear,
    damaged,
    regular_groups,
)
from engine.system.guarded import NoFile, bad_file, open_regular, parsed, read_bytes

LARGEST_GRAPH = (1 << 31) - 1
"""Bytes of a message that protobuf reads."""
BITS = (2, 4, 8)
_STORED = {
    1: "F32",
    2: "U8",
    3: "I8",
    5: "I16",
    6: "I32",
    7: "I64",
    9: "BOOL",
    10: "F16",
    11: "F64",
    16: "BF16",
}
"""Types of tensors by ONNX's number, in the words of the other readers."""
_TORCH = {
    "F32": torch.float32,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "BOOL": torch.bool,
    "F16": torch.float16,
    "F64": torch.float64,
    "BF16": torch.bfloat16,
}


class Operator(NamedTuple):
    """One quantized linear of a graph: what it is handed, and how it says that this is to be read."""

    integers: str
    scales: str
    zeros: str
    """Empty where it has none."""
    inputs: int
    outputs: int
    bits: int
    block: int

    @property
    def groups(self) -> int:
        return -(-self.inputs // self.block)


class ONNXReader(CheckpointReader):
    """The tensors of a graph by name, and its quantized linears."""

    format = "onnx"
    suffixes = ("qweight", "scales", "qzeros")

    def read_config(self) -> dict[str, Any]:
        try:
            return super().read_config()
        except NoFile:  # which graphs of other programs need not have beside them
            return {}

    def understand(self) -> None:
        FORMATS[self.format].require_libraries(str(self.directory))
        self.path = graph_file(self.directory)
        self.graph = parsed(_parse, read_bytes(self.path, LARGEST_GRAPH), self.path, "ONNX")
        self._inline: dict[str, Any] = {}
        self._tensors = {each.name: each for each in self.graph.initializer}
        made = {node.output[0]: node for node in self.graph.node if len(node.output) == 1}
        self.operators: dict[str, Operator] = {}
        """Quantized linears, by name."""
        for node in self.graph.node:
            if node.op_type == "MatMulNBits":
                operator = parsed(lambda each: self._operator(each, made), node, self.path, "ONNX")
                self.operators[operator.integers.removesuffix(".qweight")] = operator

    def names(self) -> list[str]:
        parts = {name for each in self.operators.values() for name in each[:3]}
        plain = [name for name in self._entries if name not in parts]
        return sorted([*plain, *(f"{linear}.weight" for linear in self.operators)])

    def __contains__(self, name: str) -> bool:
        return name in self._entries or name.removesuffix(".weight") in self.operators

    def is_packed(self, linear: str) -> bool:
        return linear in self.operators

    def parts_of(self, linear: str) -> tuple[str, ...]:
        return tuple(name for name in self._called(linear)[:3] if name)

    def linear(self, prefix: str) -> PlainLinear:
        operator = self._called(prefix)
        outputs, groups, bits = operator.outputs, operator.groups, operator.bits
        if operator.block < 16 or operator.block & (operator.block - 1):
            raise damaged(self.path, f"{prefix} has groups of {operator.block}, no power of 2 from 16 on")
        data = self.stored(operator.integers)
        if data.dtype != torch.uint8 or data.numel() != outputs * groups * (operator.block * bits // 8):
            raise damaged(self.path, f"the integers of {prefix} do not fit its {outputs} outputs")
        codes = _unpacked(data.numpy().reshape(outputs, -1), bits)[:, : operator.inputs]
        scale = self.stored(operator.scales)
        if scale.numel() != outputs * groups:
            raise damaged(self.path, f"the scales of {prefix} do not fit its {groups} groups")
        return PlainLinear(
            torch.from_numpy(np.ascontiguousarray(codes)),
            self._zeros(prefix, operator),
            scale.reshape(outputs, groups),
            regular_groups(operator.inputs, groups),
        )

    def _zeros(self, prefix: str, operator: Operator) -> Tensor:
        outputs, groups, bits = operator.outputs, operator.groups, operator.bits
        if not operator.zeros:
            return torch.full((outputs, groups), 1 << (bits - 1), dtype=torch.uint8)
        zeros = self.stored(operator.zeros)
        if zeros.dtype == torch.uint8 and zeros.numel() == outputs * -(-groups * bits // 8):
            rows = _unpacked(zeros.numpy().reshape(outputs, -1), bits)[:, :groups]
            return torch.from_numpy(np.ascontiguousarray(rows))
        raise damaged(self.path, f"the zero points of {prefix} do not fit its {groups} groups")

    def linear_shape(self, prefix: str) -> tuple[int, int]:
        operator = self._called(prefix)
        return operator.outputs, operator.inputs

    def bits_of(self, prefix: str) -> int:
        return self._called(prefix).bits

    def files(self) -> list[Path]:
        return sorted({self.path, *super().files()})

    def _called(self, prefix: str) -> Operator:
        if prefix not in self.operators:
            raise PreflightError(f"no operator of the graph has the weight {prefix}", where=str(self.path))
        return self.operators[prefix]

    def _operator(self, node: Any, made: dict[str, Any]) -> Operator:
        """What a node says of itself; a tensor that another node only makes wider is that tensor."""
        said = {each.name: each.i for each in node.attribute}
        handed = [self._origin(name, made) for name in node.input[1:4]]
        integers, scales, zeros = (*handed, "", "", "")[:3]
        for name in filter(None, (integers, scales, zeros)):
            if name not in self._tensors:
                raise ValueError(f"an operand of {node.name[:80]!r} is no stored tensor")
        bits, inputs, outputs, block = (int(said.get(key, 4)) for key in ("bits", "K", "N", "block_size"))
        if bits not in BITS or not inputs > 0 < outputs or block < 1:
            raise ValueError(f"{node.name[:80]!r} has {bits} bits, {inputs} inputs, groups of {block}")
        if len(node.input) > 4 and node.input[4]:
            raise ValueError(f"{node.name[:80]!r} lists the group of each input, which is not read here")
        return Operator(integers, scales, zeros, inputs, outputs, bits, block)

    def _origin(self, name: str, made: dict[str, Any]) -> str:
        node = made.get(name)
        return node.input[0] if node is not None and node.op_type == "Cast" else name

    def _list_tensors(self) -> dict[str, Entry]:
        """Tensors of files beside the graph, and of those in it the operands of quantized linears: the
        others are constants of its arithmetic."""
        parts = {name for each in self.operators.values() for name in each[:3]}
        sizes: dict[Path, int] = {}
        found = {}
        for name, tensor in self._tensors.items():
            kind = _STORED.get(tensor.data_type, str(tensor.data_type))
            dtype, shape = _TORCH.get(kind), tuple(tensor.dims)
            size = int(np.prod(shape, dtype=np.int64)) * (dtype.itemsize if dtype is not None else 0)
            if not tensor.external_data:
                if name in parts:
                    self._inline[name] = tensor
                    found[name] = Entry(self.path, 0, size, shape, kind, dtype)
                continue
            said = {each.key: each.value for each in tensor.external_data}
            place, start, length = self._place(name, said)
            if place not in sizes:
                sizes[place] = _size_of(place)
            if start < 0 or length != size:
                raise damaged(place, f"tensor {name[:80]} lies where it cannot lie")
            if start + length > sizes[place]:
                raise damaged(place, f"it ends inside tensor {name[:80]}")
            found[name] = Entry(place, start, length, shape, kind, dtype)
        return found

    def _place(self, name: str, said: dict[str, str]) -> tuple[Path, int, int]:
        location = said.get("location", "")
        if Path(location).name != location or not location:
            raise damaged(self.path, f"{location[:80]!r}, where {name[:80]} lies, is no file of this folder")
        numbers = [said.get("offset", "0"), said.get("length", "")]
        if not all(each.isascii() and each.isdigit() for each in numbers):
            raise damaged(self.path, f"it does not say where tensor {name[:80]} lies")
        return self.directory / location, int(numbers[0]), int(numbers[1])

    def _bytes(self, name: str) -> bytearray:
        if name not in self._inline:
            return super()._bytes(name)
        return parsed(_inline_bytes, self._inline[name], self.path, "ONNX")


def graph_file(directory: Path) -> Path:
    """The graph in a folder.

    Raises:
        PreflightError: for a folder with none, or with several.
    """
    found = sorted(directory.glob("*.onnx"))
    if len(found) != 1:
        raise PreflightError(f"holds {len(found)} ONNX graphs, not one", where=str(directory))
    return found[0]


def _parse(content: bytes) -> Any:
    import onnx

    graph = onnx.ModelProto.FromString(content).graph
    if not graph.node:
        raise ValueError("there is no graph in it")
    return graph


def _inline_bytes(tensor: Any) -> bytearray:
    from onnx import numpy_helper

    return bytearray(numpy_helper.to_array(tensor).tobytes())


def _size_of(path: Path) -> int:
    try:
        fd = open_regular(path)
    except OSError as error:
        raise bad_file(error, path) from error
    try:
        return os.fstat(fd).st_size
    finally:
        os.close(fd)


def _unpacked(data: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Integers of each row of bytes, the first in the low bits."""
    fields = [(data >> np.uint8(start)) & np.uint8((1 << bits) - 1) for start in range(0, 8, bits)]
    return np.stack(fields, axis=-1).reshape(len(data), -1)
