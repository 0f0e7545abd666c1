"""Is what was written what was trained? Asked of every export, of the files on disk.

Two questions, because each finds errors that the other misses:

1. **Bits.** Every integer, zero point, scale, group index, norm, bias and embedding in the files is compared
   with the trained one, bit for bit. The files are read by the format's reader, which shares no code with
   its writer. A wrong packing, a shard under a wrong name, a flipped bit on the disk end here.
2. **Logits.** The directory is opened as a model of its own (its own config.json, embeddings and head), run
   beside the trained model over the same tokens, and the logits are compared. A config.json that describes
   another network ends here.

The trained model takes part with its norms, biases and embeddings rounded to the float16 they are stored in.
All that may differ then is the order of sums, so the tolerance can be small: see :data:`TOLERANCE`. (Without
that, it could not be: the 24 blocks of a bad 2-bit model turn the rounding of norms into entirely different
logits, and an export of it would be refused although every bit is right.)

Both models are streamed block by block, so verifying needs two blocks and the hidden states of the tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from engine.errors import EqatError, ExitCode, StopRequested
from engine.evaluation.perplexity import token_nll
from engine.export.checkpoint import block_buffers, half, outer_names, stored_form
from engine.export.layout import Layout, Linear
from engine.export.reader import CheckpointReader, PackedSource, packed_model, read_json
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
    """Both on the tokens given, too few for a quality figure; their difference is what counts."""
    tokens: int
    problems: tuple[str, ...] = ()

    def raise_if_failed(self) -> None:
        """An export that differs from what was trained must not be handed out."""
        if not self.verified:
            more = f" and {len(self.problems) - 1} more" if len(self.problems) > 1 else ""
            raise EqatError(
                f"the export differs from the trained model: {self.problems[0]}{more}",
                exit_code=ExitCode.BUG,
                where=f"verify {self.format}",
                hint="export the run again; if it happens again, the disk or this program is at fault",
            )


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
    on_block: Callable[[int, int], None] | None = None,
) -> VerifyResult:
    """Compare the files in ``out_dir`` with the trained blocks, and the logits of both over ``tokens_NT``."""
    problems = _Problems()
    try:
        return _verify(Path(out_dir), layout, lm, block_for, tokens_NT, problems, on_block)
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
    problems: _Problems,
    on_block: Callable[[int, int], None] | None,
) -> VerifyResult:
    tokens_NT = tokens_NT.to(device=lm.device, dtype=torch.long)
    packed = packed_model(
        out_dir, layout.reader, lm.device, lm.dtype, trust_remote_code=lm.source.trust_remote_code
    )
    reader = cast("PackedSource", packed.source).weights
    expected = set(_check_outer(reader, lm, problems))
    place, linears = len(problems.found), dict[str, Linear]()
    with torch.inference_mode(), _outer_as_stored(lm):
        trained_hidden, packed_hidden = lm.embed(tokens_NT), packed.embed(tokens_NT)
        for index in range(lm.blocks):
            block = block_for(index)
            prefix = lm.block_prefix(index)
            linears |= {f"{prefix}.{name}": Linear.of(weight) for name, weight in block.linears.items()}
            for name in block.linears:
                expected.update(layout.names(lm.names.exported_linear(f"{prefix}.{name}")))
            expected.update(_check_block(reader, lm, index, block, problems))
            trained_block = _as_stored(block).install(lm.load_block(index))
            trained_hidden = lm.run_block(trained_block, index, trained_hidden)
            packed_hidden = packed.run_block(packed.load_block(index), index, packed_hidden)
            if on_block is not None:
                on_block(index + 1, lm.blocks)
        for name in sorted(expected ^ set(reader.stored_names())):
            problems.add(f"tensor {name} is {'missing from' if name in expected else 'only in'} the files")
        problems.insert(place, _misdescribed(out_dir, layout, linears))
        difference, spread = _logit_difference(lm, packed, trained_hidden, packed_hidden)
        trained_nll = token_nll(lm, trained_hidden, tokens_NT).mean().item()
        packed_nll = token_nll(packed, packed_hidden, tokens_NT).mean().item()
    allowed = TOLERANCE[lm.dtype] * spread
    if not difference <= allowed:  # also when it is NaN
        problems.add(f"logits differ by {difference:.4g}, allowed is {allowed:.4g}")
    return VerifyResult(
        format=layout.format.name,
        verified=not problems.found,
        max_logit_diff=difference,
        tolerance=allowed,
        perplexity_trained=_perplexity(trained_nll),
        perplexity_packed=_perplexity(packed_nll),
        tokens=tokens_NT.numel(),
        problems=tuple(problems.found),
    )


def _as_stored(block: PackedBlock) -> PackedBlock:
    """The block with its norms and biases rounded to float16."""
    return replace(block, others={name: half(name, tensor) for name, tensor in block.others.items()})


@contextmanager
def _outer_as_stored(lm: CausalLM) -> Iterator[None]:
    """The model with embedding, final norm and head rounded to float16, as they were before afterwards."""
    parameters = dict(lm.model.named_parameters())
    before = {name: parameters[name].data for name in lm.outer_state()}
    try:
        for name, original in before.items():
            parameters[name].data = half(name, lm.weights.load(name)).to(original.device, original.dtype)
        yield
    finally:
        for name, original in before.items():
            parameters[name].data = original


def _misdescribed(out_dir: Path, layout: Layout, linears: Mapping[str, Linear]) -> Iterator[str]:
    """What the JSON files say of the grids that is not so."""
    wanted = layout.config(linears)
    in_config = read_json(out_dir / "config.json").get("quantization_config")
    if in_config != wanted:
        yield "config.json does not describe the trained grid"
    for name, content in layout.files(wanted).items():
        if read_json(out_dir / name) != content:
            yield f"{name} does not describe the trained grid"


def _check_outer(reader: CheckpointReader, lm: CausalLM, problems: _Problems) -> Iterator[str]:
    for name in outer_names(lm):
        stored = lm.names.exported(name)
        _check_same(stored, stored_form(name, lm.weights.load(name)), reader, problems)
        yield stored
    for each in carried(lm):
        _check_carried(each, reader, problems)
        yield each.name


def _check_block(
    reader: CheckpointReader, lm: CausalLM, index: int, block: PackedBlock, problems: _Problems
) -> Iterator[str]:
    prefix = lm.block_prefix(index)
    for name, weight in block.linears.items():
        _check_linear(reader, lm.names.exported_linear(f"{prefix}.{name}"), weight, problems)
    for name, tensor in block.others.items():
        stored = lm.names.exported(f"{prefix}.{name}")
        yield stored
        _check_same(stored, half(name, tensor), reader, problems)
    for name in block_buffers(lm, index):
        stored = lm.names.exported(name)
        yield stored
        _check_same(stored, stored_form(name, lm.weights.load(name)), reader, problems)


def _check_linear(reader: CheckpointReader, name: str, weight: PackedWeight, problems: _Problems) -> None:
    try:
        found = reader.linear(name)
    except EqatError as error:
        problems.add(str(error))
        return
    groups = torch.arange(weight.in_features, dtype=torch.int32) // weight.group_size
    pairs: list[tuple[str, Tensor, Tensor]] = [
        ("integers", found.codes_OI, weight.codes()),
        ("zero points", found.zero_OG, weight.zero_point),
        ("scales", found.scale_OG, weight.scale.to(torch.float16)),
        ("group indices", found.group_of_I, groups),
    ]
    for what, have, want in pairs:
        different = _count_different(have, want)
        if different:
            problems.add(f"{name}: {different} {what} differ")


def _check_same(name: str, want: Tensor, reader: CheckpointReader, problems: _Problems) -> None:
    try:
        different = _count_different(reader.stored(name), want)
    except EqatError as error:
        problems.add(str(error))
        return
    if different:
        problems.add(f"{name}: {different} values differ")


def _check_carried(want: CarriedTensor, reader: CheckpointReader, problems: _Problems) -> None:
    try:
        type_name, shape, data = reader.raw(want.name)
    except EqatError as error:
        problems.add(str(error))
        return
    if (type_name, shape) != (want.dtype, want.shape) or not torch.equal(data, want.raw()):
        problems.add(f"{want.name} is not what was carried over")


def _count_different(have: Tensor, want: Tensor) -> int:
    """Elements whose bits differ; a wrong shape or dtype counts as all of them."""
    want = want.detach().cpu().contiguous()
    if have.shape != want.shape or have.dtype != want.dtype:
        return max(1, want.numel())
    if want.dtype == torch.float16:  # compare bits: 0.0 == -0.0 and NaN != NaN would both mislead
        have, want = have.contiguous().view(torch.int16), want.view(torch.int16)
    return int((have != want).sum())


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


def _perplexity(nll: float) -> float | None:
    return math.exp(nll) if math.isfinite(nll) and nll < 700 else None
