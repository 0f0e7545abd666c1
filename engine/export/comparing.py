"""What differs between tensors that were written and tensors that were trained, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from engine.errors import EqatError
from engine.export.reader import StoredLinear
from engine.export.stored import dtype_name
from engine.models.carried import CarriedTensor
from engine.quant.packed import PackedWeight


class Stored(Protocol):
    """The tensors of an export, by the names that its format gives them."""

    def stored_names(self) -> list[str]:
        """All of them."""

    def stored(self, name: str) -> Tensor:
        """One that is not quantized."""

    def raw(self, name: str) -> tuple[str, tuple[int, ...], Tensor]:
        """Type, shape and bytes of one that is carried along."""


class StoredLinears(Stored, Protocol):
    """Those of a format whose linears are read back part by part."""

    def linear(self, prefix: str) -> StoredLinear:
        """One quantized linear."""


def parts_of(weight: PackedWeight) -> dict[str, Tensor]:
    """What a reader has to find of a linear, where its format keeps what was trained as it is."""
    return {
        "integers": weight.codes(),
        "zero points": weight.zero_point,
        "scales": weight.scale.to(torch.float16),
        "group indices": torch.arange(weight.in_features, dtype=torch.int32) // weight.group_size,
    }


def linear_differences(reader: StoredLinears, name: str, wanted: Mapping[str, Tensor]) -> list[str]:
    """In words, what of a quantized linear has other bits than the parts that are ``wanted``."""
    try:
        found = reader.linear(name).parts()
    except EqatError as error:
        return [str(error)]
    differences = (difference(found[what], want, what) for what, want in wanted.items())
    return [f"{name}: {words}" for words in differences if words]


def value_differences(reader: Stored, name: str, want: Tensor) -> list[str]:
    """In words, how a tensor that is not quantized differs from what it is to be."""
    try:
        words = difference(reader.stored(name), want, "values")
    except EqatError as error:
        return [str(error)]
    return [f"{name}: {words}"] if words else []


def carried_differences(reader: Stored, want: CarriedTensor) -> list[str]:
    """In words, how a tensor differs from the one that was carried over."""
    try:
        type_name, shape, data = reader.raw(want.name)
    except EqatError as error:
        return [str(error)]
    if (type_name, shape) != (want.dtype, want.shape) or not torch.equal(data, want.raw()):
        return [f"{want.name} is not what was carried over"]
    return []


def difference(have: Tensor, want: Tensor, what: str) -> str:
    """In words, how many elements have other bits and by how much at most; empty where all are the same."""
    want = want.detach().cpu().contiguous()
    if have.shape != want.shape or have.dtype != want.dtype:
        shapes = [f"{dtype_name(tensor.dtype)} {list(tensor.shape)}" for tensor in (have, want)]
        return f"{max(1, want.numel())} {what} differ: {shapes[0]} in place of {shapes[1]}"
    bits = _SAME_SIZE.get(want.dtype)
    # Bits, not values: 0.0 == -0.0 and NaN != NaN would both mislead.
    one, other = (have, want) if bits is None else (have.contiguous().view(bits), want.view(bits))
    different = one != other
    count = int(different.sum())
    if not count:
        return ""
    most = (have[different].double() - want[different].double()).abs().max().item()
    return f"{count} {what} differ, by up to {most:.3g}"


_SAME_SIZE = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}
