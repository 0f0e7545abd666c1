"""Whether a quantized checkpoint is sound, whoever wrote it: ``python -m engine.export.judging PATH``.

It is opened by the reader of the format that it describes itself as, block by block, so that a large model
needs the memory of one block. Looked at are: whether every tensor of the model is there and has its shape,
whether the tensors of a linear fit each other and the described grid, and whether every scale and every other
number is finite. Against a reference model, the error of each linear is measured:
``||W_q - W|| / ||W||``, Frobenius norms over all its weights.

What it has to say are lines of JSON on stdout: ``{"done": .., "of": ..}`` while it works, and at the end one
object, either a :class:`Judgement` or ``{"error": ..}`` in the words of an EqatError.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from engine.config.model import ModelConfig
from engine.config.tables import load_extensions
from engine.errors import EqatError, ExitCode, PreflightError
from engine.export.described import ALIASES, beyond_the_weights, format_in
from engine.export.layout import Form, form_of
from engine.export.reader import EXPORT_AGAIN, TensorReader
from engine.models.causal_lm import CausalLM
from engine.models.source import ModelSource
from engine.system.guarded import BadFile

MOST_PROBLEMS = 200
"""So many are told; a file of noise has one in every tensor."""
UNFIT = (RuntimeError, ValueError, IndexError, TypeError)
"""What tensors raise whose shapes or types do not fit each other."""
CPU = torch.device("cpu")
NAMED_BY_METHOD = ("gptq_v2", "gptq", "awq", "compressed-tensors", "auto-round")
"""Formats that loaders know by ``quant_method`` of config.json."""
METHODS = ("gptq", "awq", "compressed-tensors", *ALIASES, *ALIASES.values())
"""What they may say there."""


class Judgement(msgspec.Struct, kw_only=True):
    """What was found."""

    path: str
    format: str
    label: str
    """Of the format, in words."""
    model_type: str = ""
    blocks: int = 0
    """Zero, and no model type, for files that no model can be made of."""
    linears: int = 0
    """Quantized ones."""
    tensors: int
    """All that are stored."""
    bytes: int
    """Of the files that hold them."""
    grids: dict[str, int] = {}
    """Quantized linears by grid: ``w3g128``, ``w4g64 symmetric``; of formats that keep integers."""
    problems: list[str] = []
    """In words, each with the tensor or file that it is about; none for a sound checkpoint."""
    notes: list[str] = []
    """What is no fault of the files and may surprise whoever loads them, in words."""
    more_problems: int = 0
    """Those beyond the ones that are listed."""
    reference: str | None = None
    errors: dict[str, float] = {}
    """Against the reference: each linear's relative error."""

    @property
    def sound(self) -> bool:
        return not self.problems

    def tell(self, problem: str) -> None:
        """Note a problem, once."""
        if problem in self.problems:
            return
        if len(self.problems) < MOST_PROBLEMS:
            self.problems.append(problem)
        else:
            self.more_problems += 1


def judge(
    path: Path, reference: str | None = None, on_block: Callable[[int, int], None] = lambda done, of: None
) -> Judgement:
    """Look at every tensor of the checkpoint in ``path``, a folder or a .gguf file.

    Raises:
        PreflightError: where there is no checkpoint of a format that is known, or no such reference.
        EqatError: for one with files that cannot be read; it has the exit code of what is not sound.
    """
    source = None if reference is None else ModelSource.open(ModelConfig(source=reference))
    try:
        return _judge(path, source, reference, on_block)
    except BadFile as error:
        raise EqatError(error.message, exit_code=ExitCode.DATA, where=error.where, hint=error.hint) from error


