"""An export as one GGUF file, which llama.cpp and what is built on it load.

The quantized linears are blocks of the type that their grid fits (:mod:`engine.architecture.gguf_writing`),
written from the trained integers; embeddings and head have the type of ``export.dtype``, and vectors are
float32, as llama.cpp computes with them. The name of the file says the type, and of Q2_0 that its blocks are
of 64: older files of a fork that are called so too have blocks of 128, and print garbage elsewhere.

Blocks are asked for one at a time and appended. A file's header comes first and says where every tensor is,
but how long it is does not depend on that, so room is left for it, and it is filled in at the end. Tensors
that llama.cpp does not ask for have no place in a file, for it counts them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.architecture.gguf_writing import ARCHITECTURES, TYPE_IDS, full_rotary, vector_type
from engine.errors import PreflightError
from engine.export.card import model_card
from engine.export.checkpoint import Export, blocks_name, each_block, outer_names, write_card
from engine.export.gguf_blocks import blocks_of
from engine.export.gguf_metadata import Value, add, general, kept, network
from engine.export.gguf_tokenizer import tokenizer_metadata
from engine.export.layout import Linear
from engine.export.result import ExportResult
from engine.export.stored import dtype_name, stored_form
from engine.models.foreign import foreign
from engine.models.gguf import llama3_divisors
from engine.models.gguf_names import ROPE_DIVISORS, GGUFNames, permute_rotary

if TYPE_CHECKING:
    from engine.models.causal_lm import CausalLM

ALIGNMENT = 32

_LOADING = """## Loading

One GGUF file, {kind}: with llama.cpp

```
llama-cli -m {file}
```

or with llama-cpp-python

```python
from llama_cpp import Llama

model = Llama("{file}", n_ctx=4096)
```
"""


class Placed(NamedTuple):
    """A tensor of the file: its shape, its type, and what it takes."""

    shape: tuple[int, ...]
    kind: str
    nbytes: int


def architecture_of(lm: CausalLM) -> str:
    """llama.cpp's name of a model's architecture.

    Raises:
        PreflightError: for one that no GGUF file is written of.
    """
    model_type = str(lm.source.config.model_type)
    if model_type not in ARCHITECTURES:
        raise PreflightError(
            f"GGUF files of model type {model_type!r} are not written",
            where="export.formats",
            hint=f"leave gguf out of export.formats; it holds {', '.join(ARCHITECTURES)}",
        )
    return ARCHITECTURES[model_type]


def described(lm: CausalLM) -> dict[str, Value]:
    """What the file says of the model and its tokenizer.

    Raises:
        PreflightError: for a tokenizer that it cannot hold.
        IdentityError: when a GGUF file is no longer the one that was opened.
    """
    if lm.source.file is not None:
        with foreign("the GGUF file's metadata cannot be read", str(lm.source.file)):
            said = kept(lm.source.file)
        for stamped in lm.source.weights.files():
            stamped.check()
        return said
    tokenizer = tokenizer_metadata(lm.source.tokenizer(), lm.vocab_size, lm.source.config)
    return network(architecture_of(lm), lm) | tokenizer


def write_file(export: Export, directory: Path) -> ExportResult:
    """The GGUF file and its card, into the empty ``directory``."""
    lm = export.lm
    architecture = architecture_of(lm)
    metadata = described(lm)
    names = _Names(architecture, lm)
    linears: dict[str, Linear] = {}
    placed: dict[str, Placed] = {}
    kinds: dict[str, int] = {}
    heads = {names.stored(f"{name}.weight") for name in export.heads}
    in_heads = 0
    writing, header = directory / "model.gguf.writing", directory / "header.writing"
    room = len(_header(header, architecture, general("Q4_0", *_said(export)) | metadata, names.expected()))
    with writing.open("wb") as file:
        file.write(bytes(room))
        for name, placing, data in _tensors(export, names, linears):
            placed[name] = placing
            file.write(data.tobytes())
            file.write(bytes(-placing.nbytes % ALIGNMENT))
            if name in heads:
                in_heads += placing.nbytes
            elif placing.kind not in ("F32", "F16", "BF16"):
                kinds[placing.kind] = kinds.get(placing.kind, 0) + placing.nbytes
        # The last type that most bytes have; there is one unless grids are mixed.
        kind = max(kinds, key=lambda each: kinds[each])
        beginning = _header(header, architecture, general(kind, *_said(export)) | metadata, placed)
        assert len(beginning) == room, "the header has another length than was left for it"
        file.seek(0)
        file.write(beginning)
    path = directory / file_name(_said(export)[0], kind)
    writing.replace(path)
    counted = (*linears.values(), *map(Linear.of, export.heads.values()))
    weights = sum(each.out_features * each.in_features for each in counted)
    result = ExportResult(
        path=directory,
        format=export.form.format.name,
        bytes=path.stat().st_size,
        fp_bytes=lm.fp_bytes(),
        bits_per_weight=8 * (sum(kinds.values()) + in_heads) / max(1, weights),
        files=(path.name,),
        blocks_name=blocks_name(lm),
        dtype=dtype_name(export.stored_as),
    )
    loading = _LOADING.format(kind=kind, file=path.name)
    card = model_card(export.card, result, linears, form=export.form_of_it(), loading=loading)
    write_card(directory, card)
    return result


def file_name(name: str, kind: str) -> str:
    """``SmolLM2-135M-Q4_0.gguf``."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:80] or "model"
    return f"{plain}-{kind}{'_g64' if kind == 'Q2_0' else ''}.gguf"


