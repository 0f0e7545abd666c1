"""GGUF as an export format: what is asked of it before training, and whether the file is what was trained.

Integers and scales have to be in the file bit for bit. Of 4-bit groups with zero points of their own, the
file has a bias in float16 in the place of the zero point: there it has to be the nearest one, and by how
much that moves a weight is measured and said.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from engine.architecture.gguf_writing import full_rotary
from engine.config.formats import Format
from engine.errors import EqatError
from engine.export.comparing import difference
from engine.export.gguf_file import check_names, described
from engine.export.gguf_metadata import FILE_TYPES
from engine.export.gguf_reader import GGUFContent, GGUFFileReader, GGUFSource
from engine.export.layout import Form, Linears
from engine.models.carried import CarriedTensor
from engine.quant.packed import PackedWeight

if TYPE_CHECKING:
    from engine.models.causal_lm import CausalLM
    from engine.models.source import ModelSource

SAME = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "tie_word_embeddings",
    "rms_norm_eps",
)
GEMMA_SAME = (
    "head_dim",
    "sliding_window",
    "layer_types",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
)
"""Fields of a configuration that the metadata has to give back."""
Q4_1 = 3
ROUNDED = 0.25
"""What rounded biases, each of them the nearest there is, may make of logits, in units of their standard
deviation: on a real model of 30 blocks it was 0.02. Another network differs by more than one."""


class GGUF(Form):
    """One file of llama.cpp's."""

    tags = ("gguf",)

    def __init__(self, row: Format) -> None:
        super().__init__(row)
        self._moved = 0.0

    def sentence(self, bits: str, dtype: str) -> str:
        heads = self.head_sentence() or f"embeddings and head are {dtype}; "
        return (
            f"The linear layers of the decoder blocks are {bits}-bit integers; {heads}norms and biases are "
            "float32."
        )

    def check(self, lm: CausalLM, stored: torch.dtype) -> None:
        check_names(lm)
        described(lm)

    def called(self, lm: CausalLM, name: str) -> str:
        return name

    def linear_called(self, lm: CausalLM, name: str) -> str:
        return name

    def carried(self, lm: CausalLM) -> list[CarriedTensor]:
        return []

    def reader(self, directory: Path) -> GGUFFileReader:
        return GGUFFileReader(directory)

    def open(
        self, directory: Path, device: torch.device, dtype: torch.dtype, *, trust_remote_code: bool = False
    ) -> CausalLM:
        from engine.models.causal_lm import CausalLM

        return CausalLM(cast("ModelSource", GGUFSource(directory)), device, dtype)

    def declared(self, packed: CausalLM, computed: torch.dtype) -> torch.dtype:
        return computed  # a file asks for none

    def misdescribed(
        self, packed: CausalLM, lm: CausalLM, stored: torch.dtype, linears: Linears
    ) -> Iterator[str]:
        have, want = packed.source.config, lm.source.config
        for name in (*SAME, *(GEMMA_SAME if "gemma" in str(have.model_type) else ())):
            one, other = getattr(have, name, None), getattr(want, name, None)
            if name == "tie_word_embeddings":
                other = lm.tied  # two different matrices are not tied, whatever the configuration said
            if not _same(one, other):
                yield f"the metadata make {name} {one}, and it is {other}"
        one, other = full_rotary(have.to_dict()), full_rotary(want.to_dict())
        for name in ("rope_type", "rope_theta", "factor"):
            if not _same(one.get(name), other.get(name)):
                yield f"the metadata make {name} {one.get(name)}, and it is {other.get(name)}"
        content = _reader(packed).content
        kinds = {_NAMES[place.type] for place in content.tensors.values()}
        said = content.metadata.get("general.file_type")
        if said not in {number for name, number in FILE_TYPES.items() if name in kinds}:
            yield "general.file_type is of no type that the file has"
        yield from _other_words(content, lm)

    def linear_differences(self, packed: CausalLM, name: str, weight: PackedWeight) -> list[str]:
        try:
            found = _reader(packed).blocks(name)
        except EqatError as error:
            return [str(error)]
        codes, zero, scale = weight.codes(), weight.zero_point, weight.scale.to(torch.float16)
        if found.numbers_OI.shape != tuple(codes.shape):
            return [f"{name}: {list(found.numbers_OI.shape)} numbers in place of {list(codes.shape)}"]
        repeat = found.d_OB.shape[1] // scale.shape[1]
        d, numbers = torch.from_numpy(found.d_OB.copy()), torch.from_numpy(found.numbers_OI)
        scales, zeros = (part.repeat_interleave(repeat, dim=1) for part in (scale, zero))
        if found.type == Q4_1:
            assert found.m_OB is not None
            exact = -zeros.double() * scales.double()
            self._moved = max(self._moved, _moved(found.m_OB, exact.numpy(), scales.double().numpy()))
            pairs = [
                ("integers", numbers, codes.to(torch.int8)),
                ("scales", d, scales),
                ("biases", torch.from_numpy(found.m_OB.copy()) + 0.0, exact.half() + 0.0),
            ]
        else:
            each = numbers.shape[1] // d.shape[1]
            wide = torch.int8 if weight.bits < 8 else torch.int16
            numbers = numbers.to(wide)
            turned = d.signbit() != scales.signbit()
            if bool(turned.any()):  # a scale and numbers of the other sign are the same weights
                sign = 1 - 2 * turned.to(wide)
                numbers, d = numbers * sign.repeat_interleave(each, dim=1), d * sign
            steps = codes.to(wide).sub_(zeros.to(wide).repeat_interleave(each, dim=1))
            pairs = [("integers", numbers, steps), ("scales", d, scales)]
        differences = (difference(have, want, what) for what, have, want in pairs)
        return [f"{name}: {words}" for words in differences if words]

    def value_differences(self, packed: CausalLM, name: str, want: Tensor) -> list[str]:
        reader = _reader(packed)
        if want.ndim < 2:
            want = want.float() + float(reader.adds_one(name))
        try:
            words = difference(reader.stored(name), want, "values")
        except EqatError as error:
            return [str(error)]
        return [f"{name}: {words}"] if words else []

    def tolerance(self, of_arithmetic: float) -> float:
        return max(of_arithmetic, ROUNDED) if self._moved else of_arithmetic

    def rounded(self) -> str:
        if not self._moved:
            return ""
        return (
            "the file has a bias in float16 in the place of each zero point, which moves weights by up to "
            f"{100 * self._moved:.2g} % of a step"
        )


