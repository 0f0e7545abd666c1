"""The safetensors layout, for writing tensors without a second copy of them in memory.

    u64 header length | JSON header: name -> dtype, shape, offsets | tensor bytes

The library's own writer makes a copy of everything first. A checkpoint of a training is gigabytes, and it is
written beside that training.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from engine.architecture.headers import ALIGNMENT
from engine.models.weights import TYPE_NAMES

CHUNK_BYTES = 64 << 20


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The tensor's elements in row-major order, little-endian, without a copy when it is on the host."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    data: memoryview = flat.view(torch.uint8).numpy().data
    return data


def safetensors_chunks(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file of ``tensors`` (on the host), piece by piece; equal ones for equal
    tensors.

    Wide elements come first, so that every tensor lies at a multiple of its element size.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {}
    offset = 0
    for name in names:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": TYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % ALIGNMENT)
    yield len(encoded).to_bytes(8, "little") + encoded
    for name in names:
        data = tensor_bytes(tensors[name])
        for start in range(0, len(data), CHUNK_BYTES):
            yield data[start : start + CHUNK_BYTES]