class _Names:
    """What the model's tensors are called in the file, and how they change."""

    def __init__(self, architecture: str, lm: CausalLM) -> None:
        self.lm = lm
        self.gguf = GGUFNames(architecture, lm.blocks)
        self.shapes = {name: tuple(each.shape) for name, each in lm.model.named_parameters()}
        config = lm.source.config
        heads = int(config.num_attention_heads)
        self.heads = heads, int(getattr(config, "num_key_value_heads", None) or heads)

    def expected(self) -> dict[str, Placed]:
        """Every tensor, in order; of types nothing is said."""
        found = {name: Placed(divisors.shape, "F32", 0) for name, divisors in rotary_divisors(self.lm)}
        inside = [name for index in range(self.lm.blocks) for name in self.of_block(index)]
        for name in [*outer_names(self.lm), *inside]:
            found[self.stored(name)] = Placed(self.shapes[name], "F32", 0)
        return found

    def of_block(self, index: int) -> list[str]:
        """Full names of a block's parameters."""
        prefix = self.lm.block_prefix(index) + "."
        return [name for name in self.shapes if name.startswith(prefix)]

    def stored(self, name: str) -> str:
        """The file's name of a tensor.

        Raises:
            PreflightError: for one that llama.cpp does not know.
        """
        stored = self.gguf.stored(name)
        if not stored:
            raise PreflightError(
                "has no name in a GGUF file",
                where=name,
                hint="leave gguf out of export.formats",
            )
        return stored

    def permuted(self, stored: str) -> int:
        """Heads whose rows lie in llama.cpp's order."""
        return self.gguf.permuted_heads(stored, *self.heads)


def check_names(lm: CausalLM) -> None:
    """PreflightError for a model with a tensor that llama.cpp has no name for."""
    _Names(architecture_of(lm), lm).expected()


