"""Is what was written what was trained? Asked of every export, of the files on disk.

Three questions, because each finds errors that the others miss:

1. **Bits.** Every integer, zero point, scale, group index, norm, bias and embedding in the files is compared
   with the trained one, bit for bit. The files are read by the format's reader, which shares no code with
   its writer. A wrong packing, a shard under a wrong name, a flipped bit on the disk end here.
2. **Logits.** The directory is opened as a model of its own (its own config.json, embeddings and head), run
   beside the trained model over the same tokens, and the logits are compared. A config.json that describes
   another network ends here.
3. **As declared.** Whoever loads the export computes in the type that its config.json declares. Read so, it
   has to predict the text as well as the trained model does in the arithmetic it was measured in: activations
   that overflow end here, and what is worse beyond noise is said.

In the second question the trained model takes part with its norms, biases and embeddings rounded to what they
are stored in, which is how it was measured. All that may differ then is the order of sums, so the tolerance
can be small: see :data:`TOLERANCE`. (Without that, it could not be: the 24 blocks of a bad 2-bit model turn
the rounding of norms into entirely different logits, and an export of it would be refused although every bit
is right.)

Models are streamed block by block, so verifying needs two blocks and the hidden states of the tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from engine.errors import EqatError, ExitCode, StopRequested
from engine.evaluation.perplexity import token_nll
from engine.export.checkpoint import block_buffers, outer_names
from engine.export.declared import read_as_declared
from engine.export.layout import Layout, Linear
from engine.export.reader import CheckpointReader, PackedSource, packed_model, read_json
from engine.export.stored import as_stored, dtype_name, export_dtype, outer_as_stored, stored_form
from engine.models.carried import CarriedTensor, carried
from engine.quant.packed import PackedBlock, PackedWeight
from engine.system.files import full_disk

if TYPE_CHECKING:
    from engine.models.causal_lm import CausalLM

TOLERANCE = {torch.float32: 0.01, torch.float16: 0.1, torch.bfloat16: 0.25}
"""Largest allowed difference of two logits, in units of the logits' standard deviation, by compute dtype."""

MAX_PROBLEMS = 20


@dataclass(frozen=True)
class VerifyResult:
    """Outcome of a verification; ``problems`` is empty exactly when ``verified``."""

    format: str
    verified: bool
    max_logit_diff: float | None
    """Largest absolute difference between the logits of the trained and the reloaded model."""
    tolerance: float | None
    """What ``max_logit_diff`` was allowed to be, in the same unit."""
    perplexity_trained: float | None
    perplexity_packed: float | None
    """Of the trained model, and of the files read as they declare themselves; on few tokens, too few for a
    quality figure; their difference is what counts."""
    tokens: int
    """That both are of."""
    problems: tuple[str, ...] = ()
    overflow: str = ""
    """The dtype that the files declare, where they hold what was trained and overflow when read in it."""
    note: str = ""
    """What a reader should know of an export that is right, in words."""

    def raise_if_failed(self, kept: str = "") -> None:
        """An export that differs from what was trained must not be handed out; ``kept`` is where it lies."""
        if self.verified:
            return
        kept = f"; what was written is in {kept}" if kept else ""
        if self.overflow:
            raise EqatError(
                f"the export cannot be used as it declares itself: {self.problems[0]}",
                exit_code=ExitCode.NON_FINITE,
                where=f"verify {self.format}",
                hint=f"go on with --set export.dtype={_finite_alternative(self.overflow)}, "
                f"nothing is trained again{kept}",
            )
        more = f" and {len(self.problems) - 1} more" if len(self.problems) > 1 else ""
        raise EqatError(
            f"the export differs from the trained model: {self.problems[0]}{more}",
            exit_code=ExitCode.BUG,
            where=f"verify {self.format}",
            hint="export the run again, nothing is trained again; if it happens again, the disk or this "
            f"program is at fault{kept}",
        )


def _finite_alternative(dtype: str) -> str:
    return "bfloat16" if dtype == "float16" else "float32"


@dataclass
class _Problems:
    found: list[str] = field(default_factory=list)

    def add(self, text: str) -> None:
        if len(self.found) < MAX_PROBLEMS:
            self.found.append(text)

    def insert(self, place: int, texts: Iterable[str]) -> None:
        """Problems that are found late and say most."""
        self.found[place:place] = texts
        del self.found[MAX_PROBLEMS:]


