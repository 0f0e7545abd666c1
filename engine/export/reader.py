"""A plain reader of packed directories, which shares no packing code with what writes them: an error made
twice would otherwise pass unseen.

Here is what every format has in common: safetensors files, found by their index and read one tensor at a
time (:mod:`engine.export.unpacking` has the words that integers lie in). How a quantized linear lies in the
files is the format's (:meth:`CheckpointReader.linear`).

:class:`CheckpointReader` serves the same questions as the readers of full-precision checkpoints (``names``,
``shape``, ``load``), answering with dequantized float32 weights, so that a packed directory can be opened
as a model: see :class:`PackedSource`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Protocol, cast

import msgspec
import torch
from safetensors import safe_open
from torch import Tensor

from engine.architecture.limits import check_config
from engine.architecture.model_folder import unlinked
from engine.config.grid import BITS
from engine.system.guarded import (
    LARGE,
    SMALL,
    BadFile,
    NoFile,
    bad_file,
    open_regular,
    parsed,
    read_object,
    read_struct,
)

if TYPE_CHECKING:
    from engine.models.causal_lm import CausalLM
    from engine.models.source import ModelSource

_DTYPES = {
    "F16": torch.float16,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U32": torch.uint32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
EXPORT_AGAIN = "export the run again"
"""The remedy for a file of ours; one of somebody else's has no run."""


class StoredLinear(Protocol):
    """One quantized linear of a file."""

    def parts(self) -> Mapping[str, Tensor]:
        """What is in the file, by what it is called in messages."""

    def weight(self) -> Tensor:
        """float32 ``[O, I]``."""


class TensorReader(Protocol):
    """The tensors of a quantized checkpoint, one at a time, whatever its files are."""

    config: dict[str, Any]
    """What config.json says; empty where there is none."""
    zero_scales: bool
    """Whether a scale of zero is a way to write weights that are all zero."""

    def names(self) -> list[str]:
        """As a full-precision checkpoint would have them."""

    def stored_names(self) -> list[str]:
        """As they are in the files."""

    def __contains__(self, name: str) -> bool: ...

    def files(self) -> list[Path]:
        """All that were opened."""

    def stored(self, name: str) -> Tensor:
        """A tensor that is not quantized."""

    def is_packed(self, linear: str) -> bool:
        """Whether a linear is stored as integers."""

    def parts_of(self, linear: str) -> tuple[str, ...]:
        """Names of the tensors that a quantized linear is made of."""

    def linear(self, prefix: str) -> StoredLinear:
        """One quantized linear."""

    def bits_of(self, prefix: str) -> int:
        """Bits of the integers of one quantized linear."""


