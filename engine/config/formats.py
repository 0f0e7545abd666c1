"""The table of export formats: one row a layout of packed checkpoints.

A row says what whoever plans, refuses, lists or loads an export has to know. How tensors are written and read
back is the layout's that it names (:mod:`engine.export.layout`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import msgspec

from engine.config.grid import BITS, GROUP_SIZES, Grid, GridConfig
from engine.config.tables import Table, is_folder_name, load_named
from engine.errors import PreflightError, UsageError


class Caution(msgspec.Struct, frozen=True, kw_only=True):
    """What some loader of today cannot do with an export of these grids, and what to choose instead."""

    text: str
    """A clause that follows the format's label and a colon."""
    bits: tuple[int, ...] = BITS
    symmetric: tuple[bool, ...] = (False, True)
    free_zero_points: bool = False
    """Only of grids whose groups have zero points of their own."""
    outputs: int = 1
    """Only of linears whose outputs are no multiple of so many; ``{outputs}`` in the text is the first."""

    def about(self, grid: Grid, outputs: Iterable[int]) -> str:
        """The text, if an export of that grid and of linears with so many outputs is one of these."""
        if grid.bits not in self.bits or grid.symmetric not in self.symmetric:
            return ""
        if self.free_zero_points and grid.fixed_zero_point is not None:
            return ""
        if self.outputs == 1:
            return self.text
        odd = next((count for count in outputs if count % self.outputs), None)
        return "" if odd is None else self.text.format(outputs=odd)


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
    head_bits: tuple[int, ...] = ()
    """Bits a weight that it can hold of a quantized embedding and head; none where they stay numbers."""
    words_along_outputs: bool = False
    """Outputs, too, are packed in whole 32-bit words."""
    code: str
    """``module:class`` of the heavy half: its :class:`~engine.export.layout.Form`."""
    writer: str = "engine.export.checkpoint:write_folder"
    """``module:function`` of the heavy half: what writes the files of an export."""
    tensors: tuple[str, ...]
    """What stands for ``<linear>.weight``, each named ``<linear>.<one of these>``."""
    asymmetric_tensors: tuple[str, ...] = ()
    """Those of ``tensors`` that a linear with a symmetric grid does not have."""
    costs: str = ""
    """``module:function``: bytes of these tensors for so many outputs, inputs, bits and group size; empty for
    integers, zero points and scales without a gap."""
    symmetric_costs: str = ""
    """The same for a symmetric grid; empty where it costs as much as an asymmetric one."""
    dense: bool = False
    """The weight itself is written, as a number like all that is not quantized."""
    carries: bool = True
    """What a checkpoint holds besides the model is taken over; some loaders refuse it."""
    cautions: tuple[Caution, ...] = ()
    """What loaders of today cannot do with it."""
    instead: tuple[str, ...] = ()
    """Names of formats to choose where this one does not fit, the nearest first."""
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
    libraries: tuple[str, ...] = ()
    """Packages beyond those of every installation, without which it is neither written nor read."""
    limits: str = ""
    """Why it holds no other bits and group sizes, in a clause; empty where nothing more is to be said."""
    network_bytes: int = 0
    """Bytes a block of what its files say of the network, which the export's own engine runs to verify it;
    none where they hold weights alone."""
    loading: str
    """Python lines that load an export whose folder, a literal, takes the place of ``{path}``."""

    def linear_bytes(self, outputs: int, inputs: int, grid: Grid, number: int = 2) -> int:
        """Bytes of a linear's tensors; ``number`` are those of a number that is not quantized."""
        if self.dense:
            return number * outputs * inputs
        named = (grid.symmetric and self.symmetric_costs) or self.costs
        cost = load_named(named) if named else packed_bytes
        return int(cost(outputs, inputs, grid.bits, grid.group_size))

    def warnings(self, grid: Grid, outputs: Iterable[int] = ()) -> list[str]:
        """What whoever chooses it for that grid, and linears with so many ``outputs``, should know, each in a
        sentence."""
        counts = tuple(outputs)
        return [f"{self.label}: {text}" for each in self.cautions if (text := each.about(grid, counts))]

    def lacks(self, grid: Grid) -> str:
        """What of a grid it cannot hold, in words; empty where it holds all of it."""
        limits = f" ({self.limits})" if self.limits else ""
        if grid.bits not in self.bits:
            return f"{grid.bits} bits{limits}"
        if grid.group_size not in self.group_sizes:
            return ("one group a row" if grid.group_size == -1 else f"groups of {grid.group_size}") + limits
        if grid.symmetric not in self.symmetric:
            return "a symmetric grid" if grid.symmetric else "an asymmetric grid"
        return ""

    def lacks_head(self, bits: int) -> str:
        """The same of an embedding and a head of so many bits; 0 where they are numbers."""
        held = bits in (0, *self.head_bits)
        return "" if held else f"an embedding and a head of {bits} bits (grid.head_bits)"

    def missing_libraries(self) -> tuple[str, ...]:
        """Those of ``libraries`` that are not installed here; none of them is imported for that."""
        return tuple(name for name in self.libraries if find_spec(name) is None)

    def lacks_libraries(self) -> str:
        """What is missing here, in words that follow its name; empty where nothing is."""
        missing = self.missing_libraries()
        return f"needs {', '.join(missing)}, not installed here" if missing else ""

    def require_libraries(self, path: str = "") -> None:
        """Nothing, where what it needs is installed to be written, or for the files in ``path`` to be read.

        Raises:
            PreflightError: names what is missing and what installs it.
        """
        if why := self.lacks_libraries():
            install = f"pip install {' '.join(self.missing_libraries())}"
            raise PreflightError(
                f"{self.label} {why}",
                where=path or "export.formats",
                hint=install if path else f"{install}, or leave {self.name} out of export.formats",
            )

    def refusal(self, architecture: object, config: Mapping[str, Any], grid: GridConfig) -> str:
        """What of a grid or a model it cannot hold, in words; empty where it holds all of it."""
        if lacked := self.lacks(grid.shared) or self.lacks_head(grid.head_bits):
            return lacked
        return load_named(self.refuses)(architecture, config, grid) if self.refuses else ""

    def consequences(
        self, architecture: object, config: Mapping[str, Any], grid: GridConfig
    ) -> tuple[str, ...]:
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


