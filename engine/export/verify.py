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
are stored in, which is how it was measured, and with its weights as a format holds them that rounds them. All
that may differ then is the order of sums, so the tolerance can be small: see :data:`TOLERANCE`. (Without
that, it could not be: the 24 blocks of a bad 2-bit model turn the rounding of norms into entirely different
logits, and an export of it would be refused although every bit is right.)

Models are streamed block by block, so verifying needs two blocks and the hidden states of the tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from engine.config.formats import FORMATS
from engine.errors import EqatError, ExitCode, StopRequested
from engine.evaluation.perplexity import token_nll
from engine.export.checkpoint import block_buffers, outer_names
from engine.export.comparing import carried_differences
from engine.export.declared import AsDeclared, read_as_declared
from engine.export.layout import Form, Linear
from engine.export.stored import (
    NO_HEADS,
    as_stored,
    export_dtype,
    outer_as_stored,
    outer_values,
    stored_form,
)
from engine.quant.packed import PackedBlock, PackedLinear, PackedWeight
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
    rounded: str = ""
    """What the format cannot hold and rounds, and by how much, in words; empty where it holds everything."""

    def words(self) -> str:
        """What the card says of an export that is right: a sentence."""
        if FORMATS[self.format].dense:
            same = "its weights are those that were trained, as the files' numbers hold them"
        elif self.rounded:
            same = "its integers are those that were trained, and what is rounded is said below"
        else:
            same = "its integers, scales and zero points are those that were trained, bit for bit"
        said = f"verified by reading its files again: {same}"
        if self.max_logit_diff is not None:
            said += f"; the largest difference of a logit is {self.max_logit_diff:.2g}"
        if not self.rounded and self.perplexity_packed is not None and self.perplexity_trained is not None:
            said += (
                f"; perplexity on {self.tokens} tokens is {self.perplexity_packed:.5g}, trained "
                f"{self.perplexity_trained:.5g}"
            )
        return said

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


class _About(NamedTuple):
    """What decides what a trained model computes."""

    lm: CausalLM
    block_for: Callable[[int], PackedBlock]
    dtype: torch.dtype
    """Of all that is stored as numbers."""
    heads: Mapping[str, PackedWeight]
    tokens_NT: Tensor

    def is_that_of(self, other: _About) -> bool:
        objects = self.lm is other.lm and self.block_for == other.block_for and self.heads is other.heads
        return objects and self.dtype == other.dtype and torch.equal(self.tokens_NT, other.tokens_NT)


class TrainedOnce:
    """What the trained model computes of the tokens, kept for the formats that are verified one after the
    other: to all of them it is the same, and a quarter of the work.

    It is kept of the last model, blocks, tokens, dtype and heads that were asked for, and of no others.
    Whoever hands it on answers for the blocks being what they were.
    """

    def __init__(self) -> None:
        self._kept: tuple[_About, tuple[Tensor, Tensor]] | None = None

    def keep(self, about: _About, end: tuple[Tensor, Tensor]) -> None:
        """The last hidden states and -log p of the tokens."""
        self._kept = about, end

    def end(self, about: _About) -> tuple[Tensor, Tensor] | None:
        """The same, if they are of just that."""
        if self._kept is None or not self._kept[0].is_that_of(about):
            return None
        return self._kept[1]


@dataclass
class _Problems:
    found: list[str] = field(default_factory=list)

    def add(self, text: str) -> None:
        if len(self.found) < MAX_PROBLEMS:
            self.found.append(text)

    def extend(self, texts: Iterable[str]) -> None:
        """Several."""
        for text in texts:
            self.add(text)

    def insert(self, place: int, texts: Iterable[str]) -> None:
        """Problems that are found late and say most."""
        self.found[place:place] = texts
        del self.found[MAX_PROBLEMS:]


def verify(
    out_dir: Path,
    form: Form,
    lm: CausalLM,
    block_for: Callable[[int], PackedBlock],
    tokens_NT: Tensor,
    *,
    dtype: str = "auto",
    on_block: Callable[[int, int], None] | None = None,
    heads: Mapping[str, PackedWeight] = NO_HEADS,
    known: TrainedOnce | None = None,
) -> VerifyResult:
    """Compare the files in ``out_dir`` with the trained blocks, and the logits of both over ``tokens_NT``.

    ``dtype`` is ``export.dtype``. ``on_block(done, all)`` counts the blocks of two readings, and may raise to
    stop. ``heads`` are embedding and head, by name without ``.weight``, where they are quantized too. Whoever
    verifies several exports of a model hands the same ``known`` to all of them.
    """
    problems = _Problems()
    try:
        stored = export_dtype(dtype, lm)
        form = form.of(lm, stored).with_heads(lm, heads)
        known = TrainedOnce() if known is None else known
        return _verify(
            Path(out_dir), form, lm, block_for, tokens_NT, stored, heads, problems, on_block, known
        )
    except (torch.OutOfMemoryError, MemoryError, StopRequested):
        raise  # says nothing about the files
    except Exception as error:
        if full_disk(error) is not None:  # a library's own cache: nothing of the export is written here
            raise
        # Files too damaged to be opened or run: that is an answer, not a failure of the check. What libraries
        # raise on them is of no fixed list of types.
        problems.add(str(error) or type(error).__name__)
        return VerifyResult(
            form.format.name, False, None, None, None, None, tokens_NT.numel(), tuple(problems.found)
        )