@dataclass(frozen=True)
class PlainLinear:
    """One quantized linear of a file: codes uint8 ``[O, I]``, zeros uint8 and scales float16 ``[O, G]``."""

    codes_OI: Tensor
    zero_OG: Tensor
    scale_OG: Tensor
    group_of_I: Tensor

    def parts(self) -> Mapping[str, Tensor]:
        return {
            "integers": self.codes_OI,
            "zero points": self.zero_OG,
            "scales": self.scale_OG,
            "group indices": self.group_of_I,
        }

    def weight(self) -> Tensor:
        """float32 ``[O, I]``."""
        (outputs, inputs), groups = self.codes_OI.shape, self.scale_OG.shape[1]
        zero_OG, scale_OG, group = self.zero_OG.float(), self.scale_OG.float(), self.group_of_I.long()
        size = inputs // max(1, groups)
        if groups * size == inputs and torch.equal(group, torch.arange(inputs) // max(1, size)):
            # One group behind the other, as nearly all files have them: no number need be looked up.
            codes = self.codes_OI.float().reshape(outputs, groups, -1)
            return codes.sub_(zero_OG[..., None]).mul_(scale_OG[..., None]).reshape(outputs, inputs)
        return self.codes_OI.float().sub_(zero_OG[:, group]).mul_(scale_OG[:, group])


_Size = Annotated[int, msgspec.Meta(ge=0)]


class _Stored(msgspec.Struct, frozen=True):
    """What a safetensors header says of one tensor."""

    dtype: str
    shape: tuple[_Size, ...]
    data_offsets: tuple[_Size, _Size]


class _Index(msgspec.Struct, frozen=True):
    """``model.safetensors.index.json``: the file of every tensor."""

    weight_map: dict[str, str]


@dataclass(frozen=True)
class Entry:
    """Where a tensor's bytes are."""

    path: Path
    start: int
    size: int
    shape: tuple[int, ...]
    type: str
    """As the file calls it."""
    dtype: torch.dtype | None
    """None for types that only tensors which are carried along have."""


class CheckpointReader(ABC):
    """The tensors of a packed directory by name, read from the disk one at a time."""

    format: ClassVar[str]
    """Name of the format."""
    suffixes: ClassVar[tuple[str, ...]]
    """What a quantized linear's tensors are called behind its name; each linear has the first of them."""
    zero_scales = False

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        self.config = self.read_config()
        self.quantization = quantization_of(self.directory, self.config)
        self.understand()
        self._entries = self._list_tensors()

    bits: int | None = None
    """Of an integer, where one number holds for all linears."""

    def read_config(self) -> dict[str, Any]:
        """config.json."""
        return read_json(self.directory / "config.json")

    @abstractmethod
    def understand(self) -> None:
        """Take what reading needs from ``quantization``.

        Raises:
            PreflightError: where it describes something else.
        """

    @abstractmethod
    def linear(self, prefix: str) -> StoredLinear:
        """One quantized linear: its integers, zero points and scales, or what stands for them."""

    @abstractmethod
    def linear_shape(self, prefix: str) -> tuple[int, int]:
        """Outputs and inputs of one quantized linear."""

    def bits_of(self, prefix: str) -> int:
        """Bits of the integers of one quantized linear."""
        if self.bits is None:
            raise damaged(self.directory, f"nothing says how many bits the integers of {prefix} have")
        return self.bits

    def is_packed(self, linear: str) -> bool:
        # What a format calls a linear's weight may be one of its packed tensors, as in MLX.
        return any(f"{linear}.{suffix}" in self._entries for suffix in self.suffixes if suffix != "weight")

    def parts_of(self, linear: str) -> tuple[str, ...]:
        return tuple(name for name in (f"{linear}.{each}" for each in self.suffixes) if name in self._entries)

    def stored_names(self) -> list[str]:
        """Names as they are in the files."""
        return sorted(self._entries)

    def names(self) -> list[str]:
        """Names as a full-precision checkpoint would have them."""
        every, mark = tuple(f".{suffix}" for suffix in self.suffixes), f".{self.suffixes[0]}"
        plain = [n for n in self._entries if not n.endswith(every)]
        packed = [n.removesuffix(mark) + ".weight" for n in self._entries if n.endswith(mark)]
        return sorted(plain + packed)

    def __contains__(self, name: str) -> bool:
        return name in self._entries or self._mark(name) in self._entries

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that :meth:`load` returns."""
        return self._dtype(name) if name in self._entries else torch.float32

    def where(self, name: str) -> str:
        """File that holds the tensor, for messages."""
        entry = self._entries.get(name) or self._entries.get(self._mark(name))
        return str(entry.path if entry else self.directory)

    def files(self) -> list[Path]:
        return sorted({entry.path for entry in self._entries.values()})

    def inventory(self) -> list[str]:
        """One line a stored tensor; part of the identity."""
        return [
            f"{name} {entry.dtype or entry.type} {entry.shape}"
            for name, entry in sorted(self._entries.items())
        ]

    def leftover(self, wanted: Iterable[str]) -> list[str]:
        """Nothing: which tensors a packed directory must hold is what ``verify.py`` checks."""
        return []

    def shape(self, name: str) -> tuple[int, ...]:
        if name in self._entries:
            return self._entries[name].shape
        return self.linear_shape(name.removesuffix(".weight"))

    def stored_shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor as it is in the file."""
        return self._entry(name).shape

    def load(self, name: str) -> Tensor:
        """One weight: as stored when it is 16-bit, dequantized to float32 when it is packed."""
        return (
            self.stored(name) if name in self._entries else self.linear(name.removesuffix(".weight")).weight()
        )

    def stored(self, name: str) -> Tensor:
        """One tensor exactly as it is in the file, in memory of its own."""
        entry, dtype, data = self._entry(name), self._dtype(name), self._bytes(name)
        flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return flat.reshape(entry.shape)

    def raw(self, name: str) -> tuple[str, tuple[int, ...], Tensor]:
        """Type, shape and bytes of a tensor whose type torch need not know."""
        entry, data = self._entry(name), self._bytes(name)
        empty = torch.empty(0, dtype=torch.uint8)
        return entry.type, entry.shape, torch.frombuffer(data, dtype=torch.uint8) if data else empty

    def _bytes(self, name: str) -> bytearray:
        entry = self._entry(name)
        data = bytearray(entry.size)
        try:
            with os.fdopen(open_regular(unlinked(entry.path)), "rb") as file:
                file.seek(entry.start)
                count = file.readinto(data)
        except OSError as error:
            raise bad_file(error, entry.path) from error
        if count != entry.size:
            raise damaged(entry.path, f"it ends inside tensor {name}")
        return data

    def _dtype(self, name: str) -> torch.dtype:
        entry = self._entry(name)
        if entry.dtype is None:
            raise damaged(entry.path, f"tensor {name} has the unexpected type {entry.type}")
        return entry.dtype

    def _mark(self, name: str) -> str:
        """The tensor that every quantized linear has, of the linear whose weight is called ``name``."""
        return f"{name.removesuffix('.weight')}.{self.suffixes[0]}"

    def _entry(self, name: str) -> Entry:
        if name not in self._entries:
            raise damaged(self.directory, f"tensor {name} is not in it")
        return self._entries[name]

    def _list_tensors(self) -> dict[str, Entry]:
        index = self.directory / "model.safetensors.index.json"
        try:
            weight_map = read_struct(unlinked(index), _Index, LARGE).weight_map
        except NoFile:
            return _read_header(self.directory / "model.safetensors")
        found: dict[str, Entry] = {}
        for file_name in sorted(set(weight_map.values())):
            if Path(file_name).name != file_name:
                raise damaged(index, f"{file_name[:80]!r} is no file of this folder")
            found.update(_read_header(self.directory / file_name))
        for name in sorted(weight_map.keys() | found.keys()):
            if name not in found or weight_map.get(name) != found[name].path.name:
                raise damaged(index, f"it and the files disagree about {name}")
        return found


class PackedSource:
    """A packed directory seen as a model source, so that it runs through the same block-by-block code."""

    def __init__(
        self,
        directory: Path,
        reader: Callable[[Path], CheckpointReader],
        *,
        trust_remote_code: bool = False,
    ) -> None:
        from transformers import AutoConfig

        self.directory = Path(directory)
        self.trust_remote_code = trust_remote_code
        self.weights = reader(self.directory)
        check_config(self.weights.config, self.directory / "config.json")
        self.config: Any = parsed(
            lambda folder: AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code),
            self.directory,
            self.directory / "config.json",
            "configuration of a model",
        )
        # What is opened here is the dequantized network; transformers would look for a quantizer.
        if hasattr(self.config, "quantization_config"):
            del self.config.quantization_config
        self.name = self.directory.name

    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.directory, trust_remote_code=False)

    def identity(self) -> dict[str, Any]:
        """What was opened: the files' names and sizes, hashed together with the configuration."""
        files = [(path.name, path.stat().st_size) for path in self.weights.files()]
        text = json.dumps([self.weights.config, files, self.weights.inventory()], sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()
        return {"kind": self.weights.format, "path": str(self.directory), "sha256": digest}


def _read_header(path: Path) -> dict[str, Entry]:
    """Where each tensor of a safetensors file is; the safetensors library judges whether it is sound."""
    try:
        with os.fdopen(open_regular(unlinked(path)), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if length > min(LARGE, size - 8):
                raise damaged(path, f"a header of {length} bytes does not fit into it")
            content = file.read(length)
    except OSError as error:
        raise bad_file(error, path) from error
    header = parsed(_header, content, path, "safetensors header")
    entries = {}
    for name, entry in header.items():
        start, end = entry.data_offsets
        dtype = _DTYPES.get(entry.dtype)
        size_wanted = math.prod(entry.shape) * dtype.itemsize if dtype is not None else end - start
        if not 0 <= start <= end or end - start != size_wanted:
            raise damaged(path, f"tensor {name} lies where it cannot lie")
        if 8 + length + end > size:
            raise damaged(path, f"it ends inside tensor {name}")
        entries[name] = Entry(path, 8 + length + start, end - start, entry.shape, entry.dtype, dtype)
    # Last, when it is known to be a regular file: the library would wait for whatever has the name.
    parsed(_judge, path, path, "safetensors file")
    return entries


def _header(content: bytes) -> dict[str, _Stored]:
    raw = msgspec.json.decode(content, type=dict[str, msgspec.Raw])
    raw.pop("__metadata__", None)
    return {name: msgspec.json.decode(entry, type=_Stored) for name, entry in raw.items()}


def _judge(path: Path) -> None:
    with safe_open(str(path), framework="pt"):
        pass


def packed_model(
    directory: Path,
    reader: Callable[[Path], CheckpointReader],
    device: torch.device,
    dtype: torch.dtype,
    **options: bool,
) -> CausalLM:
    """The model in a packed directory that ``reader`` opens, to be run block by block like any other."""
    from engine.models.causal_lm import CausalLM

    return CausalLM(cast("ModelSource", PackedSource(directory, reader, **options)), device, dtype)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a checkpoint; BadFile for anything else."""
    return read_object(unlinked(path), SMALL)


def quantization_of(directory: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """What the checkpoint in ``directory``, whose configuration is ``config``, says of how it is packed: in
    its ``config.json``, or as older GPTQ files do, in a file of its own. Empty where nothing is said."""
    said = config.get("quantization_config")
    if said is None:
        try:
            return read_json(directory / "quantize_config.json")
        except NoFile:
            return {}
    return said if isinstance(said, dict) else {}


def regular_groups(inputs: int, groups: int) -> Tensor:
    """The group of each input where groups are neighbours of one size: int32 ``[I]``.

    Raises:
        ValueError: where they cannot be of one size.
    """
    if not groups or inputs % groups:
        raise ValueError(f"{inputs} inputs cannot be {groups} groups of one size")
    return torch.arange(inputs, dtype=torch.int32) // (inputs // groups)


def number_of_bits(directory: Path, said: object) -> int:
    """Bits an integer, as a configuration says; PreflightError for what is no such number."""
    if not isinstance(said, int) or said not in BITS:
        raise damaged(directory / "config.json", f"{str(said)[:40]} is no number of bits")
    return said


def damaged(path: Path, why: object) -> BadFile:
    """A file of the export is not what was written."""
    return BadFile(f"cannot be read: {why}", where=str(path), hint=EXPORT_AGAIN)
