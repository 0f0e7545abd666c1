"""What a model is made of, from its config.json or GGUF header alone: the plan's only input.

:func:`resolve_source` says where a model is, :func:`describe` what it is: the configuration, the sizes
(``families.py``) and the bytes its weights take on disk. Weights are never read, torch is never
imported, and only a hub id that is not in the local cache goes to the network.
"""

from __future__ import annotations

import importlib.util
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from engine.architecture.families import Architecture, architecture, unfit_weight
from engine.architecture.gguf_header import (
    GGUF_MODEL_TYPES,
    GGUFHeader,
    read_gguf_header,
    supported_gguf,
)
from engine.architecture.headers import TensorInfo, checkpoint
from engine.architecture.limits import check_config
from engine.architecture.model_folder import ModelFolder
from engine.architecture.refusals import refuse_model
from engine.config.model import PACKAGE, RANDOM, TINY_MODEL
from engine.errors import PreflightError, UsageError
from engine.system.guarded import SMALL, parse_object
from engine.system.stamps import StampedFile, refuse_odd

TINY_LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}
"""The configuration of :data:`~engine.config.model.TINY_MODEL`."""

QUANTIZATION = ("quantization_config", "quantization", "compression_config")
"""Fields of a config.json that say how the weights are packed."""
RANDOM_MODELS = {TINY_MODEL: TINY_LLAMA}
"""Configurations of models whose weights are made up, by their source."""


class ModelDescription(msgspec.Struct, frozen=True, kw_only=True):
    """A model as far as it can be known without reading weights."""

    source: str
    kind: str
    """``random``, ``gguf``, ``safetensors``, ``config`` (no weight files beside it), ``packed`` (a quantized
    checkpoint) or ``hub``."""
    config: dict[str, Any]
    architecture: Architecture
    stored_bytes: int | None
    """Bytes of the weights as stored; none when their files were not seen."""


def resolve_source(source: str) -> Path | str:
    """A path for local files and ``package://NAME/FILE``; the text itself for hub ids and ``random://``."""
    if not source:
        raise UsageError("no model is given", where="model.source", hint="pass --model")
    if source.startswith(RANDOM):
        if source not in RANDOM_MODELS:
            raise UsageError(
                f"unknown random model {source!r}",
                where="model.source",
                hint=f"there is {', '.join(RANDOM_MODELS)}",
            )
        return source
    if source.startswith(PACKAGE):
        return _package_file(source)
    # pathlib raises what it likes on names of other users, too long ones and such with a null byte.
    path = Path(os.path.expanduser(source))
    if os.path.exists(path):
        refuse_odd(path)
        return path
    if re.fullmatch(r"[\w][\w.-]*(/[\w][\w.-]*)?", source) and not source.endswith(".gguf"):
        return source
    raise PreflightError(
        "this path does not exist", where=source, hint="model.source is a directory, a .gguf file or a hub id"
    )


def _package_file(source: str) -> Path:
    """A file inside an installed package, found without importing the package."""
    package, _, file = source.removeprefix(PACKAGE).partition("/")
    try:
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
    except (ImportError, ValueError):
        spec = None
    folders = list(spec.submodule_search_locations or ()) if spec else []
    if not folders:
        raise PreflightError(
            f"the Python package {package!r} is not installed",
            where=source,
            hint=f"pip install {package.replace('_', '-')}",
        )
    path = Path(folders[0]) / file
    if not file or not os.path.isfile(path):
        raise PreflightError(f"the Python package {package!r} has no file {file!r}", where=source)
    return path


def read_model_config(source: str, revision: str | None = None) -> dict[str, Any]:
    """The model's config.json as a dict; for a GGUF file the equivalent made from its header."""
    path = resolve_source(source)
    if isinstance(path, str):
        return dict(RANDOM_MODELS[path]) if path in RANDOM_MODELS else _hub_config(path, revision)
    if path.is_file():
        return gguf_config(read_gguf_header(path))
    return local_config(ModelFolder.judge(path))


