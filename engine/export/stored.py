"""The values that an export stores of what is not quantized, and the type it stores and declares them in.

Norms, biases, embeddings and the head are rounded once, to ``export.dtype``. Left to itself that is the type
of the original: config.json declares it, and whoever loads the export computes in it, so it decides not only
how numbers are rounded but also how large activations may become (a Gemma 3 that is read as float16 overflows
although every weight fits). Originals of more than 16 bits become bfloat16, whose range is that of float32.

A quantized model is evaluated with these values (:func:`outer_as_stored`, :func:`as_stored`), so a report's
figures are those of the files; and whether the values fit is asked before anything is trained
(:func:`check_values`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from engine.errors import PreflightError
from engine.models.finite import finite
from engine.quant.packed import PackedBlock, PackedWeight

if TYPE_CHECKING:
    from engine.models.causal_lm import CausalLM

CPU_TOKENS, GPU_TOKENS = 16, 128
"""That pass through the original before training; on a CPU, arithmetic of 16 bits is slow."""
NO_HEADS: Mapping[str, PackedWeight] = {}
WIDER = torch.bfloat16
"""What becomes of an original in float32 or wider."""


def export_dtype(asked: str, lm: CausalLM) -> torch.dtype:
    """The dtype that ``export.dtype`` stands for."""
    if asked != "auto":
        named = getattr(torch, asked)
        assert isinstance(named, torch.dtype)
        return named
    own = original_dtype(lm)
    return own if own in (torch.float16, torch.bfloat16) else WIDER


def original_dtype(lm: CausalLM) -> torch.dtype:
    """What the original's config.json declares; where it does not, what most of the model is stored in."""
    declared = getattr(lm.source.config, "dtype", None)
    if isinstance(declared, torch.dtype) and declared.is_floating_point:
        return declared
    sizes: Counter[torch.dtype] = Counter()
    for name, parameter in lm.model.named_parameters():
        sizes[lm.weights.dtype(name)] += parameter.numel()
    return sizes.most_common(1)[0][0]


def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def stored_form(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """How a tensor that is not quantized is stored: numbers in ``dtype``, counters and masks as they are.

    Raises:
        PreflightError: for a number that ``dtype`` cannot hold.
    """
    if not tensor.is_floating_point():
        return tensor.detach()
    value = tensor.detach().to(dtype)
    if not finite(value):
        largest, most = tensor.detach().float().abs().max().item(), torch.finfo(dtype).max
        wider = "bfloat16" if dtype == torch.float16 else "float32"
        raise PreflightError(
            f"holds {largest:.4g}, and the export's {dtype_name(dtype)} ends at {most:.4g}",
            where=name,
            hint=f"--set export.dtype={wider}",
        )
    return value


def as_stored(block: PackedBlock, dtype: torch.dtype, prefix: str) -> PackedBlock:
    """The block with norms and biases rounded as they are stored; ``prefix`` is its name, for messages."""
    others = {name: stored_form(f"{prefix}.{name}", value, dtype) for name, value in block.others.items()}
    return replace(block, others=others)


@contextmanager
def outer_as_stored(
    lm: CausalLM, dtype: torch.dtype, heads: Mapping[str, PackedWeight] = NO_HEADS
) -> Iterator[None]:
    """The model with embedding, final norm and head rounded as they are stored, those in ``heads`` (by name
    without ``.weight``) to their grid; as before afterwards."""
    with outer_values(lm, stored_outer(lm, dtype, heads)):
        yield


def stored_outer(
    lm: CausalLM, dtype: torch.dtype, heads: Mapping[str, PackedWeight] = NO_HEADS
) -> Iterator[tuple[str, Tensor]]:
    """The values of :func:`outer_as_stored` by name, those that are not what the model has already."""
    quantized = {f"{name}.weight": weight for name, weight in heads.items()}
    for name, own in lm.outer_state().items():
        if name in quantized:
            value = quantized[name].dequantize(lm.dtype)
        elif lm.weights.dtype(name) != dtype:  # else it is what rounding would give
            value = stored_form(name, lm.weights.load(name), dtype)
        else:
            continue
        yield name, value.to(own.device, own.dtype).reshape(own.shape)


@contextmanager
def outer_values(lm: CausalLM, values: Iterable[tuple[str, Tensor]]) -> Iterator[None]:
    """The model with other values of parameters outside its blocks, by name; as before afterwards."""
    before: list[tuple[nn.Parameter, Tensor]] = []
    try:
        for name, value in values:
            # By its name alone: this happens at every portion of logits, and a list of all parameters takes
            # longer than they do.
            parameter = lm.model.get_parameter(name)
            original = parameter.data
            before.append((parameter, original))
            parameter.data = value.to(original.device, original.dtype).reshape(original.shape)
        yield
    finally:
        for parameter, original in reversed(before):
            parameter.data = original


def check_activations(
    lm: CausalLM, dtype: torch.dtype, tokens_NT: Tensor, poll: Callable[[], None] = lambda: None
) -> None:
    """The original itself can be computed with in ``dtype``, as a reader of its export will.

    Asked for float16 alone: the others reach as far as float32 does. The original is read once, and a few
    tokens pass through it.

    Raises:
        PreflightError: where its predictions are no numbers.
    """
    if dtype != torch.float16 or lm.dtype == dtype or not tokens_NT.numel():
        return
    from engine.models.causal_lm import CausalLM

    few_1T = tokens_NT[:1, : GPU_TOKENS if lm.device.type == "cuda" else CPU_TOKENS].to(lm.device)
    original = CausalLM(lm.source, lm.device, dtype)
    try:
        with torch.inference_mode():
            hidden = original.embed(few_1T)
            for index in range(original.blocks):
                poll()
                hidden = original.run_block(original.load_block(index), index, hidden)
            finite = bool(original.head(hidden).isfinite().all())
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "not implemented for" not in str(error):
            raise
        return  # no such arithmetic on this machine: nothing is known
    if not finite:
        raise PreflightError(
            f"its activations exceed {torch.finfo(dtype).max:.0f}, so an export that declares "
            f"{dtype_name(dtype)} would be of no use",
            where=lm.source.name,
            hint="--set export.dtype=bfloat16",
        )


def check_values(lm: CausalLM, dtype: torch.dtype, poll: Callable[[], None] = lambda: None) -> None:
    """Everything that stays as it is fits into ``dtype``; those that certainly do are not read.

    Raises:
        PreflightError: names the first that does not, its largest value, and what to do.
    """
    reach = torch.finfo(dtype).max
    linears = {
        f"{lm.block_prefix(index)}.{name}.weight"
        for index in range(lm.blocks)
        for name in lm.linear_names(index)
    }
    outer = lm.outer_state()
    for name in lm.model.state_dict():
        if name in linears or name not in lm.weights:
            continue
        kept = lm.weights.dtype(name)
        if not kept.is_floating_point or torch.finfo(kept).max <= reach:
            continue
        # What is in memory is rounded already, hence the margin.
        if name in outer and max(abs(end.item()) for end in outer[name].aminmax()) < 0.98 * reach:
            continue
        poll()
        stored_form(name, lm.weights.load(name), dtype)
