"""Reading a GGUF file one tensor at a time, as the float weights that its quantized blocks stand for.

A GGUF file names and orders weights as llama.cpp does; what differs from transformers
(:mod:`engine.models.gguf_names`) is undone here, tensor by tensor.

A tensor is read from its place in the file and dequantized in slices, so the memory needed is that of
the float tensor and one slice. The file's own quantization error is part of the model from then on:
full precision means "as good as this file".
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from engine.architecture.description import gguf_config as described
from engine.architecture.gguf_header import GGML_TYPES, GGUF_MODEL_TYPES, gguf_header, supported_gguf
from engine.architecture.gguf_writing import GEMMA3_LOCAL_THETA, GEMMA_27B, TYPE_IDS, attention_scale
from engine.architecture.limits import LARGEST_SIZE, MOST_BLOCKS, MOST_HEADS, MOST_POSITIONS, WIDEST
from engine.architecture.refusals import refuse_model
from engine.errors import PreflightError
from engine.models.foreign import foreign
from engine.models.gguf_names import ROPE_DIVISORS, GGUFNames, unpermute_rotary
from engine.models.weights import read_exactly
from engine.system.stamps import StampedFile

SLICE_BYTES = 8 << 20
BOUNDS = {
    "block_count": MOST_BLOCKS,
    "embedding_length": WIDEST,
    "feed_forward_length": LARGEST_SIZE,
    "attention.head_count": MOST_HEADS,
    "attention.head_count_kv": MOST_HEADS,
    "attention.key_length": WIDEST,
    "attention.sliding_window": MOST_POSITIONS,
    "context_length": MOST_POSITIONS,
}
"""The largest value of each whole number that is used; the smallest is 1."""

LLAMA3_LOW, LLAMA3_HIGH, LLAMA3_CONTEXT = 1.0, 4.0, 8192
"""Frequency limits (turns within the original context) and that context, the same in all Llama 3.1 to 3.3."""


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor's place in the file; ``shape`` in torch's order, slowest dimension first."""

    start: int
    nbytes: int
    type: str
    """GGML's name of it."""
    shape: tuple[int, ...]