def describe(source: str, revision: str | None = None, *, packed: bool = False) -> ModelDescription:
    """Configuration and sizes of a model, from headers where its files are local.

    A ``packed`` one is the folder of a quantized checkpoint, whose blocks are imported: its headers show
    words, so its sizes are those that the configuration asks for.
    """
    path = resolve_source(source)
    if packed:
        return _packed(source, path)
    if isinstance(path, str):
        config = read_model_config(source, revision)
        kind = "random" if path in RANDOM_MODELS else "hub"
        return ModelDescription(
            source=source, kind=kind, config=config, architecture=_sizes(config, {}), stored_bytes=None
        )
    if path.is_file():
        header = read_gguf_header(path)
        supported_gguf(header, path)
        return ModelDescription(
            source=source,
            kind="gguf",
            config=gguf_config(header),
            architecture=_gguf_architecture(path, header),
            stored_bytes=sum(info.nbytes for info in header.tensors.values()),
        )
    folder = ModelFolder.judge(path)
    config, tensors = local_config(folder), stored_tensors(folder)
    if not tensors and any(path.glob("pytorch_model*.bin")):
        raise PreflightError(
            "this model has its weights only as pytorch_model.bin",
            where=str(path),
            hint="use a copy with safetensors files",
        )
    return ModelDescription(
        source=source,
        kind="safetensors" if tensors else "config",
        config=config,
        architecture=_sizes(config, tensors),
        stored_bytes=sum(info.nbytes for info in tensors.values()) if tensors else None,
    )


def _packed(source: str, path: Path | str) -> ModelDescription:
    """A quantized checkpoint, as what it would be with full weights."""
    if isinstance(path, str) or not path.is_dir():
        raise PreflightError(
            "is no folder of a quantized checkpoint",
            where=source,
            hint="name the folder with its config.json",
        )
    folder = ModelFolder.judge(path)
    config, tensors = without_quantization(local_config(folder)), stored_tensors(folder)
    return ModelDescription(
        source=source,
        kind="packed",
        config=config,
        architecture=_sizes(config, {}),
        stored_bytes=sum(info.nbytes for info in tensors.values()) if tensors else None,
    )


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without what it says of how the weights are packed, its parts included."""
    return {
        key: without_quantization(value) if key.endswith("_config") and isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in QUANTIZATION
    }


def stored_tensors(folder: ModelFolder) -> dict[str, TensorInfo]:
    """The tensors of a folder's safetensors checkpoint; empty where there is none."""
    found = checkpoint(folder)
    return {name: stored.info for name, stored in {**found.unlisted, **found.tensors}.items()}


def _sizes(config: dict[str, Any], tensors: dict[str, TensorInfo]) -> Architecture:
    """The sizes; of a model that cannot be quantized and has other sizes than these, why it cannot be."""
    try:
        return architecture(config, tensors)
    except PreflightError:
        refuse_model(config, tensors)
        raise


def local_config(folder: ModelFolder) -> dict[str, Any]:
    """A model's config.json (:func:`parse_config`).

    Raises:
        PreflightError: where there is none, naming what lies there instead.
        BadFile: for anything that is no configuration.
    """
    if "config.json" not in folder:
        nested = sorted(folder.path.glob("*.gguf"))
        raise PreflightError(
            "this directory has no config.json",
            where=str(folder.path),
            hint=f"name the file itself: {nested[0]}" if nested else "give a Hugging Face model directory",
        )
    return parse_config(folder.files["config.json"])


def parse_config(file: StampedFile) -> dict[str, Any]:
    """A config.json, its numbers and types bounded (:mod:`engine.architecture.limits`).

    Raises:
        BadFile: for anything that is no configuration.
    """
    config = parse_object(file.read(SMALL), file.path)
    check_config(config, file.path)
    return config