def compressed_tensors_bytes(outputs: int, inputs: int, bits: int, group_size: int) -> int:
    """Words of integers and of zero points, whose last one may be half empty, scales, and the shape."""
    zero_words = Grid(bits, group_size).groups(inputs) * -(-outputs * bits // 32)
    return symmetric_compressed_tensors_bytes(outputs, inputs, bits, group_size) + 4 * zero_words


def symmetric_compressed_tensors_bytes(outputs: int, inputs: int, bits: int, group_size: int) -> int:
    """The same without zero points."""
    groups = Grid(bits, group_size).groups(inputs)
    return 4 * outputs * -(-inputs * bits // 32) + 2 * outputs * groups + 16


def mlx_bytes(outputs: int, inputs: int, bits: int, group_size: int) -> int:
    """Integers, and of each group a scale and a bias at 32 bits."""
    return outputs * inputs * bits // 8 + 8 * outputs * Grid(bits, group_size).groups(inputs)


def matmul_nbits_bytes(outputs: int, inputs: int, bits: int, group_size: int) -> int:
    """Integers, scales, and zero points, of which each row fills whole bytes."""
    groups = Grid(bits, group_size).groups(inputs)
    return symmetric_matmul_nbits_bytes(outputs, inputs, bits, group_size) + outputs * -(-groups * bits // 8)


def symmetric_matmul_nbits_bytes(outputs: int, inputs: int, bits: int, group_size: int) -> int:
    """The same without zero points."""
    return outputs * inputs * bits // 8 + 2 * outputs * Grid(bits, group_size).groups(inputs)


SERVERS_WANT_OTHERS = (
    Caution(
        text="choose compressed-tensors for vLLM (from 0.22 on) and SGLang, which read GPTQ files of "
        "symmetric 4 and 8 bits only",
        bits=(4, 8),
        symmetric=(False,),
    ),
    Caution(
        text="choose compressed-tensors for vLLM, which from 0.22 on reads GPTQ files of symmetric 4 and 8 "
        "bits only; SGLang reads 2 and 3 bits in neither",
        bits=(2, 3),
    ),
)

# Four bits were loaded so by vLLM 0.32 on a CPU (docs/formats.md).
THROUGH_VLLM = "\n# with vLLM{where}: from vllm import LLM; model = LLM(path)"

THROUGH_GPTQMODEL = (
    "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
    "path = {path}\n"
    'model = AutoModelForCausalLM.from_pretrained(path, device_map="auto")  # pip install gptqmodel\n'
    "tokenizer = AutoTokenizer.from_pretrained(path)"
)

# Seen with humming-kernels 0.1.19 on an H100 (benchmarks/README.md).
HUMMING = Caution(
    text="vLLM's kernel for 2 and 3 bits, Humming, refuses linears whose outputs are no multiple of 128, and "
    "this model has some with {outputs}",
    bits=(2, 3),
    outputs=128,
)

FORMATS = Table(
    "format",
    Format(
        name="gptq_v2",
        label="GPTQ v2",
        words_along_outputs=True,
        code="engine.export.gptq_v2:GPTQv2",
        tensors=("qweight", "qzeros", "scales", "g_idx"),
        costs="engine.config.formats:gptq_bytes",
        loading=THROUGH_GPTQMODEL,
        cautions=(*SERVERS_WANT_OTHERS, HUMMING),
        instead=("compressed-tensors",),
    ),
    Format(
        name="compressed-tensors",
        label="compressed-tensors",
        code="engine.export.compressed_tensors:CompressedTensors",
        tensors=("weight_packed", "weight_scale", "weight_zero_point", "weight_shape"),
        asymmetric_tensors=("weight_zero_point",),
        costs="engine.config.formats:compressed_tensors_bytes",
        symmetric_costs="engine.config.formats:symmetric_compressed_tensors_bytes",
        loading=(
            "from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig\n"
            "path = {path}\n"
            "config = CompressedTensorsConfig(dequantize=True)  # pip install compressed-tensors\n"
            "model = AutoModelForCausalLM.from_pretrained(path, quantization_config=config)\n"
            "tokenizer = AutoTokenizer.from_pretrained(path)"
            + THROUGH_VLLM.format(where=", 2 and 3 bits on a GPU")
        ),
        cautions=(
            Caution(
                text="transformers 5.23 and 5.24 load asymmetric files only with "
                "quantization_config=CompressedTensorsConfig(dequantize=True), which unpacks them to 16 bits",
                symmetric=(False,),
            ),
            Caution(
                text="vLLM reads asymmetric 2 and 3 bits from 0.31 on, on GPUs alone; SGLang reads 4 and "
                "8 bits only",
                bits=(2, 3),
                symmetric=(False,),
            ),
            Caution(
                text="vLLM reads symmetric 2 and 3 bits from 0.25 on, on GPUs alone; SGLang reads 4 and "
                "8 bits only",
                bits=(2, 3),
                symmetric=(True,),
            ),
            Caution(
                text="the library itself packs 3 bits without a gap, as these files do, from 0.18 on",
                bits=(3,),
            ),
            HUMMING,
        ),
        instead=("gptq_v2",),
    ),
    Format(
        name="gguf",
        label="GGUF",
        head_bits=(4, 8),
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
    Format(
        name="awq",
        label="AWQ",
        bits=(4,),
        group_sizes=(32, 64, 128, -1),
        words_along_outputs=True,
        code="engine.export.awq:AWQ",
        tensors=("qweight", "qzeros", "scales"),
        loading=THROUGH_GPTQMODEL + THROUGH_VLLM.format(where=""),
        instead=("compressed-tensors",),
    ),
    Format(
        name="auto-round",
        label="auto-round",
        words_along_outputs=True,
        code="engine.export.auto_round:AutoRound",
        tensors=("qweight", "qzeros", "scales"),
        loading=(
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
            "path = {path}\n"
            "# pip install auto-round\n"
            'model = AutoModelForCausalLM.from_pretrained(path, device_map="auto")\n'
            "tokenizer = AutoTokenizer.from_pretrained(path)"
        ),
        cautions=(
            Caution(
                text="choose awq for vLLM, which reads auto-round files of asymmetric 4 bits only where they "
                "are packed as AWQ",
                bits=(4,),
                symmetric=(False,),
            ),
            Caution(
                text="choose compressed-tensors for vLLM, which reads no auto-round files of asymmetric 8 "
                "bits",
                bits=(8,),
                symmetric=(False,),
            ),
            HUMMING,
        ),
        instead=("gptq_v2",),
    ),
    Format(
        name="gptq",
        label="GPTQ v1",
        words_along_outputs=True,
        code="engine.export.gptq:GPTQ",
        tensors=("qweight", "qzeros", "scales", "g_idx"),
        costs="engine.config.formats:gptq_bytes",
        loading=THROUGH_GPTQMODEL,
        cautions=(
            Caution(
                text="a zero point of 0 has no value in it, and training makes such: choose gptq_v2, which "
                "holds every one, or the export may be refused when it is to be written",
                free_zero_points=True,
            ),
            *SERVERS_WANT_OTHERS,
            HUMMING,
        ),
        instead=("gptq_v2",),
    ),
    Format(
        name="mlx",
        label="MLX",
        group_sizes=(32, 64, 128),
        head_bits=(4, 8),
        code="engine.export.mlx:MLX",
        tensors=("weight", "scales", "biases"),
        costs="engine.config.formats:mlx_bytes",
        carries=False,
        loading=(
            "from mlx_lm import load  # pip install mlx-lm; on Linux with mlx[cpu]\n"
            "path = {path}\n"
            "model, tokenizer = load(path)"
        ),
        instead=("compressed-tensors",),
    ),
    Format(
        name="hf",
        label="Hugging Face",
        dense=True,
        head_bits=(4, 8),
        code="engine.export.hf:HuggingFace",
        tensors=("weight",),
        loading=(
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
            "path = {path}\n"
            'model = AutoModelForCausalLM.from_pretrained(path, device_map="auto")\n'
            "tokenizer = AutoTokenizer.from_pretrained(path)"
        ),
        cautions=(
            Caution(
                text="its weights take 16 bits again, so the files are as large as the original's: choose a "
                "packed format for a small one"
            ),
            # SmolLM2-135M (benchmarks/README.md): 1 in 90 of its likeliest tokens became another.
            Caution(
                text="bfloat16 rounds each weight to 8 digits, which shows in what 2 and 3 bits predict: "
                "export.dtype = float16 keeps 11 where the model's activations fit, a packed format all",
                bits=(2, 3),
            ),
        ),
        instead=("compressed-tensors",),
    ),
    Format(
        name="onnx",
        label="ONNX",
        bits=(2, 4, 8),
        group_sizes=(16, 32, 64, 128, 256),
        code="engine.export.onnx_form:ONNX",
        writer="engine.export.onnx_file:write_file",
        tensors=("qweight", "scales", "qzeros"),
        asymmetric_tensors=("qzeros",),
        costs="engine.config.formats:matmul_nbits_bytes",
        symmetric_costs="engine.config.formats:symmetric_matmul_nbits_bytes",
        carries=False,
        libraries=("onnx", "onnxscript", "onnxruntime"),
        limits="its operator takes 2, 4 and 8 bits in groups of a power of 2 from 16 on",
        network_bytes=32 << 10,
        refuses="engine.architecture.onnx_writing:refusal",
        loading=(
            "import numpy as np\n"
            "import onnxruntime  # pip install onnxruntime\n"
            "from transformers import AutoTokenizer\n"
            "path = {path}\n"
            "tokenizer = AutoTokenizer.from_pretrained(path)\n"
            'model = onnxruntime.InferenceSession(path + "/model.onnx")\n'
            'ids = tokenizer("The capital of France is", return_tensors="np")["input_ids"]\n'
            'inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}\n'
            'logits = model.run(["logits"], inputs)[0]'
        ),
        cautions=(
            Caution(
                text="its graph keeps no cache of keys and values, so every further token of a text costs as "
                "much as the whole text: choose gguf for texts that are written on"
            ),
        ),
        instead=("compressed-tensors",),
    ),
    named=is_folder_name,
)


def nearest(row: Format, grid: Grid, *, fits: Callable[[Format], bool] = lambda other: True) -> str:
    """Name of the format to choose where ``row`` does not fit: one that holds the grid, and that ``fits``
    whatever else is asked of it; empty for none."""
    for name in (*row.instead, *FORMATS.names()):
        other = FORMATS.get(name)
        if other is not None and other.name != row.name and not other.lacks(grid) and fits(other):
            return name
    return ""


DEFAULT_FORMAT = FORMATS.names()[0]
"""What is written where nothing else is asked for."""


def cannot_hold(row: Format, why: str, where: str, hint: str) -> PreflightError:
    """``row`` cannot hold ``why``; the hint names what to do instead."""
    return PreflightError(f"{row.label} cannot hold {why}", where=where, hint=hint)


def refuse_unheld(where: str, names: Iterable[str], grid: GridConfig) -> None:
    """Raise :class:`PreflightError` for the first of ``names``, asked for in ``where``, that cannot hold a
    grid which is what it is; it says which format can."""

    def lacks(row: Format) -> str:
        return row.lacks(grid.shared) or row.lacks_head(grid.head_bits)

    for row in map(FORMATS.__getitem__, names):
        if why := lacks(row):
            other = nearest(row, grid.shared, fits=lambda each: not lacks(each))
            raise cannot_hold(row, why, where, f"{other} can" if other else f"leave {row.name} out")


def refuse_unknown(field: str, names: Sequence[str]) -> None:
    """Raise :class:`UsageError` for the first of ``names``, the values of ``field``, that is no format."""
    for index, name in enumerate(names):
        if name not in FORMATS:
            raise UsageError(
                f"cannot be '{name}'",
                where=f"{field}[{index}]",
                hint=f"a list, each one of {', '.join(FORMATS.names())}",
            )