def verify(
    out_dir: Path,
    layout: Layout,
    lm: CausalLM,
    block_for: Callable[[int], PackedBlock],
    tokens_NT: Tensor,
    *,
    dtype: str = "auto",
    on_block: Callable[[int, int], None] | None = None,
) -> VerifyResult:
    """Compare the files in ``out_dir`` with the trained blocks, and the logits of both over ``tokens_NT``.

    ``dtype`` is ``export.dtype``. ``on_block(done, all)`` counts the blocks of two readings, and may raise to
    stop.
    """
    problems = _Problems()
    try:
        stored = export_dtype(dtype, lm)
        return _verify(Path(out_dir), layout, lm, block_for, tokens_NT, stored, problems, on_block)
    except (torch.OutOfMemoryError, MemoryError, StopRequested):
        raise  # says nothing about the files
    except Exception as error:
        if full_disk(error) is not None:  # a library's own cache: nothing of the export is written here
            raise
        # Files too damaged to be opened or run: that is an answer, not a failure of the check. What libraries
        # raise on them is of no fixed list of types.
        problems.add(str(error) or type(error).__name__)
        return VerifyResult(
            layout.format.name, False, None, None, None, None, tokens_NT.numel(), tuple(problems.found)
        )


def _verify(
    out_dir: Path,
    layout: Layout,
    lm: CausalLM,
    block_for: Callable[[int], PackedBlock],
    tokens_NT: Tensor,
    dtype: torch.dtype,
    problems: _Problems,
    on_block: Callable[[int, int], None] | None,
) -> VerifyResult:
    tokens_NT = tokens_NT.to(device=lm.device, dtype=torch.long)
    layout = layout.of(lm, dtype)
    packed = packed_model(
        out_dir, layout.reader, lm.device, lm.dtype, trust_remote_code=lm.source.trust_remote_code
    )
    reader = cast("PackedSource", packed.source).weights
    expected = set(_check_outer(reader, lm, dtype, problems))
    place, linears = len(problems.found), dict[str, Linear]()
    with torch.inference_mode(), outer_as_stored(lm, dtype):
        trained_hidden, packed_hidden = lm.embed(tokens_NT), packed.embed(tokens_NT)
        for index in range(lm.blocks):
            block = block_for(index)
            prefix = lm.block_prefix(index)
            linears |= {f"{prefix}.{name}": Linear.of(weight) for name, weight in block.linears.items()}
            expected.update(_check_block(reader, layout, lm, index, block, dtype, problems))
            trained_block = as_stored(block, dtype, prefix).install(lm.load_block(index))
            trained_hidden = lm.run_block(trained_block, index, trained_hidden)
            packed_hidden = packed.run_block(packed.load_block(index), index, packed_hidden)
            if on_block is not None:
                on_block(index + 1, 2 * lm.blocks)
        for name in sorted(expected ^ set(reader.stored_names())):
            problems.add(f"tensor {name} is {'missing from' if name in expected else 'only in'} the files")
        problems.insert(place, _misdescribed(out_dir, layout, linears))
        difference, spread = _logit_difference(lm, packed, trained_hidden, packed_hidden)
        trained_nll = token_nll(lm, trained_hidden, tokens_NT)
        packed_nll = token_nll(packed, packed_hidden, tokens_NT)
        declared: torch.dtype = packed.source.config.dtype or torch.float32
        if declared != dtype:
            stored = f"the tensors are {dtype_name(dtype)}"
            problems.add(f"config.json declares {dtype_name(declared)}, and {stored}")
        del packed, packed_hidden, reader  # another reading of the files wants their memory
        read = read_as_declared(
            out_dir, layout, lm, declared, tokens_NT, trained_nll, packed_nll, _second_half(on_block)
        )
        if on_block is not None:
            on_block(2 * lm.blocks, 2 * lm.blocks)  # the second reading may not have been needed
    allowed = TOLERANCE[lm.dtype] * spread
    if not difference <= allowed:  # also when it is NaN
        problems.add(f"logits differ by {difference:.4g}, allowed is {allowed:.4g}")
    overflow = "" if problems.found else read.overflow
    if overflow:
        most = torch.finfo(declared).max
        problems.add(f"read as {overflow}, its predictions are no numbers: activations exceed {most:.4g}")
    return VerifyResult(
        format=layout.format.name,
        verified=not problems.found,
        max_logit_diff=difference,
        tolerance=allowed,
        perplexity_trained=read.trained,
        perplexity_packed=read.packed,
        tokens=read.tokens,
        problems=tuple(problems.found),
        overflow=overflow,
        note="" if problems.found else read.note,
    )


def _second_half(on_block: Callable[[int, int], None] | None) -> Callable[[int, int], None] | None:
    """What counts the blocks of the second of two readings."""
    if on_block is None:
        return None
    return lambda done, blocks: on_block(blocks + done, 2 * blocks)