def _hub_config(repository: str, revision: str | None) -> dict[str, Any]:
    """config.json of a hub repository: from the local cache when it is there, else one download."""
    try:
        from huggingface_hub import hf_hub_download, try_to_load_from_cache
    except ImportError as error:
        raise PreflightError(
            "a hub id needs the package huggingface_hub", where=repository, hint="pip install huggingface_hub"
        ) from error
    try:
        cached = try_to_load_from_cache(repository, "config.json", revision=revision)
        if isinstance(cached, str):
            return parse_config(StampedFile.of(Path(cached)))
        _require_network(repository)
        fetched = hf_hub_download(repository, "config.json", revision=revision)
        return parse_config(StampedFile.of(Path(fetched)))
    except PreflightError:
        raise
    except Exception as error:  # huggingface_hub raises its own, requests' and httpx' errors
        reason = _hub_failure(error)
        raise PreflightError(
            f"the model's config.json cannot be had: {reason}",
            where=repository if revision is None else f"{repository}@{revision}",
            hint="check the id and revision, run `hf auth login` if it is gated, or give a local directory",
        ) from error


def _require_network(repository: str) -> None:
    """Say at once that there is no network: huggingface_hub would retry for half a minute first."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or {"https_proxy", "all_proxy"} & {name.lower() for name in os.environ}:
        return  # offline mode fails at once, and behind a proxy names are not resolved here
    host = urlsplit(constants.ENDPOINT).hostname or "huggingface.co"
    try:
        socket.getaddrinfo(host, 443)
    except OSError as error:
        raise PreflightError(
            f"the model's config.json is not in the local cache and {host} cannot be reached",
            where=repository,
            hint="connect to the network, or give a local directory",
        ) from error


def _hub_failure(error: Exception) -> str:
    """What went wrong at the hub, in words; the class names are stable over its releases."""
    names = {kind.__name__ for kind in type(error).__mro__}
    for name, reason in {
        "GatedRepoError": "the repository is gated and this account has no access",
        "RevisionNotFoundError": "there is no such revision",
        "RepositoryNotFoundError": "there is no such repository, and no local directory of this name",
        "LocalEntryNotFoundError": "the hub cannot be reached and the file is not in the local cache",
        "OfflineModeIsEnabled": "offline mode is on and the file is not in the local cache",
        "EntryNotFoundError": "the repository has no config.json",
    }.items():
        if name in names:
            return reason
    return f"the hub cannot be reached ({type(error).__name__})"


def gguf_config(header: GGUFHeader) -> dict[str, Any]:
    """A config.json-like dict from a GGUF header."""
    values, tensors = header.metadata, header.tensors
    name = header.architecture

    def field(key: str) -> Any:
        return values.get(f"{name}.{key}")

    embedding = tensors.get("token_embd.weight")
    config = {
        "model_type": GGUF_MODEL_TYPES.get(name, name),
        "vocab_size": embedding.shape[0]
        if embedding and embedding.shape
        else header.array_lengths.get("tokenizer.ggml.tokens"),
        "hidden_size": field("embedding_length"),
        "intermediate_size": field("feed_forward_length"),
        "num_hidden_layers": field("block_count"),
        "num_attention_heads": field("attention.head_count"),
        "num_key_value_heads": field("attention.head_count_kv"),
        "head_dim": field("attention.key_length"),
        "sliding_window": field("attention.sliding_window"),
        "max_position_embeddings": field("context_length"),
        "num_experts": field("expert_count"),
        "attn_logit_softcapping": field("attn_logit_softcapping"),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_output.bias" in tensors,
        "torch_dtype": "float32",
    }
    return {key: value for key, value in config.items() if value is not None}


def _gguf_architecture(path: Path, header: GGUFHeader) -> Architecture:
    """Formula sizes, called exact only if they add up to what the header lists."""
    config = gguf_config(header)
    check_config(config, path)
    formula = architecture(config)
    stored = sum(info.elements for name, info in header.tensors.items() if not name.startswith("rope_"))
    exact = formula.exact and stored == formula.params
    unfit = unfit_weight(header.tensors, formula.blocks)
    return msgspec.structs.replace(formula, exact=exact, unfit=unfit, from_files=True)
