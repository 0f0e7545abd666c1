"""The table of loaders: one row a program that computes with an export, for ``eqat bench``.

A row says which formats it reads, what has to be installed for it, and what of the heavy half drives it
(:mod:`engine.bench`). Which of them are installed here decides what is measured.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from engine.config.formats import FORMATS
from engine.config.tables import Table, is_folder_name


class Loader(msgspec.Struct, frozen=True, kw_only=True):
    """What computes with an export."""

    name: str
    """What the results call it."""
    label: str
    """In words."""
    formats: tuple[str, ...] = ()
    """The formats that it computes with as they are packed; none where it takes every format, unpacked."""
    modules: tuple[str, ...]
    """What has to be installed, as Python imports it."""
    packages: tuple[str, ...]
    """The same as pip calls it; their releases stand beside a result."""
    install: str
    """What to type where they are not."""
    code: str
    """``module:class`` of the heavy half: its :class:`~engine.bench.measuring.Loaded`."""


LOADERS = Table(
    "loader",
    Loader(
        name="transformers",
        label="transformers, 16 bits",
        modules=("torch", "transformers"),
        packages=("transformers", "torch"),
        install="pip install torch transformers",
        code="engine.bench.torch_models:Dequantized",
    ),
    Loader(
        name="gptqmodel",
        label="transformers, gptqmodel",
        formats=("gptq_v2", "gptq", "awq"),
        modules=("gptqmodel", "optimum"),
        packages=("transformers", "gptqmodel"),
        install="pip install gptqmodel optimum",
        code="engine.bench.torch_models:Packed",
    ),
    Loader(
        name="auto-round",
        label="transformers, auto-round",
        formats=("auto-round",),
        modules=("auto_round",),
        packages=("transformers", "auto-round"),
        install="pip install auto-round",
        code="engine.bench.torch_models:Packed",
    ),
    Loader(
        name="mlx-lm",
        label="mlx-lm",
        formats=("mlx",),
        modules=("mlx", "mlx_lm"),
        packages=("mlx", "mlx-lm"),
        install="pip install mlx-lm; on Linux with 'mlx[cpu]'",
        code="engine.bench.mlx_models:MLX",
    ),
    Loader(
        name="llama-cpp",
        label="llama.cpp",
        formats=("gguf",),
        modules=("llama_cpp",),
        packages=("llama-cpp-python",),
        install="pip install llama-cpp-python",
        code="engine.bench.llama_models:LlamaCpp",
    ),
    Loader(
        name="onnxruntime",
        label="ONNX Runtime, no cache",
        formats=("onnx",),
        modules=("onnxruntime",),
        packages=("onnxruntime",),
        install="pip install onnxruntime",
        code="engine.bench.onnx_models:ONNXRuntime",
    ),
    named=is_folder_name,
)
"""In the order in which they are measured: what the others are compared with comes first."""


def loaders_of(formats: Iterable[str]) -> list[tuple[Loader, str]]:
    """What can be measured of exports in these formats: each loader with the format that it reads. One that
    unpacks takes the plainest of them, once."""
    there = [name for name in FORMATS.names() if name in set(formats)]
    found = []
    for loader in LOADERS:
        if loader.formats:
            found += [(loader, name) for name in there if name in loader.formats]
        elif there:
            found.append((loader, next((name for name in there if FORMATS[name].dense), there[0])))
    return found


def unread(formats: Iterable[str]) -> list[str]:
    """Those of these formats that no loader of the table computes with as they are packed."""
    packed = {name for loader in LOADERS for name in loader.formats}
    return [name for name in formats if name not in packed and not FORMATS[name].dense]
