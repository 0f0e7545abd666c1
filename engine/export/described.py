"""Which format a quantized checkpoint is in, as it describes itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.architecture.description import stored_tensors
from engine.architecture.model_folder import ModelFolder
from engine.config.formats import FORMATS
from engine.errors import EqatError, PreflightError
from engine.export.reader import quantization_of, read_json
from engine.system.guarded import NoFile

PLAIN = "hf"
"""The format of a checkpoint that speaks of no quantization."""
UNDESCRIBED = "gptq_v2"
"""The format of files with GPTQ's tensors that speak of no quantization, as EfficientQAT writes them."""
OF_FILES = ("gguf", "onnx")
"""Formats that are known by the ending of a file, which is their name."""
ALIASES = {"intel/auto-round": "auto-round"}
"""What formats were called before."""


def format_in(path: Path) -> str:
    """The format that the checkpoint in ``path``, a folder or a .gguf file, describes itself as.

    Raises:
        PreflightError: for a folder that is none of a format in the table.
    """
    if path.is_file() and path.suffix == ".gguf":
        return "gguf"
    if not path.is_dir():
        what = "is a file; name its folder" if path.exists() else "is not there"
        raise PreflightError(what, where=str(path))
    for name in OF_FILES:
        if name in FORMATS and any(path.glob(f"*.{name}")):
            return name
    try:
        config = read_json(path / "config.json")
    except NoFile as error:
        inside = sorted(file.parent.name for file in path.glob("*/config.json"))
        hint = "a run's are in the folders of its export/" if (path / "export").is_dir() else ""
        hint = f"there are some in {', '.join(inside[:8])}" if inside else hint
        raise PreflightError(
            "holds no checkpoint: config.json is missing", where=str(path), hint=hint
        ) from error
    kinds = _kinds(config, quantization_of(path, config))
    if not kinds and _has_words(path):
        return UNDESCRIBED
    known = next((kind for kind in kinds if kind in FORMATS), None if kinds else PLAIN)
    if known is not None:
        return known
    raise PreflightError(
        f"its quantization is {kinds[0][:40]!r}",
        where=str(path),
        hint=f"what can be read: {', '.join(FORMATS.names())}",
    )


def _kinds(config: Mapping[str, Any], said: Mapping[str, Any]) -> list[str]:
    """Names that may be those of a format, the most telling first."""
    kinds = ["mlx"] if isinstance(config.get("quantization"), dict) else []
    kinds += [str(said[key]) for key in ("checkpoint_format", "format", "quant_method") if said.get(key)]
    if not kinds and said.get("bits"):
        kinds = ["gptq"]  # the first of its kind did not say so
    return [ALIASES.get(kind, kind) for kind in kinds]


def _has_words(path: Path) -> bool:
    try:
        return any(name.endswith(".qweight") for name in stored_tensors(ModelFolder.judge(path)))
    except EqatError:  # whoever opens it says what is wrong
        return False


def layers_of(said: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a description of compressed-tensors says of each group of layers."""
    groups = said.get("config_groups")
    return [each for each in groups.values() if isinstance(each, dict)] if isinstance(groups, dict) else []


def beyond_the_weights(said: Mapping[str, Any]) -> list[str]:
    """What a description asks for besides quantized weights, a clause each."""
    sparsity = said.get("sparsity_config")
    found = {
        "its activations are quantized as well": any(
            each.get("input_activations") or each.get("output_activations") for each in layers_of(said)
        ),
        "its cache of keys and values is quantized as well": said.get("kv_cache_scheme"),
        "its weights are transformed before they are multiplied": said.get("transform_config"),
        "its weights are sparse": isinstance(sparsity, dict)
        and sparsity.get("format") not in (None, "dense"),
    }
    return [why for why, so in found.items() if so]