def _verify(
    out_dir: Path,
    form: Form,
    lm: CausalLM,
    block_for: Callable[[int], PackedBlock],
    tokens_NT: Tensor,
    dtype: torch.dtype,
    heads: Mapping[str, PackedWeight],
    problems: _Problems,
    on_block: Callable[[int, int], None] | None,
    known: TrainedOnce,
) -> VerifyResult:
    tokens_NT = tokens_NT.to(device=lm.device, dtype=torch.long)
    packed = form.open(out_dir, lm.device, lm.dtype, trust_remote_code=lm.source.trust_remote_code)
    expected = set(_compared_outer(form, packed, lm, dtype, heads, problems))
    rounded_heads = [
        (f"{name}.weight", held)
        for name, weight in heads.items()
        if (held := form.stored_weight(weight)) is not None
    ]
    place, linears = len(problems.found), dict[str, Linear]()
    with torch.inference_mode(), outer_as_stored(lm, dtype, heads):
        trained = _Trained(form, _About(lm, block_for, dtype, heads, tokens_NT), rounded_heads, known)
        packed_hidden = packed.embed(tokens_NT)
        for index in range(lm.blocks):
            block = block_for(index)
            prefix = lm.block_prefix(index)
            linears |= {f"{prefix}.{name}": Linear.of(weight) for name, weight in block.linears.items()}
            expected.update(_compared_block(form, packed, lm, index, block, dtype, problems))
            trained.pass_through(index, block)
            packed_hidden = packed.run_block(packed.load_block(index), index, packed_hidden)
            if on_block is not None:
                on_block(index + 1, 2 * lm.blocks)
        for name in sorted(expected ^ set(packed.source.weights.stored_names())):  # type: ignore[attr-defined]
            problems.add(f"tensor {name} is {'missing from' if name in expected else 'only in'} the files")
        problems.insert(place, form.misdescribed(packed, lm, dtype, linears))
        trained_nll_NT, stored_hidden = trained.finished()
        with outer_values(lm, rounded_heads):
            difference, spread = _logit_difference(lm, packed, stored_hidden, packed_hidden)
            own = _own_difference(form, out_dir, lm, stored_hidden, tokens_NT, problems)
        difference = own if math.isnan(own) else max(difference, own)
        packed_nll = token_nll(packed, packed_hidden, tokens_NT)
        declared = form.declared(packed, lm.dtype)
        del packed, packed_hidden, stored_hidden, trained  # another reading of the files wants their memory
        read = read_as_declared(
            out_dir, form, lm, declared, tokens_NT, trained_nll_NT, packed_nll, _second_half(on_block)
        )
        if on_block is not None:
            on_block(2 * lm.blocks, 2 * lm.blocks)  # the second reading may not have been needed
    allowed = form.tolerance(TOLERANCE[lm.dtype]) * spread
    if not difference <= allowed:  # also when it is NaN
        problems.add(f"logits differ by {difference:.4g}, allowed is {allowed:.4g}")
    overflow = "" if problems.found else read.overflow
    if overflow:
        most = torch.finfo(declared).max
        problems.add(f"read as {overflow}, its predictions are no numbers: activations exceed {most:.4g}")
    return VerifyResult(
        format=form.format.name,
        verified=not problems.found,
        max_logit_diff=difference,
        tolerance=allowed,
        perplexity_trained=read.trained,
        perplexity_packed=read.packed,
        tokens=read.tokens,
        problems=tuple(problems.found),
        overflow=overflow,
        note="" if problems.found else read.note,
        rounded="" if problems.found else _loss(form.rounded(), read),
    )


def _loss(rounded: str, read: AsDeclared) -> str:
    """What the format rounds, and what that costs of the predictions of a few tokens."""
    if not rounded or read.packed is None or read.trained is None:
        return rounded
    return f"{rounded}; perplexity on {read.tokens} tokens is {read.packed:.5g}, trained {read.trained:.5g}"


