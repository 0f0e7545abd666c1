"""Whether a quantized checkpoint can be imported, asked before a run is made of it:
``python -m engine.export.importing PATH [--reference MODEL]``.

Every linear is read once. What it has to say are lines of JSON on stdout, as in
:mod:`engine.export.judging`: ``{"done": .., "of": ..}`` while it works, and at the end an :class:`Importable`
or ``{"error": ..}``.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch

from engine.config.model import ModelConfig
from engine.config.tables import load_extensions
from engine.errors import EqatError, ExitCode, PreflightError
from engine.export.imported import (
    Grids,
    ImportedSource,
    check_whole,
    head_bits,
    imported_block,
    imported_source,
    quantized_heads,
    stored_linears,
    unpack,
)
from engine.export.judging import CPU, require_alike, say, say_error
from engine.export.reader import read_json
from engine.models.causal_lm import CausalLM
from engine.models.source import ModelSource
from engine.offline import offline
from engine.system.guarded import BadFile, read_text

ALIKE = 0.02
"""Of the norm of a tensor: types of 16 bits round by less."""
ROUNDED_ALIKE = 0.3
"""The same of an embedding and a head that are quantized: 4 bits in groups round by a tenth."""


class Importable(msgspec.Struct, frozen=True, kw_only=True):
    """What a run can be made of."""

    path: str
    format: str
    model_type: str
    blocks: int
    linears: int
    bits: int
    group_size: int
    symmetric: bool
    zero_point: Literal["learned", "fixed"]
    head_bits: int = 0
    """Of embedding and head, if these are quantized."""
    reference: str = ""
    """The original model; empty where none is named, or is at hand."""


def look_at(
    path: Path, reference: str | None = None, on_block: Callable[[int, int], None] = lambda done, of: None
) -> Importable:
    """Read every linear of the checkpoint in the folder ``path``.

    Raises:
        EqatError: names what cannot be imported, or what is wrong with the reference.
    """
    source = imported_source(ModelConfig(source=str(path)))
    lm = CausalLM(source, CPU, torch.float32)
    heads = quantized_heads(lm, source)
    check_whole(lm, source, heads)
    found = original_of(lm, source, reference)
    grids = Grids()
    for index in range(lm.blocks):
        on_block(index, lm.blocks)
        for stored in stored_linears(lm, index).values():
            grids.add(stored, unpack(source.weights, stored))
    grid = grids.shared()
    imported_block(lm, source, 0, grid)
    return Importable(
        path=str(path),
        format=source.weights.packed.format,
        model_type=str(source.config.model_type),
        blocks=lm.blocks,
        linears=len(source.weights.linears),
        bits=grid.bits,
        group_size=grid.group_size,
        symmetric=grid.symmetric,
        zero_point="learned" if grid.symmetric or grid.fixed_zero_point is None else "fixed",
        head_bits=head_bits(source, heads, grid),
        reference=found,
    )


# -- the original model --------------------------------------------------------------------------------


def original_of(lm: CausalLM, source: ImportedSource, asked: str | None) -> str:
    """The model that the checkpoint was made from: the one that is ``asked`` for, else the first that it
    names and that lies on this machine; empty where there is none."""
    if asked:
        require_original(lm, CausalLM(ModelSource.open(ModelConfig(source=asked)), CPU, lm.dtype), asked)
        return asked
    assert source.directory is not None
    for name in dict.fromkeys(_named(source.directory)):
        with offline(True):
            try:
                other = CausalLM(ModelSource.open(ModelConfig(source=name)), CPU, lm.dtype)
                require_original(lm, other, name)
            except EqatError:
                continue  # it is not here, or is another model
        return name
    return ""


def _named(directory: Path) -> Iterator[str]:
    """Models that a checkpoint calls the one it was made from, as far as they may be at hand: a folder by its
    whole path, or an id of the hub."""
    config = read_json(directory / "config.json")
    said = config.get("quantization_config")
    for tree in (config, said if isinstance(said, dict) else {}):
        for key in ("_name_or_path", "base_model", "model_name_or_path"):
            yield from _usable(tree.get(key), directory)
    try:
        card = read_text(directory / "README.md", follow=True)
    except BadFile:
        return
    if match := re.search(r"\A---\n.*?^base_model:\s*(?:\n\s*-\s*)?(\S+)\s*$.*?^---", card, re.M | re.S):
        yield from _usable(match[1].strip("\"'"), directory)


def _usable(name: object, directory: Path) -> Iterator[str]:
    if not isinstance(name, str) or not name.isprintable():
        return
    if os.path.isabs(name):
        if os.path.isdir(name) and not os.path.samefile(name, directory):
            yield name
    elif re.fullmatch(r"\w[\w.-]*/[\w][\w.-]*", name) and not os.path.exists(name) and _is_cached(name):
        yield name


def _is_cached(repository: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    try:
        return isinstance(try_to_load_from_cache(repository, "config.json"), str)
    except Exception:  # of whatever the library finds wrong with a name that somebody wrote
        return False


def require_original(lm: CausalLM, other: CausalLM, name: str) -> None:
    """``other``, the model called ``name``, is what the checkpoint ``lm`` was made from, as far as the
    tensors tell that nothing quantizes; what the two predict is compared through these.

    Raises:
        PreflightError: names what is another one's.
    """
    require_alike(lm, other, name)
    theirs, source = other.outer_state(), lm.source
    heads = quantized_heads(lm, source) if isinstance(source, ImportedSource) else {}
    for tensor, ours in lm.outer_state().items():
        same = tensor in theirs and theirs[tensor].shape == ours.shape
        share = ROUNDED_ALIKE if tensor.removesuffix(".weight") in heads else ALIKE
        if same and float((theirs[tensor] - ours).norm()) <= share * float(ours.norm()):
            continue
        raise PreflightError(
            f"its {tensor} is not that of the checkpoint",
            where=name,
            hint="name the model that it was made from",
        )


# -- a process of its own ------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0 for what can be imported."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # who asked is told by whoever started this
    parser = argparse.ArgumentParser(prog="python -m engine.export.importing")
    parser.add_argument("path", type=Path)
    parser.add_argument("--reference")
    given = parser.parse_args(arguments)
    try:
        load_extensions()
        found = look_at(given.path, given.reference, lambda done, of: say({"done": done, "of": of}))
    except EqatError as error:
        return say_error(error)
    tree: dict[str, Any] = msgspec.to_builtins(found)
    say({**tree, "importable": True})
    return int(ExitCode.DONE)


if __name__ == "__main__":
    sys.exit(main())
