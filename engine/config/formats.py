"""The table of export formats: one row a layout of packed checkpoints.

A row says what whoever plans, refuses, lists or loads an export has to know. How tensors are written and read
back is the layout's that it names (:mod:`engine.export.layout`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from engine.config.grid import BITS, GROUP_SIZES, Grid, GridConfig
from engine.config.tables import Table, load_named
from engine.errors import UsageError


class Format(msgspec.Struct, frozen=True, kw_only=True):
    """A layout of a packed checkpoint, and what it can hold."""

    name: str
    """What ``export.formats`` calls it; also its folder in ``export/``."""
    label: str
    """In words."""
    bits: tuple[int, ...] = BITS
    """Bits a weight that it can hold."""
    group_sizes: tuple[int, ...] = GROUP_SIZES
    """Group sizes that it can hold; -1 is the whole row."""
    symmetric: tuple[bool, ...] = (False, True)
    """Whether it holds asymmetric and symmetric grids."""
    words_along_outputs: bool = False
    """Outputs, too, are packed in whole 32-bit words."""
    code: str
    """``module:class`` of the heavy half: its :class:`~engine.export.layout.Form`."""
    writer: str = "engine.export.checkpoint:write_folder"
    """``module:function`` of the heavy half: what writes the files of an export."""
    tensors: tuple[str, ...]
    """What stands for ``<linear>.weight``, each named ``<linear>.<one of these>``."""
    costs: str = ""
    """``module:function``: bytes of these tensors for so many outputs, inputs, bits and group size; empty for
    integers, zero points and scales without a gap."""
    sizes: str = ""
    """``module:function`` of the light half: bytes of all tensors of an export, for an architecture, a
    :class:`~engine.config.grid.GridConfig` and the bytes of a number that is not quantized; empty where
    ``costs`` of every linear and so many bytes of every other number are all there is."""
    refuses: str = ""
    """``module:function`` of the light half: what of a model it cannot hold, in words, for an architecture,
    config.json and a :class:`~engine.config.grid.GridConfig`; empty for formats that hold every model."""
    warns: str = ""
    """``module:function`` of the light half: sentences on what becomes of a grid or a model in this format
    that somebody might not expect, for the same three; empty for none."""
    carries: bool = True
    """It takes over what the checkpoint holds besides the model."""
    loading: str
    """Python lines that load an export whose folder, a literal, takes the place of ``{path}``."""

    def linear_bytes(self, outputs: int, inputs: int, grid: Grid) -> int:
        """Bytes of a linear's tensors."""
        cost = load_named(self.costs) if self.costs else packed_bytes
        return int(cost(outputs, inputs, grid.bits, grid.group_size))

    def lacks(self, grid: Grid) -> str:
        """What of a grid it cannot hold, in words; empty where it holds all of it."""
        if grid.bits not in self.bits:
            return f"{grid.bits} bits"
        if grid.group_size not in self.group_sizes:
            return "one group a row" if grid.group_size == -1 else f"groups of {grid.group_size}"
        if grid.symmetric not in self.symmetric:
            return "a symmetric grid" if grid.symmetric else "an asymmetric grid"
        return ""

    def refusal(self, architecture: object, config: Mapping[str, Any], grid: GridConfig) -> str:
        """What of a grid or a model it cannot hold, in words; empty where it holds all of it."""
        return self.lacks(grid.shared) or (
            load_named(self.refuses)(architecture, config, grid) if self.refuses else ""
        )

    def warnings(self, architecture: object, config: Mapping[str, Any], grid: GridConfig) -> tuple[str, ...]:
        """What somebody might not expect of this format for a grid and a model, in sentences."""
        return tuple(load_named(self.warns)(architecture, config, grid)) if self.warns else ()


def packed_bits(outputs: int, inputs: int, bits: int, group_size: int) -> int:
    """Bits of a linear's integers and zero points, and of its scales at 16, packed without a gap."""
    groups = Grid(bits, group_size).groups(inputs)
    return outputs * inputs * bits + outputs * groups * (16 + bits)


def packed_bytes(outputs: int, inputs: int, bits: int, group_size: int) -> int:
    """The same in bytes."""
    return packed_bits(outputs, inputs, bits, group_size) // 8


def gptq_bytes(outputs: int, inputs: int, bits: int, group_size: int) -> int:
    """The same, and each input's group at 32 bits, which GPTQ files list."""
    return packed_bytes(outputs, inputs, bits, group_size) + 4 * inputs


FORMATS = Table(
    "format",
    Format(
        name="gptq_v2",
        label="GPTQ v2",
        words_along_outputs=True,
        code="engine.export.gptq_v2:GPTQv2",
        tensors=("qweight", "qzeros", "scales", "g_idx"),
        costs="engine.config.formats:gptq_bytes",
        loading=(
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
            "path = {path}\n"
            'model = AutoModelForCausalLM.from_pretrained(path, device_map="auto")  # pip install gptqmodel\n'
            "tokenizer = AutoTokenizer.from_pretrained(path)"
        ),
    ),
    Format(
        name="gguf",
        label="GGUF",
        code="engine.export.gguf_form:GGUF",
        writer="engine.export.gguf_file:write_file",
        tensors=("weight",),
        sizes="engine.architecture.gguf_writing:tensor_bytes",
        refuses="engine.architecture.gguf_writing:refusal",
        warns="engine.architecture.gguf_writing:warnings",
        carries=False,
        loading=(
            "from pathlib import Path\n"
            "from llama_cpp import Llama\n"
            'file = next(Path({path}).glob("*.gguf"))\n'
            "model = Llama(str(file), n_ctx=4096)  # pip install llama-cpp-python; or llama-cli -m FILE"
        ),
    ),
)

DEFAULT_FORMAT = FORMATS.names()[0]
"""What is written where nothing else is asked for."""


def refuse_unknown(field: str, names: Sequence[str]) -> None:
    """Raise :class:`UsageError` for the first of ``names``, the values of ``field``, that is no format."""
    for index, name in enumerate(names):
        if name not in FORMATS:
            raise UsageError(
                f"Invalid enum value '{name}'",
                where=f"{field}[{index}]",
                hint=f"a list, each one of {', '.join(FORMATS.names())}",
            )