def _judge(
    path: Path, source: ModelSource | None, reference: str | None, on_block: Callable[[int, int], None]
) -> Judgement:
    form = form_of(format_in(path))
    try:
        lm = form.open(path, CPU, torch.float32)
    except (EqatError, *UNFIT) as error:
        # What no model can be made of may have more wrong with it than the first thing.
        return _judge_files(form, path, error)
    found = _begun(form, path, lm.source.weights)
    found.model_type, found.blocks, found.reference = str(lm.source.config.model_type), lm.blocks, reference
    other = None if source is None else CausalLM(source, CPU, torch.float32)
    if other is not None:
        require_alike(lm, other, str(reference))
    for index in range(lm.blocks):
        on_block(index, lm.blocks)
        _judge_block(form, lm, index, other, found)
    _judge_the_rest(lm, found)
    return found


def _begun(form: Form, path: Path, weights: Any) -> Judgement:
    found = Judgement(
        path=str(path),
        format=form.format.name,
        label=form.format.label,
        tensors=len(weights.stored_names()),
        bytes=sum(file.stat().st_size for file in weights.files()),
    )
    _judge_description(form, weights.config, found)
    return found


def _judge_description(form: Form, config: Mapping[str, Any], found: Judgement) -> None:
    """What config.json says of the quantization, by which loaders go before they look at any tensor."""
    if form.format.name not in NAMED_BY_METHOD:
        return
    said = config.get("quantization_config")
    said = said if isinstance(said, dict) else {}
    method = said.get("quant_method")
    if method is None:
        found.notes.append(
            "config.json names no quant_method: loaders that go by it take the linears for unquantized ones"
        )
    elif method not in METHODS:
        found.tell(
            f"config.json: quant_method is {str(method)[:40]!r}, which no loader of this format asks for"
        )
    sizes = [size for size in _all_said(said, "group_size") if size is not None]
    if odd := next((size for size in sizes if not isinstance(size, int) or isinstance(size, bool)), None):
        found.tell(f"config.json: group_size is {str(odd)[:40]!r}, which is no number")
    found.notes += [f"{why} (config.json)" for why in beyond_the_weights(said)]


def _all_said(described: object, field: str) -> Iterator[Any]:
    """Every value of a field of a description, however deep; the outer ones first."""
    if not isinstance(described, dict):
        return
    if field in described:
        yield described[field]
    for value in described.values():
        yield from _all_said(value, field)


def _judge_files(form: Form, path: Path, opening: Exception) -> Judgement:
    """Every tensor by itself, of files that ``opening`` as a model has failed for.

    Raises:
        PreflightError: for files that cannot be read.
    """
    reader = form.reader(path)
    found = _begun(form, path, reader)
    found.tell(_words(opening))
    parts: set[str] = set()
    for name in reader.names():
        prefix = name.removesuffix(".weight")
        if prefix != name and reader.is_packed(prefix):
            _judge_linear(reader, prefix, found)
            parts.update(reader.parts_of(prefix))
    for name in sorted({*reader.stored_names()} - parts):
        _judge_numbers(name, reader.stored(name), found)
    return found


def _judge_the_rest(lm: CausalLM, found: Judgement) -> None:
    """What lies outside of the blocks: numbers that are not finite, and what is none of the model's."""
    reader: Any = lm.source.weights
    state = {*lm.model.state_dict(), *(name for name, _ in lm.model.named_parameters(remove_duplicate=False))}
    used = {lm.names.stored.get(name, name) for name in state}
    seen = {
        name for name in used if name.startswith(tuple(lm.block_prefix(i) + "." for i in range(lm.blocks)))
    }
    for linear in [name.removesuffix(".weight") for name in used if name.endswith(".weight")]:
        if f"{linear}.weight" in reader and reader.is_packed(linear):
            used.update(reader.parts_of(linear))
            seen.update(reader.parts_of(linear))
    stored = sorted(reader.stored_names())
    for name in stored:
        if name in seen or reader.is_packed(name.removesuffix(".weight")):
            continue
        try:
            _judge_numbers(name, reader.stored(name), found)
        except (EqatError, *UNFIT) as error:
            found.tell(_words(error, name))
    if left := [name for name in stored if name not in used]:
        more = f" and {len(left) - 1} more tensors are" if len(left) > 1 else " is"
        found.notes.append(
            f"{left[0]}{more} none of the model's that config.json describes: loaders ignore them"
        )