_NAMES = {0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 8: "Q8_0", 30: "BF16", 42: "Q2_0"}


def _reader(packed: CausalLM) -> GGUFFileReader:
    return cast("GGUFFileReader", packed.source.weights)


def _moved(m: np.ndarray, exact: np.ndarray, step: np.ndarray) -> float:
    """By how much of a step biases differ from what they stand for, at most."""
    return float((np.abs(m.astype(np.float64) - exact) / step).max())


def _same(one: Any, other: Any) -> bool:
    """Equal, floats to what float32 holds of them."""
    if isinstance(one, float) and isinstance(other, int | float):
        return bool(np.float32(one) == np.float32(other))
    return bool(one == other)


def _other_words(content: GGUFContent, lm: CausalLM) -> Iterator[str]:
    """Tokens that are not those of the model's tokenizer, each under its number."""
    words = content.metadata.get("tokenizer.ggml.tokens") or []
    if lm.source.file is not None:
        before = GGUFContent(lm.source.file).metadata
        for key, value in before.items():
            if key.startswith("tokenizer.") and content.metadata.get(key) != value:
                yield f"{key} is not what the model's own file has"
        return
    if len(words) != lm.vocab_size:
        yield f"the file has {len(words)} tokens, the embedding {lm.vocab_size} rows"
        return
    for word, number in lm.source.tokenizer().get_vocab().items():
        if number < len(words) and words[number] not in (word, word.replace("\u2581", " ")):
            yield f"token {number} is {words[number][:40]!r} in the file, and {word[:40]!r}"
            return
