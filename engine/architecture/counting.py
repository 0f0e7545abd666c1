"""Which stored tensors are the model's, told by their names and shapes alone.

The plan has no model to ask, only config.json and the headers of the files. What it has to know is simple: a
checkpoint has one list of blocks, as long as config.json says; around it lie embeddings, norms, positions,
projections and a head; and whatever else it holds goes through a run without being touched
(:mod:`engine.models.carried`, which asks the model itself, is the judge; tests compare the two).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Set

import msgspec

from engine.architecture.headers import FLOATS, TensorInfo
from engine.architecture.leftovers import why_no_weight
from engine.architecture.limits import MOST_BLOCKS
from engine.architecture.unfit import is_norm

Tensors = dict[str, TensorInfo]

IN_BLOCK = re.compile(r"^(?P<list>.*?\b(?:layers|h|blocks|blk))\.(?P<block>\d{1,6})\.(?P<name>.+)$")
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output_projection|unembed|output)\.(weight|bias)$")
_TOWER = re.compile(r"vision|visual|audio|speech|image|vqmodel|multi_?modal|mm_projector")
_BESIDE = re.compile(r"mtp|nextn|next_n|multi_token|medusa|eagle|draft")
"""Parts that predict more than the next token; they may lie among the outer tensors."""


class Counted(msgspec.Struct, frozen=True):
    """The tensors of a checkpoint, sorted."""

    list_name: str
    """What the list of blocks is called, such as ``model.layers``."""
    blocks: dict[int, Tensors]
    """Those of each block, by their names in it."""
    missing: str
    """A weight that has to be in a block and is not; empty where there is none."""
    outer: Tensors
    """The language model's other weights, the head not among them."""
    head: Tensors
    carried: Tensors
    """What an export takes over as it is."""

    @property
    def embedding(self) -> str:
        """Name of the input embeddings: the largest table outside the blocks; empty where there is none."""
        tables = [name for name, info in self.outer.items() if len(info.shape) == 2]
        return max(tables, key=lambda name: self.outer[name].elements, default="")

    def coded(self) -> Iterator[tuple[str, str]]:
        """Name and type of weights that are stored as something else than floating-point numbers."""
        inside = {
            f"{self.list_name}.{index}.{name}": info
            for index, block in sorted(self.blocks.items())
            for name, info in block.items()
        }
        for name, info in {**inside, **self.outer, **self.head}.items():
            if info.dtype not in FLOATS and name.endswith((".weight", ".bias")):
                yield name, info.dtype


def count(
    tensors: Mapping[str, TensorInfo], depth: int, *, is_part: bool, asked: Set[str] = frozenset()
) -> Counted | None:
    """Sort the tensors of a checkpoint whose model has ``depth`` blocks; None where no block is found.

    ``is_part`` says that the checkpoint is that of a larger model, of which the language model is a part.
    ``asked`` are the weights and biases of a block's linears, where the family is known so well: with them,
    what else a block holds is known to be no part of it.
    """
    weights = {name: info for name, info in tensors.items() if not why_no_weight(name, info.shape)}
    lists: dict[str, dict[int, Tensors]] = {}
    for name, info in weights.items():
        if (match := IN_BLOCK.match(name)) and not _TOWER.search(name) and int(match["block"]) < MOST_BLOCKS:
            lists.setdefault(match["list"], {}).setdefault(int(match["block"]), {})[match["name"]] = info
    if not lists:
        return None
    # As in the model itself: of the lists as long as it is deep, the heaviest.
    chosen = max(lists, key=lambda each: (set(range(depth)) <= lists[each].keys(), _weight(lists[each])))
    around = chosen.rpartition(".")[0]
    blocks = {index: block for index, block in lists[chosen].items() if index < depth}
    missing = _missing(chosen, blocks, depth, asked)
    if missing:
        asked = frozenset()
    counted = Counted(chosen, {index: {} for index in blocks}, missing, {}, {}, {})
    for name, info in weights.items():
        match = IN_BLOCK.match(name)
        if match and match["list"] == chosen and int(match["block"]) < depth:
            part = match["name"]
            if not asked or part in asked or is_norm(part):
                counted.blocks[int(match["block"])][part] = info
            elif info.listed:
                counted.carried[name] = info
            continue
        inside = not around or name.startswith(f"{around}.")
        if _HEAD.search(name) and not _BESIDE.search(name):
            counted.head[name] = info
        elif inside and not match and not _BESIDE.search(name):
            counted.outer[name] = info
        elif (inside or not is_part) and info.listed:
            counted.carried[name] = info
    return counted


def _missing(list_name: str, blocks: Mapping[int, Tensors], depth: int, asked: Set[str]) -> str:
    """The first weight of a block that the checkpoint lacks. What a block has is known of few families, but
    every block has something, and the blocks of others have the same names."""
    names = asked or {name for block in blocks.values() for name in block if name.endswith(".weight")}
    for index in range(depth):
        lacking = sorted((names if asked or index not in blocks else set()) - blocks.get(index, {}).keys())
        if lacking:
            return f"{list_name}.{index}.{lacking[0]}"
    return ""


def _weight(blocks: Mapping[int, Tensors]) -> int:
    return sum(info.elements for block in blocks.values() for info in block.values())
