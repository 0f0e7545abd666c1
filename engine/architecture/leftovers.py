"""Stored tensors that are no weights: what a model computes by itself, and what a quantization left behind.

Older releases of transformers saved rotary tables and masks with the weights; today they are computed when a
model is built, and what a file says of them is not read. Neither is it counted by the plan, nor carried along
into an export.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_COMPUTED = re.compile(
    r"(^|\.)("
    r"\w*inv_freq\w*|cos_cached|sin_cached|cos_sin_cache|freqs_cis|rope\.freqs|rope_freqs|rotary_emb\.(cos|sin)"
    r"|masked_bias|causal_mask|attn_mask|position_ids|token_type_ids|embed_positions|alibi"
    r"|relative_position_index|num_batches_tracked"
    r")$"
)
_MASK = re.compile(r"(^|\.)(attn|self_attn|attention|self_attention)\.bias$")
_QUANTIZATION = re.compile(
    r"\.("
    r"qweight|qzeros|scales|g_idx|SCB|weight_format|w_bit"
    r"|(weight\.)?((nested_)?(absmax|quant_map)|quant_state\..+)"
    r"|(weight|input|output|activation|act|[qkv])_scale(_inv|_2|_ub)?"
    r"|weight_(packed|shape|zero_point|g_idx)|(input|output)_zero_point"
    r")$"
)

COMPUTED = "computed when the model is built"
QUANTIZATION = "left behind by a quantization"


def why_no_weight(name: str, shape: Sequence[int]) -> str:
    """Why a stored tensor that no parameter is read from is no weight either; empty where it may be one."""
    # A mask is a table over positions, with two dimensions for sequences and heads; no bias is.
    if _COMPUTED.search(name) or (_MASK.search(name) and len(shape) > 2):
        return COMPUTED
    return QUANTIZATION if _QUANTIZATION.search(name) else ""