class GGUFReader:
    """Float32 weights of a GGUF file under the names that transformers uses."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._stamped = StampedFile.of(file)
        header = gguf_header(self._stamped)
        self.architecture = supported_gguf(header, file)
        refuse_model(described(header), header.tensors)
        self._tensors = {
            name: GGUFTensor(info.start, info.nbytes, info.dtype, info.shape)
            for name, info in header.tensors.items()
        }
        self.metadata = {
            name.removeprefix(f"{self.architecture}."): value
            for name, value in header.metadata.items()
            if name.startswith(f"{self.architecture}.")
        }
        self.tokenizer_settings = {
            name: value for name, value in header.metadata.items() if name.startswith("tokenizer.")
        }
        self.special_tokens = {
            token: value
            for token in ("bos", "eos", "padding")
            if _is_token(value := header.metadata.get(f"tokenizer.ggml.{token}_token_id"))
        }
        self._gguf = GGUFNames(self.architecture, self.number("block_count"))

    def header_bytes(self) -> bytes:
        """Everything before the first tensor's values."""
        end = min((tensor.start for tensor in self._tensors.values()), default=0)
        raw = torch.empty(end, dtype=torch.uint8)
        read_exactly(self._stamped, 0, raw)
        return raw.numpy().tobytes()

    # -- WeightReader ------------------------------------------------------------------------------

    def names(self) -> list[str]:
        return sorted(self._tensors)

    def __contains__(self, name: str) -> bool:
        return self._stored(name) in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensor(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def where(self, name: str) -> str:
        return str(self.file)

    def files(self) -> list[StampedFile]:
        return [self._stamped]

    def inventory(self) -> list[str]:
        return [f"{name} {t.type} {t.shape} {t.start}" for name, t in sorted(self._tensors.items())]

    def load(self, name: str) -> Tensor:
        stored, tensor = self._stored(name), self._tensor(name)
        weight = self._dequantize(tensor)
        all_heads = self.number("attention.head_count")
        heads = self._gguf.permuted_heads(
            stored, all_heads, self.number("attention.head_count_kv", all_heads)
        )
        if heads:
            if not weight.ndim or weight.shape[0] % (2 * heads):
                raise self._unusable(f"tensor {stored} has not a whole number of rows for {heads} heads")
            weight = unpermute_rotary(weight, heads)
        return weight.sub_(self._gguf.added(stored))

    def leftover(self, wanted: Iterable[str]) -> list[str]:
        """Stored tensors that none of the wanted names refers to.

        A GGUF file holds one language model and nothing else, so there must be none.
        """
        used = {self._stored(name) for name in wanted}
        return sorted(set(self._tensors) - used - {ROPE_DIVISORS})

    # ----------------------------------------------------------------------------------------------

    def number(self, name: str, default: int | None = None) -> int:
        """A whole number of the metadata, the architecture's prefix left out, between 1 and its bound."""
        value = self.metadata.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool):
            # Absent, or a list: some pruned models have another number in every layer.
            raise self._unusable(
                f"metadata {self.architecture}.{name} is {'missing' if value is None else 'not one number'}"
            )
        if not 1 <= value <= BOUNDS[name]:
            raise self._unusable(
                f"metadata {self.architecture}.{name} is {value}, not between 1 and {BOUNDS[name]}"
            )
        return value

    def positive(self, name: str, most: float, default: float | None = None) -> float:
        """A number above 0 and up to ``most`` of the metadata, the architecture's prefix left out."""
        value = self.metadata.get(name, default)
        number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
        if not 0 < number <= most:
            raise self._unusable(
                f"metadata {self.architecture}.{name} is "
                f"{'missing' if value is None else f'no number above 0 and up to {most:g}'}"
            )
        return number

    def _unusable(self, message: str) -> PreflightError:
        return PreflightError(message, where=str(self.file), hint="use the model's safetensors checkpoint")

    def rope_divisors(self) -> Tensor | None:
        """What llama.cpp divides the rotary frequencies by (Llama 3.1 and later); None for most models."""
        tensor = self._tensors.get(ROPE_DIVISORS)
        if tensor is not None and (len(tensor.shape) != 1 or not 1 <= tensor.shape[0] <= WIDEST):
            raise self._unusable(f"tensor {ROPE_DIVISORS} is no list of divisors")
        return None if tensor is None else self._dequantize(tensor)

    def _stored(self, name: str) -> str:
        """GGUF name of a transformers parameter; empty when there is none."""
        return self._gguf.stored(name)

    def _tensor(self, name: str) -> GGUFTensor:
        try:
            return self._tensors[self._stored(name)]
        except KeyError:
            raise PreflightError(
                f"tensor {name!r} is missing from the file",
                where=str(self.file),
                hint="download the file again, or use the model's safetensors checkpoint",
            ) from None

    def _dequantize(self, tensor: GGUFTensor) -> Tensor:
        _, block, block_bytes = GGML_TYPES[TYPE_IDS[tensor.type]]
        result = torch.empty(tensor.shape, dtype=torch.float32)
        flat = result.view(-1)
        blocks_in_slice = max(1, SLICE_BYTES // block_bytes)
        for first in range(0, tensor.nbytes // block_bytes, blocks_in_slice):
            count = min(blocks_in_slice, tensor.nbytes // block_bytes - first)
            raw = torch.empty(count * block_bytes, dtype=torch.uint8)
            read_exactly(self._stamped, tensor.start + first * block_bytes, raw)
            values = _to_float(raw.numpy(), tensor.type, self.file)
            flat[first * block : (first + count) * block] = torch.from_numpy(values.reshape(-1))
        return result


_PLAIN = {"F32": np.float32, "F16": np.float16, "F64": np.float64}


def _to_float(raw: np.ndarray, kind: str, file: Path) -> np.ndarray:
    """Floats that a row of whole quantization blocks stands for."""
    import gguf

    if kind in _PLAIN:
        return raw.view(_PLAIN[kind]).astype(np.float32)
    if kind == "Q2_0":
        return _two_bits(raw)
    try:
        known = gguf.GGMLQuantizationType[kind]
    except KeyError as error:  # older releases of the package lack the newest types
        raise PreflightError(
            f"GGUF quantization {kind} cannot be read by this version of the gguf package",
            where=str(file),
            hint="update gguf, or use the model's safetensors checkpoint",
        ) from error
    try:
        return gguf.dequantize(raw, known)
    except (NotImplementedError, KeyError) as error:
        raise PreflightError(
            f"GGUF quantization {kind} cannot be read",
            where=str(file),
            hint="use a file of type F16, BF16, Q8_0, Q6_K or Q4_K, or the safetensors checkpoint",
        ) from error


def _two_bits(raw: np.ndarray) -> np.ndarray:
    """Q2_0, which the gguf package does not know yet: a float16 and 64 numbers q of two bits, which stand for
    ``(q - 1) * d``; four in a byte, the first in its low bits."""
    blocks = raw.reshape(-1, 18)
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    codes = (blocks[:, 2:, None] >> np.array([0, 2, 4, 6], np.uint8)) & 3
    return scale * (codes.reshape(len(blocks), 64).astype(np.float32) - 1)


def _is_token(value: Any) -> bool:
    """Whether it is the number of a token; files carry others where they have none."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < LARGEST_SIZE


def gguf_config(reader: GGUFReader) -> PreTrainedConfig:
    """The configuration that the file's metadata describes.

    transformers can read it too, but it leaves out rotary scaling, Qwen's head size and Phi's window.
    """
    stored = reader.metadata
    hidden, heads = reader.number("embedding_length"), reader.number("attention.head_count")
    theta = reader.positive("rope.freq_base", 1e30, 10000.0)
    embedding = reader.shape("model.embed_tokens.weight")
    if len(embedding) != 2 or not 1 <= embedding[0] <= LARGEST_SIZE:
        raise PreflightError(
            f"the embedding has the shape {list(embedding)}",
            where=str(reader.file),
            hint="use the model's safetensors checkpoint",
        )
    options: dict[str, Any] = {
        "vocab_size": embedding[0],
        "hidden_size": hidden,
        "intermediate_size": reader.number("feed_forward_length"),
        "num_hidden_layers": reader.number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": reader.number("attention.head_count_kv", heads),
        "max_position_embeddings": reader.number("context_length"),
        "rms_norm_eps": reader.positive("attention.layer_norm_rms_epsilon", 1.0),
        "tie_word_embeddings": "output.weight" not in reader.names(),
        "rope_parameters": rope_parameters(reader, theta),
        "bos_token_id": reader.special_tokens.get("bos"),
        "eos_token_id": reader.special_tokens.get("eos"),
        "pad_token_id": reader.special_tokens.get("padding"),
    }
    if reader.architecture != "phi3":
        options["head_dim"] = reader.number("attention.key_length", hidden // heads)
    if reader.architecture in ("gemma2", "gemma3", "phi3") and "attention.sliding_window" in stored:
        options["sliding_window"] = reader.number("attention.sliding_window")
    if reader.architecture in GEMMA_27B:
        options["query_pre_attn_scalar"] = attention_scale(
            reader.architecture, options["num_hidden_layers"], hidden, heads, options["head_dim"]
        )
        for key in ("attn_logit_softcapping", "final_logit_softcapping"):
            if key in stored:
                options[key] = reader.positive(key, 1e6)
    if reader.architecture == "llama":
        options["attention_bias"] = "blk.0.attn_output.bias" in reader.names()
        options["mlp_bias"] = "blk.0.ffn_down.bias" in reader.names()
    with foreign("transformers does not understand the file's metadata", str(reader.file)):
        return AutoConfig.for_model(GGUF_MODEL_TYPES[reader.architecture], **options)


def rope_parameters(reader: GGUFReader, theta: float) -> dict[str, Any]:
    """Rotary base and scaling, as far as its parameters are known; anything else is refused.

    A model with the wrong rotary table looks alive and is not.
    """
    kind = str(reader.metadata.get("rope.scaling.type", "none"))[:80]
    divisors = reader.rope_divisors()
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if kind == "linear" and divisors is None:
        parameters |= {"rope_type": "linear", "factor": reader.positive("rope.scaling.factor", 1e6)}
    elif kind == "none" and divisors is not None:
        parameters |= _llama3_scaling(divisors, theta, str(reader.file))
    elif kind != "none" or any(name.startswith("rope_factors") for name in reader.names()):
        raise PreflightError(
            f"rotary scaling of type {kind!r} is not read from GGUF files",
            where=str(reader.file),
            hint="use the model's safetensors checkpoint",
        )
    if reader.architecture == "gemma3":
        # Only the layers that see the whole context are scaled; the local ones have a table of their own.
        local = {"rope_type": "default", "rope_theta": GEMMA3_LOCAL_THETA}
        return {"full_attention": parameters, "sliding_attention": local}
    return parameters


def _llama3_scaling(divisors: Tensor, theta: float, where: str) -> dict[str, Any]:
    """Parameters of Llama 3.1's rule, which a file stores as its result: one divisor a frequency."""
    frequencies = theta ** (-torch.arange(len(divisors), dtype=torch.float64) / len(divisors))
    factor = float(divisors.max())
    if not torch.allclose(llama3_divisors(frequencies, factor), divisors.double(), rtol=1e-3):
        raise PreflightError(
            "the rotary scaling stored in the file is not Llama 3.1's",
            where=where,
            hint="use the model's safetensors checkpoint",
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": LLAMA3_LOW,
        "high_freq_factor": LLAMA3_HIGH,
        "original_max_position_embeddings": LLAMA3_CONTEXT,
    }


def llama3_divisors(frequencies: Tensor, factor: float) -> Tensor:
    """Llama 3.1's rule: high frequencies stay, low ones are divided by ``factor``, between them a ramp."""
    turns = LLAMA3_CONTEXT * frequencies / (2 * torch.pi)
    kept = ((turns - LLAMA3_LOW) / (LLAMA3_HIGH - LLAMA3_LOW)).clamp(0.0, 1.0)
    return 1.0 / ((1 - kept) / factor + kept)