class _Trained:
    """The trained model on its way through its blocks, and beside it the same with its weights as the files
    hold them, once they are others."""

    def __init__(
        self, form: Form, about: _About, rounded_heads: list[tuple[str, Tensor]], known: TrainedOnce
    ) -> None:
        self.form, self.about, self.known = form, about, known
        self.lm = about.lm
        self.end = known.end(self.about)
        self._hidden = self._embedded() if self.end is None else None
        """As trained; none where it is known what comes of it."""
        self._stored: Tensor | None = None
        """As the files hold it; none as long as that is the same."""
        if rounded_heads:
            with outer_values(self.lm, rounded_heads):
                self._stored = self._embedded()

    def pass_through(self, index: int, block: PackedBlock) -> None:
        """Let both pass through the next block."""
        rounded = self._rounded(block)
        if self._hidden is None and self._stored is None and not rounded:
            return
        module, before = self._module(index, block), self._hidden
        if before is not None:
            self._hidden = self.lm.run_block(module, index, before)
        if self._stored is None and rounded:
            self._stored = self._before(index) if before is None else before
        if self._stored is None:
            return
        for name, weight in rounded.items():
            linear = module.get_submodule(name)
            assert isinstance(linear, PackedLinear)
            linear.unpacked = weight
        self._stored = self.lm.run_block(module, index, self._stored)

    def finished(self) -> tuple[Tensor, Tensor]:
        """After the last block: -log p of the tokens as trained, and the hidden states as the files hold the
        model."""
        if self.end is None:
            assert self._hidden is not None
            self.end = self._hidden, token_nll(self.lm, self._hidden, self.about.tokens_NT)
            self.known.keep(self.about, self.end)
        hidden, nll_NT = self.end
        return nll_NT, hidden if self._stored is None else self._stored

    def _rounded(self, block: PackedBlock) -> dict[str, Tensor]:
        """Weights that the files hold rounded, by the names of their linears."""
        held = {name: self.form.stored_weight(weight) for name, weight in block.linears.items()}
        return {
            name: weight.to(self.lm.device, self.lm.dtype)
            for name, weight in held.items()
            if weight is not None
        }

    def _module(self, index: int, block: PackedBlock) -> nn.Module:
        stored = as_stored(block, self.about.dtype, self.lm.block_prefix(index))
        return stored.install(self.lm.load_block(index))

    def _before(self, index: int) -> Tensor:
        """What reaches a block, where it is known only what leaves the last."""
        hidden = self._embedded()
        for earlier in range(index):
            module = self._module(earlier, self.about.block_for(earlier))
            hidden = self.lm.run_block(module, earlier, hidden)
        return hidden

    def _embedded(self) -> Tensor:
        return self.lm.embed(self.about.tokens_NT)


def _second_half(on_block: Callable[[int, int], None] | None) -> Callable[[int, int], None] | None:
    """What counts the blocks of the second of two readings."""
    if on_block is None:
        return None
    return lambda done, blocks: on_block(blocks + done, 2 * blocks)


def _compared_outer(
    form: Form,
    packed: CausalLM,
    lm: CausalLM,
    dtype: torch.dtype,
    heads: Mapping[str, PackedWeight],
    problems: _Problems,
) -> Iterator[str]:
    """The names of everything outside the blocks, each once it was compared."""
    for name, weight in heads.items():
        called = form.linear_called(lm, name)
        problems.extend(form.linear_differences(packed, called, weight))
        yield from form.names(called, weight.grid)
    for name in outer_names(lm):
        if name.removesuffix(".weight") in heads:
            continue
        called = form.called(lm, name)
        want = stored_form(name, lm.weights.load(name), dtype)
        problems.extend(form.value_differences(packed, called, want))
        yield called
    for each in form.carried(lm):
        problems.extend(carried_differences(packed.source.weights, each))  # type: ignore[arg-type]
        yield each.name


def _compared_block(
    form: Form,
    packed: CausalLM,
    lm: CausalLM,
    index: int,
    block: PackedBlock,
    dtype: torch.dtype,
    problems: _Problems,
) -> Iterator[str]:
    """The names of a block's tensors, each once it was compared."""
    prefix = lm.block_prefix(index)
    for name, weight in block.linears.items():
        called = form.linear_called(lm, f"{prefix}.{name}")
        problems.extend(form.linear_differences(packed, called, weight))
        yield from form.names(called, weight.grid)
    others = {f"{prefix}.{name}": tensor for name, tensor in block.others.items()}
    others |= {name: lm.weights.load(name) for name in block_buffers(lm, index)}
    for name, tensor in others.items():
        called = form.called(lm, name)
        problems.extend(form.value_differences(packed, called, stored_form(name, tensor, dtype)))
        yield called


def _own_difference(
    form: Form, out_dir: Path, lm: CausalLM, trained_hidden: Tensor, tokens_NT: Tensor, problems: _Problems
) -> float:
    """Largest difference of a logit that the export's own engine computes; 0 where it has none."""
    if problems.found:  # of which it could only say the same
        return 0.0
    have = form.predicted(out_dir, tokens_NT)
    if have is None:
        return 0.0
    want = lm.head(trained_hidden[:1, : have.shape[1]]).float().cpu()
    return float((have - want).abs().max())


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