def _misdescribed(out_dir: Path, layout: Layout, linears: Mapping[str, Linear]) -> Iterator[str]:
    """What the JSON files say of the grids that is not so."""
    wanted = layout.config(linears)
    described, found = layout.described(wanted), read_json(out_dir / "config.json")
    if any(found.get(key) != described.get(key) for key in {"quantization_config", *described}):
        yield "config.json does not describe the trained grid"
    for name, content in layout.files(wanted).items():
        if read_json(out_dir / name) != content:
            yield f"{name} does not describe the trained grid"


def _check_outer(
    reader: CheckpointReader, lm: CausalLM, dtype: torch.dtype, problems: _Problems
) -> Iterator[str]:
    for name in outer_names(lm):
        stored = lm.names.exported(name)
        _check_same(stored, stored_form(name, lm.weights.load(name), dtype), reader, problems)
        yield stored
    for each in carried(lm):
        _check_carried(each, reader, problems)
        yield each.name


def _check_block(
    reader: CheckpointReader,
    layout: Layout,
    lm: CausalLM,
    index: int,
    block: PackedBlock,
    dtype: torch.dtype,
    problems: _Problems,
) -> Iterator[str]:
    prefix = lm.block_prefix(index)
    for name, weight in block.linears.items():
        linear = lm.names.exported_linear(f"{prefix}.{name}")
        yield from layout.names(linear, weight.grid)
        _check_linear(reader, layout, linear, weight, problems)
    for name, tensor in block.others.items():
        stored = lm.names.exported(f"{prefix}.{name}")
        yield stored
        _check_same(stored, stored_form(f"{prefix}.{name}", tensor, dtype), reader, problems)
    for name in block_buffers(lm, index):
        stored = lm.names.exported(name)
        yield stored
        _check_same(stored, stored_form(name, lm.weights.load(name), dtype), reader, problems)


def _check_linear(
    reader: CheckpointReader, layout: Layout, name: str, weight: PackedWeight, problems: _Problems
) -> None:
    try:
        found = reader.linear(name).parts()
    except EqatError as error:
        problems.add(str(error))
        return
    for what, want in layout.parts(weight).items():
        if difference := _difference(found[what], want, what):
            problems.add(f"{name}: {difference}")


def _check_same(name: str, want: Tensor, reader: CheckpointReader, problems: _Problems) -> None:
    try:
        difference = _difference(reader.stored(name), want, "values")
    except EqatError as error:
        problems.add(str(error))
        return
    if difference:
        problems.add(f"{name}: {difference}")


def _check_carried(want: CarriedTensor, reader: CheckpointReader, problems: _Problems) -> None:
    try:
        type_name, shape, data = reader.raw(want.name)
    except EqatError as error:
        problems.add(str(error))
        return
    if (type_name, shape) != (want.dtype, want.shape) or not torch.equal(data, want.raw()):
        problems.add(f"{want.name} is not what was carried over")


def _difference(have: Tensor, want: Tensor, what: str) -> str:
    """In words, how many elements have other bits and by how much at most; empty where all are the same."""
    want = want.detach().cpu().contiguous()
    if have.shape != want.shape or have.dtype != want.dtype:
        shapes = [f"{dtype_name(tensor.dtype)} {list(tensor.shape)}" for tensor in (have, want)]
        return f"{max(1, want.numel())} {what} differ: {shapes[0]} in place of {shapes[1]}"
    bits = _SAME_SIZE.get(want.dtype)
    # Bits, not values: 0.0 == -0.0 and NaN != NaN would both mislead.
    one, other = (have, want) if bits is None else (have.contiguous().view(bits), want.view(bits))
    different = one != other
    count = int(different.sum())
    if not count:
        return ""
    most = (have[different].double() - want[different].double()).abs().max().item()
    return f"{count} {what} differ, by up to {most:.3g}"


_SAME_SIZE = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}


def _logit_difference(
    trained: CausalLM, packed: CausalLM, trained_hidden: Tensor, packed_hidden: Tensor
) -> tuple[float, float]:
    """Largest absolute difference of the two models' logits, and the trained logits' standard deviation."""
    largest, total, squares, count = 0.0, 0.0, 0.0, 0
    for window in range(trained_hidden.shape[0]):
        for start in range(0, trained_hidden.shape[1], 64):
            part: Any = (slice(window, window + 1), slice(start, start + 64))
            want = trained.head(trained_hidden[part]).double()
            have = packed.head(packed_hidden[part]).double()
            difference = (want - have).abs().max().item()
            largest = difference if math.isnan(difference) else max(largest, difference)
            if math.isnan(largest):
                return largest, 0.0
            total, squares, count = (
                total + want.sum().item(),
                squares + want.square().sum().item(),
                count + want.numel(),
            )
    mean = total / count
    return largest, math.sqrt(max(0.0, squares / count - mean * mean))