def _tensors(
    export: Export, names: _Names, linears: dict[str, Linear]
) -> Iterator[tuple[str, Placed, np.ndarray]]:
    """Every tensor in the order of the file; ``linears`` is filled with those that are quantized."""
    lm = export.lm
    for name, divisors in rotary_divisors(lm):
        yield name, Placed(divisors.shape, "F32", divisors.nbytes), divisors
    for name in outer_names(lm):
        head = export.heads.get(name.removesuffix(".weight"))
        if head is None:
            yield _plain(export, names, name, lm.weights.load(name))
            continue
        kind, data = blocks_of(name, head)
        yield names.stored(name), Placed((head.out_features, head.in_features), kind, data.nbytes), data
    for index, block in each_block(export):
        prefix = lm.block_prefix(index)
        for full in names.of_block(index):
            name = full.removeprefix(f"{prefix}.")
            weight = block.linears.get(name.removesuffix(".weight"))
            if weight is None:
                tensor = block.others.get(name)
                yield _plain(export, names, full, lm.weights.load(full) if tensor is None else tensor)
                continue
            linears[full.removesuffix(".weight")] = Linear.of(weight)
            stored = names.stored(full)
            kind, data = blocks_of(full, weight, names.permuted(stored))
            yield stored, Placed((weight.out_features, weight.in_features), kind, data.nbytes), data


def _plain(export: Export, names: _Names, name: str, tensor: Tensor) -> tuple[str, Placed, np.ndarray]:
    stored = names.stored(name)
    value = stored_form(name, tensor, export.stored_as).cpu()
    kind = vector_type(dtype_name(export.stored_as), value.ndim)
    if heads := names.permuted(stored):
        value = permute_rotary(value, heads)
    if kind == "F32":
        value = value.float() + names.gguf.added(stored)
    data = value.contiguous()
    array = data.view(torch.int16).numpy() if kind == "BF16" else data.numpy()
    return stored, Placed(tuple(value.shape), kind, array.nbytes), array


def rotary_divisors(lm: CausalLM) -> Iterator[tuple[str, np.ndarray]]:
    """The table by which llama.cpp divides rotary frequencies, of the models that have one."""
    config: Any = lm.source.config
    rope = full_rotary(config.to_dict())
    if rope["rope_type"] != "llama3":
        return
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    steps = torch.arange(head_dim // 2, dtype=torch.float64) / (head_dim // 2)
    divisors = llama3_divisors(float(rope["rope_theta"]) ** -steps, float(rope["factor"]))
    yield ROPE_DIVISORS, divisors.float().numpy()


def _said(export: Export) -> tuple[str, str, str]:
    base = str(export.card.get("base_model") or "")
    name = base.rstrip("/").rpartition("/")[2].removesuffix(".gguf") or export.source.name
    if export.source.file is not None:  # of a file that is called after its type, this is another one
        name = re.sub(r"[.-](i?q\d\w*|b?f16|f32)$", "", name, flags=re.IGNORECASE)
    return name, base, str(export.card.get("license") or "")


def _header(
    path: Path, architecture: str, metadata: Mapping[str, Value], tensors: Mapping[str, Placed]
) -> bytes:
    """Everything before the first tensor, packed by the gguf package; ``path`` is where it may write."""
    import gguf

    class Writer(gguf.GGUFWriter):  # type: ignore[misc]
        def _pack_val(self, val: Any, vtype: Any, add_vtype: bool, sub_type: Any = None) -> bytes:
            if vtype == gguf.GGUFValueType.ARRAY and len(val) == 0:
                # The package writes no empty list, and does not tell of what one is that it reads.
                inner = gguf.GGUFValueType.STRING if sub_type is None else sub_type
                return self._pack("I", vtype) + self._pack("I", inner) + self._pack("Q", 0)
            return super()._pack_val(val, vtype, add_vtype, sub_type)

    writer = Writer(path, architecture)
    add(writer, metadata)
    for name, (shape, kind, nbytes) in tensors.items():
        # The package's own enumeration lacks the newest types, so it gets the number.
        writer.add_tensor_info(name, shape, np.dtype(np.float32), nbytes, raw_dtype=TYPE_IDS[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    content = path.read_bytes()
    path.unlink()
    return content + bytes(-len(content) % ALIGNMENT)
