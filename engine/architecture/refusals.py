"""What the engine cannot quantize, said in one sentence before a single weight is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from engine.architecture.families import Architecture, LinearShape, text_config, unfit_weight
from engine.architecture.family_table import FAMILIES
from engine.architecture.headers import FLOATS, TensorInfo
from engine.architecture.layers import STRUCTURES, depth, expected_unfit
from engine.architecture.limits import MOST_BLOCKS
from engine.architecture.unfit import Unfit
from engine.config.formats import FORMATS, Format, cannot_hold, nearest
from engine.config.grid import BITS, GROUP_SIZES, GridConfig
from engine.errors import PreflightError

CAUSAL_ENDINGS = ("ForCausalLM", "LMHeadModel")
MULTIMODAL_ENDINGS = ("ForConditionalGeneration", "ForCausalLM")
"""Of models that also see or hear, and have a language model of a family that is known to work alone."""


def refuse(
    arch: Architecture,
    config: Mapping[str, Any],
    grid: GridConfig,
    export_formats: Sequence[str] = (),
) -> None:
    """Raise PreflightError, in one sentence with a remedy, for what the engine cannot quantize."""
    refuse_kind(config, arch.unfit, from_files=arch.from_files, prefix=arch.block_prefix)
    if arch.missing:
        raise missing_tensor(arch.missing, arch.model_type or "model.source")
    for name, stored in arch.coded:
        refuse_stored_type(name, stored, arch.model_type or "model.source")
    _refuse_group_size(arch, grid)
    _refuse_head(arch, grid)
    _refuse_packing(arch, config, grid, export_formats)


def refuse_kind(
    config: Mapping[str, Any], unfit: Unfit | None, *, from_files: bool, prefix: str = "model.layers"
) -> None:
    """Refuse models that are not a stack of ``nn.Linear`` blocks with 16-bit weights.

    The plan and the engine both ask here, before they ask for anything else, with the same files: so they
    say the same. ``unfit`` is a weight that the files' headers showed; where there were no headers
    (``from_files``), the configuration tells what the blocks will have.
    """
    text = text_config(config)
    model_type = str(text.get("model_type") or "")
    where = model_type or "model.source"
    if config.get("is_encoder_decoder"):
        raise encoder_decoder(where)
    quantized = config.get("quantization_config") or text.get("quantization_config")
    if quantized:
        method = quantized.get("quant_method", "") if isinstance(quantized, Mapping) else ""
        raise already_quantized(method, where)
    if model_type in STRUCTURES:
        raise PreflightError(
            STRUCTURES[model_type], where=where, hint="choose a model that is a plain stack of decoder blocks"
        )
    if unfit is not None:
        raise unfit.refusal()
    for why, part in expected_unfit(text, from_files=from_files):
        raise Unfit(f"{prefix}.0.{part}" if part else where, why).refusal()
    _refuse_class(config)


def refuse_model(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> None:
    """:func:`refuse_kind` of a model's files, or of its configuration alone where there are no tensors."""
    text = text_config(config)
    # Of a family that counts its blocks in another way, all that are stored are looked at.
    unfit = unfit_weight(tensors, depth(text) or MOST_BLOCKS, text)
    refuse_kind(config, unfit, from_files=bool(tensors))


def _refuse_class(config: Mapping[str, Any]) -> None:
    """What a model was saved as says what it is for."""
    names = [str(name) for name in config.get("architectures") or []]
    text = text_config(config)
    part = isinstance(config.get("text_config"), Mapping) and str(text.get("model_type")) in FAMILIES
    endings = MULTIMODAL_ENDINGS if part else CAUSAL_ENDINGS
    # Others derive classes of their own from these: "MyForCausalLMWithCache".
    if names and not any(name.endswith(endings) or "ForCausalLM" in name for name in names):
        raise PreflightError(
            f"{names[0]} is not a causal language model",
            where=str(text.get("model_type") or "model.source"),
            hint="give an AutoModelForCausalLM checkpoint",
        )


def encoder_decoder(where: str) -> PreflightError:
    """What is said of a model that is not a single stack of blocks."""
    return PreflightError(
        "encoder-decoder models cannot be quantized",
        where=where,
        hint="give a decoder-only causal language model",
    )