def _words(error: Exception, what: str = "its tensors") -> str:
    """An error as a problem: what is wrong and where, without the remedy, which is for models to train."""
    if isinstance(error, EqatError):
        return f"{error.where}: {error.message}" if error.where else error.message
    return f"{what} do not fit each other: {(str(error).splitlines() or [''])[0][:120]}"


def require_alike(lm: CausalLM, other: CausalLM, name: str) -> None:
    """PreflightError unless ``other``, a model called ``name``, has the blocks and the linears of ``lm``."""
    one, two = (lm.blocks, lm.linear_names(0)), (other.blocks, other.linear_names(0))
    if one != two:
        raise PreflightError(
            f"it has {other.blocks} blocks of {len(two[1])} linears, and the checkpoint {lm.blocks} of "
            f"{len(one[1])}",
            where=name,
            hint="name the model that the checkpoint was made from",
        )


def _judge_block(form: Form, lm: CausalLM, index: int, other: CausalLM | None, found: Judgement) -> None:
    """Its tensors one by one; what cannot be loaded is a problem of that tensor's."""
    prefix = lm.block_prefix(index)
    reader: Any = lm.source.weights
    for name in lm.linear_names(index):
        full = f"{prefix}.{name}"
        if f"{full}.weight" not in reader:
            found.tell(f"{full}.weight is missing")
            continue
        if reader.is_packed(full):
            _judge_linear(reader, full, found)
    try:
        block = lm.load_block(index)
    except (EqatError, *UNFIT) as error:
        if not any(problem.startswith(f"the tensors of {prefix}.") for problem in found.problems):
            found.tell(_words(error, f"the tensors of {prefix}"))
        return
    state = block.state_dict()
    for name, tensor in state.items():
        _judge_numbers(f"{prefix}.{name}", tensor, found)
    if other is None:
        return
    reference = other.load_block(index).state_dict()
    for name in lm.linear_names(index):
        have, want = state[f"{name}.weight"], reference[f"{name}.weight"]
        full = f"{prefix}.{name}"
        if have.shape != want.shape:
            found.tell(f"{full} is {list(have.shape)}, of the reference {list(want.shape)}")
            continue
        found.errors[full] = float((have - want).norm() / want.norm().clamp(min=1e-30))


def _judge_linear(reader: TensorReader, name: str, found: Judgement) -> None:
    """The tensors of one quantized linear, against each other."""
    found.linears += 1
    try:
        parts = dict(reader.linear(name).parts())
    except (EqatError, *UNFIT) as error:
        found.tell(_words(error, f"the tensors of {name}"))
        return
    for problem in faults(parts, zero_scales=reader.zero_scales):
        found.tell(f"{name}: {problem}")
    _judge_group_size(reader, parts, found)
    _judge_symmetry(reader, name, parts, found)
    if "integers" in parts and "scales" in parts:
        grid = _grid(reader, name, parts)
        found.grids[grid] = found.grids.get(grid, 0) + 1


def _judge_group_size(reader: TensorReader, parts: dict[str, Tensor], found: Judgement) -> None:
    """What config.json says of the groups has to be what the scales are for."""
    described = reader.config.get("quantization_config") or reader.config.get("quantization")
    said = next((size for size in _all_said(described, "group_size") if isinstance(size, int)), None)
    scales, codes = parts.get("scales"), parts.get("integers")
    if said is None or scales is None or codes is None or not scales.ndim == codes.ndim == 2:
        return
    inputs, groups = codes.shape[1], scales.shape[1]
    size = inputs // groups if groups else 0
    if size not in (said, 0) and not (said == -1 and groups == 1):
        found.tell(f"config.json: it says groups of {said}, and there are scales for groups of {size}")


def _judge_symmetry(reader: TensorReader, name: str, parts: dict[str, Tensor], found: Judgement) -> None:
    """Of a grid that is said to be symmetric, loaders do not read the zero points."""
    said = reader.config.get("quantization_config")
    zeros, middle = parts.get("zero points"), 1 << (reader.bits_of(name) - 1)
    symmetric = any(value is True for field in ("sym", "symmetric") for value in _all_said(said, field))
    if symmetric and zeros is not None and not bool((zeros == middle).all()):
        found.tell(
            f"config.json: it says that the grid is symmetric, and there are zero points besides {middle}"
        )


