"""What the engine cannot quantize, said in one sentence before a single weight is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from engine.architecture.families import Architecture, LinearShape, text_config
from engine.architecture.headers import FLOATS
from engine.config.formats import FORMATS
from engine.config.grid import BITS, GROUP_SIZES, GridConfig
from engine.errors import PreflightError

EXPERT_FIELDS = (
    "num_local_experts",
    "num_experts",
    "n_routed_experts",
    "moe_num_experts",
    "num_experts_per_tok",
)
CONV1D_TYPES = {"gpt2", "imagegpt", "openai-gpt"}
CAUSAL_ENDINGS = ("ForCausalLM", "LMHeadModel", "Gemma3ForConditionalGeneration")


def refuse(
    arch: Architecture,
    config: Mapping[str, Any],
    grid: GridConfig,
    export_formats: Sequence[str] = (),
) -> None:
    """Raise PreflightError, in one sentence with a remedy, for what the engine cannot quantize."""
    _refuse_kind(arch, config)
    _refuse_group_size(arch, grid)
    _refuse_packing(arch, grid, export_formats)


def _refuse_kind(arch: Architecture, config: Mapping[str, Any]) -> None:
    """Models that are not a stack of ``nn.Linear`` blocks with 16-bit weights."""
    where = arch.model_type or "model.source"

    def refusal(message: str, hint: str) -> PreflightError:
        return PreflightError(message, where=where, hint=hint)

    text = text_config(config)
    if config.get("is_encoder_decoder"):
        raise encoder_decoder(where)
    quantized = config.get("quantization_config") or text.get("quantization_config")
    if quantized:
        method = quantized.get("quant_method", "") if isinstance(quantized, Mapping) else ""
        raise already_quantized(method, where)
    experts = [name for name in EXPERT_FIELDS if isinstance(text.get(name), int) and text[name] > 1]
    if experts or arch.fused:
        where = arch.fused[0] if arch.fused else f"{arch.block_prefix}.0.mlp.experts"
        raise refusal(
            f"{where} holds fused expert weights, which are not nn.Linear layers", "give a dense model"
        )
    if arch.model_type in CONV1D_TYPES:
        raise refusal(
            "the projections of h.0.attn and h.0.mlp are Conv1D, not nn.Linear",
            "give a model built of nn.Linear",
        )
    names = config.get("architectures") or []
    if names and not any(str(name).endswith(CAUSAL_ENDINGS) for name in names):
        raise refusal(f"{names[0]} is not a causal language model", "give an AutoModelForCausalLM checkpoint")


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


def _refuse_packing(arch: Architecture, grid: GridConfig, export_formats: Sequence[str]) -> None:
    """What the formats' rows say they cannot hold. Codes lie along the input in whole 32-bit words; in some
    formats something lies so along the output, too."""
    wanted = [FORMATS[name] for name in export_formats if name in FORMATS]
    for row in wanted:
        if row.lacks(grid.shared):
            raise PreflightError(
                f"{row.label} cannot hold {row.lacks(grid.shared)}",
                where="export.formats",
                hint=f"choose a grid that it holds, or leave {row.name} out of export.formats",
            )
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
            remedy = "; or ".join(
                filter(None, (remedy, f"leave {' and '.join(along_outputs)} out of export.formats"))
            )
        raise PreflightError(
            f"{count} {side} features of {grid.bits} bits do not fill whole 32-bit words",
            where=f"{arch.block_prefix}.0.{linear.name}",
            hint=remedy or "no bit width can pack this layer, so this model cannot be quantized",
        )