def already_quantized(method: object, where: str) -> PreflightError:
    """What is said of a model whose weights are codes already; its configuration names the ``method``."""
    return PreflightError(
        f"the model is already quantized{f' ({str(method)[:80]})' if method else ''}",
        where=where,
        hint="give the original 16-bit checkpoint",
    )


def missing_tensor(name: str, where: str) -> PreflightError:
    """What is said of a checkpoint that lacks a weight of its model."""
    return PreflightError(
        f"tensor {name!r} is missing from the checkpoint",
        where=where,
        hint="download the model again, or check that config.json belongs to these weights",
    )


def refuse_stored_type(name: str, stored: str, where: str) -> None:
    """Refuse a weight that is stored as codes, or as no number of a weight at all; ``stored`` is the type's
    name in its file."""
    if stored in FLOATS:
        return
    kind = "complex numbers" if stored.startswith("C") else "the model is already quantized"
    raise PreflightError(
        f"tensor {name!r} is stored as {stored[:80]}: {kind}",
        where=where,
        hint="start from the original 16-bit model",
    )


def _refuse_group_size(arch: Architecture, grid: GridConfig) -> None:
    """Every group must be full: ``in_features % group_size == 0``."""
    if grid.group_size == -1:
        return
    for linear in arch.linears:
        if linear.in_features % grid.group_size:
            fitting = [g for g in GROUP_SIZES if all(each.in_features % g == 0 for each in arch.linears)]
            raise PreflightError(
                f"{linear.in_features} input features are not divisible by group_size {grid.group_size}",
                where=f"{arch.block_prefix}.0.{linear.name}",
                hint=f"group sizes that work for every layer: {', '.join(map(str, fitting))}",
            )


def _refuse_head(arch: Architecture, grid: GridConfig) -> None:
    """Of a quantized embedding and head, too, every group and every word must be full."""
    if grid.head is None:
        return
    widths = [width for _, width in arch.head_matrices]
    odd = [w for w in widths if w % max(1, grid.group_size) or w * grid.head_bits % 32]
    if not odd:
        return
    raise PreflightError(
        f"rows of {odd[0]} weights do not fill groups of {grid.group_size} and whole 32-bit words",
        where="grid.head_bits",
        hint="grid.head_bits=0 leaves embedding and head as they are; or choose another group size",
    )


def _refuse_packing(
    arch: Architecture, config: Mapping[str, Any], grid: GridConfig, export_formats: Sequence[str]
) -> None:
    """What the formats' rows say they cannot hold. Codes lie along the input in whole 32-bit words; in some
    formats something lies so along the output, too."""
    wanted = [FORMATS[name] for name in export_formats if name in FORMATS]

    def holds(row: Format) -> bool:
        return not row.refusal(arch, config, grid)

    for row in wanted:
        if why := row.refusal(arch, config, grid):
            other = nearest(row, grid.shared, fits=holds)
            field = "export.formats"
            leave = f"choose a grid that it holds, or leave {row.name} out of {field}"
            raise cannot_hold(row, why, field, (f"{other} can; or " if other else "") + leave)
        row.require_libraries()  # last: nobody installs them for what it cannot hold
    along_outputs = [row.name for row in wanted if row.words_along_outputs]

    def packs(count: int, bits: int) -> bool:
        return count * bits % 32 == 0

    def fits(linear: LinearShape, bits: int) -> bool:
        return packs(linear.in_features, bits) and (not along_outputs or packs(linear.out_features, bits))

    for linear in arch.linears:
        if fits(linear, grid.bits):
            continue
        side = "input" if not packs(linear.in_features, grid.bits) else "output"
        count = linear.in_features if side == "input" else linear.out_features
        fitting = [bits for bits in BITS if all(fits(each, bits) for each in arch.linears)]
        remedy = f"bits that work for every layer: {', '.join(map(str, fitting))}" if fitting else ""
        if side == "output":
            other = nearest(
                FORMATS[along_outputs[0]],
                grid.shared,
                fits=lambda each: not each.words_along_outputs and holds(each),
            )
            leave = f"leave {' and '.join(along_outputs)} out of export.formats"
            remedy = "; or ".join(filter(None, (remedy, leave + (f", {other} fits" if other else ""))))
        raise PreflightError(
            f"{count} {side} features of {grid.bits} bits do not fill whole 32-bit words",
            where=f"{arch.block_prefix}.0.{linear.name}",
            hint=remedy or "no bit width can pack this layer, so this model cannot be quantized",
        )