def faults(parts: dict[str, Tensor], *, zero_scales: bool = False) -> Iterator[str]:
    """What is wrong with a linear's integers ``[O, I]``, zero points and scales ``[O, G]``, and groups;
    ``zero_scales`` are right where weights of zero are written so."""
    scales = parts.get("scales")
    if scales is not None and not scales.is_floating_point():
        yield f"its scales are {str(scales.dtype).removeprefix('torch.')}"
    elif scales is not None:
        if count := int((~torch.isfinite(scales)).sum()):
            yield f"{count} of {scales.numel()} scales are not finite"
        if (count := int((scales == 0).sum())) and not zero_scales:
            yield f"{count} of {scales.numel()} scales are zero"
    codes, zeros, groups = (parts.get(part) for part in ("integers", "zero points", "group indices"))
    if codes is None or scales is None or scales.ndim != 2:
        return
    (outputs, inputs), (rows, count) = codes.shape, scales.shape
    if rows != outputs or not count or inputs % count:
        yield f"scales {list(scales.shape)} do not fit integers {list(codes.shape)}"
    if zeros is not None and zeros.shape != scales.shape:
        yield f"zero points {list(zeros.shape)} do not fit scales {list(scales.shape)}"
    if groups is not None and (len(groups) != inputs or int(groups.min()) < 0 or int(groups.max()) >= count):
        yield f"its inputs are in groups up to {int(groups.max())}, and there are {count}"
    elif groups is not None and (used := len(groups.unique())) < count:
        yield f"its inputs are in {used} of its {count} groups"


def _grid(reader: TensorReader, name: str, parts: dict[str, Tensor]) -> str:
    """``w3g128``, as far as the numbers say."""
    bits, inputs, scales = reader.bits_of(name), parts["integers"].shape[1], parts["scales"]
    middle, zeros = 1 << (bits - 1), parts.get("zero points")
    if zeros is not None:
        symmetric = bool((zeros == middle).all())
    else:
        symmetric = "biases" in parts and torch.equal(parts["biases"], -middle * scales)
    return f"w{bits}g{inputs // max(1, scales.shape[-1])}{' symmetric' if symmetric else ''}"


def _judge_numbers(name: str, tensor: Tensor, found: Judgement) -> None:
    if tensor.is_floating_point() and (count := int((~torch.isfinite(tensor)).sum())):
        found.tell(f"{name}: {count} of {tensor.numel()} values are not finite")


# -- a process of its own ------------------------------------------------------------------------------


def say_error(error: EqatError) -> int:
    """Tell what was refused; its exit code. A file of somebody else's cannot be exported again."""
    said = {"message": error.message, "where": error.where, "exit_code": int(error.exit_code)}
    say({"error": {**said, "hint": "" if error.hint == EXPORT_AGAIN else error.hint}})
    return int(error.exit_code)


def say(tree: dict[str, Any]) -> None:
    """A line for whoever started this."""
    with contextlib.suppress(BrokenPipeError):
        print(json.dumps(tree), flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0 for a sound checkpoint, 4 for one that is not, 3 where there is none."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # who asked is told by whoever started this
    parser = argparse.ArgumentParser(prog="python -m engine.export.judging")
    parser.add_argument("path", type=Path)
    parser.add_argument("--reference")
    given = parser.parse_args(arguments)
    try:
        load_extensions()
        found = judge(given.path, given.reference, lambda done, of: say({"done": done, "of": of}))
    except EqatError as error:
        return say_error(error)
    tree = msgspec.to_builtins(found)
    tree["errors"] = {name: error if math.isfinite(error) else None for name, error in found.errors.items()}
    say({**tree, "sound": found.sound})
    return int(ExitCode.DONE if found.sound else ExitCode.DATA)


if __name__ == "__main__":
    sys.exit(main())
