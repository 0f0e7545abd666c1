"""What kinds of layers a configuration asks for, where no file shows them yet.

Before the weights of a model are here, only its config.json says whether its blocks consist of ``nn.Linear``
layers. A field that is there says little: dense models carry fields of experts as well, and models with
experts can be told to have none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from engine.architecture.family_table import ALIASES, FAMILIES
from engine.architecture.unfit import CONV1D, CONVOLUTION, EXPERTS

EXPERT_FIELDS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""How many experts there are; how many of them a token asks is no sign of any."""
EXPERT_TYPES = {"gpt_oss", "granitemoe", "granitemoeshared", "jetmoe", "mixtral", "olmoe", "phimoe"}
"""Every block of these has experts, and be it one."""
EXPERT_SWITCHES = ("is_moe", "enable_moe_block")
"""Fields of families that are dense or not, as they say."""
DENSE_BEFORE = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
"""The first layer that has experts."""
LAYER_LISTS = ("layer_types", "layers_block_type", "block_types")
RECURRENT_LAYERS = {"linear_attention", "conv", "mamba", "mamba2", "recurrent", "hybrid", "hybrid_sliding"}
RECURRENT_TYPES = {
    "bailing_hybrid", "falcon_h1", "falcon_mamba", "inkling_text", "inkling2_text", "kimi_linear", "mamba",
    "mamba2", "rwkv", "zamba", "zamba2", "zaya",
}  # fmt: skip
"""Every block of these has a convolution or a recurrence."""
HYBRID_TYPES = {
    "bamba", "granitemoehybrid", "jamba", "lfm2", "lfm2_moe", "lfm3", "nemotron_h", "olmo_hybrid",
    "qwen3_5_text", "qwen3_5_moe_text", "qwen3_next", "qwen4_exp_text", "recurrent_gemma",
}  # fmt: skip
"""Some blocks of these have, as a list of layers says; without the list, the class makes one with some."""
CONV1D_TYPES = {"gpt2", "gpt-sw3", "imagegpt", "openai-gpt"}
_STREAMS = "its blocks work on several streams of hidden states at once, not one after another on one"
_NO_LIST = "it is not one list of decoder blocks"
_ENCODER = "its blocks are an encoder's, of BERT's kind, which are not called one after another"
_HALF = "it is the decoder of an encoder-decoder model"
STRUCTURES = {
    **dict.fromkeys(("bert", "big_bird", "camembert", "cpmant", "data2vec-text", "ernie"), _ENCODER),
    **dict.fromkeys(("megatron-bert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer"), _ENCODER),
    **dict.fromkeys(("xlm", "xlm-roberta", "xlm-roberta-xl", "xlnet", "xmod"), _ENCODER),
    **dict.fromkeys(("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian"), _HALF),
    **dict.fromkeys(("mbart", "mvp", "pegasus", "prophetnet"), _HALF),
    "blt": f"{_NO_LIST}: patches of bytes pass through models of their own before and after it",
    "gemma3n_text": _STREAMS,
    "hrm_text": f"{_NO_LIST}: the same blocks are passed several times",
    "longcat_flash": f"{_NO_LIST}: each has two attentions, and experts beside them",
    "xlstm": "its blocks are recurrences, which are called in another way than decoder blocks",
}
"""Why the blocks of these cannot be trained one after another, whatever their weights are."""


def expected_unfit(text: Mapping[str, Any], *, from_files: bool) -> Iterator[tuple[str, str]]:
    """What makes the blocks unfit, the first thing first, and the part of a block that is to blame.

    ``from_files`` says that the weights were looked at and showed nothing: then only what they cannot show
    counts.
    """
    # Its experts are rows of an embedding.
    if text.get("is_moe") is True or (not from_files and _has_experts(text)):
        yield EXPERTS, "mlp.experts"
    if from_files:
        return
    if _has_recurrences(text):
        yield CONVOLUTION, ""
    if text.get("model_type") in CONV1D_TYPES:
        yield CONV1D, ""


def _has_experts(text: Mapping[str, Any]) -> bool:
    for switch in EXPERT_SWITCHES:
        if isinstance(text.get(switch), bool):
            return bool(text[switch])
    if text.get("model_type") in FAMILIES:
        return False
    if text.get("model_type") in EXPERT_TYPES:
        return True
    nested = text.get("ffn_config")
    places = [text, nested] if isinstance(nested, Mapping) else [text]
    counts = [place[name] for place in places for name in EXPERT_FIELDS if name in place]
    if not any(isinstance(count, int) and count > 1 for count in counts):
        return False
    return _sparse_layers(text) > 0


def _sparse_layers(text: Mapping[str, Any]) -> int:
    """How many layers have experts, in a model that has some."""
    if _is_list(text.get("mlp_layer_types")):
        return sum(kind != "dense" for kind in text["mlp_layer_types"])
    dense = set()
    if _is_list(text.get("mlp_only_layers")):
        dense = {index for index in text["mlp_only_layers"] if isinstance(index, int)}
    before = max((text[name] for name in DENSE_BEFORE if isinstance(text.get(name), int)), default=0)
    step = text.get("decoder_sparse_step")
    step = step if isinstance(step, int) and step > 0 else 1
    if _is_list(text.get("moe_layers")):
        return len(text["moe_layers"])
    return sum(index not in dense and (index + 1) % step == 0 for index in range(before, depth(text) or 1))


def _has_recurrences(text: Mapping[str, Any]) -> bool:
    model_type = text.get("model_type")
    if model_type in RECURRENT_TYPES:
        return True
    for name in LAYER_LISTS:
        if _is_list(text.get(name)):
            return bool(RECURRENT_LAYERS & {str(kind) for kind in text[name]})
    return model_type in HYBRID_TYPES


def depth(text: Mapping[str, Any]) -> int:
    """The number of blocks, as far as a configuration says it; else 0."""
    names = ("num_hidden_layers", *ALIASES["num_hidden_layers"])
    return next((text[name] for name in names if isinstance(text.get(name), int)), 0)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)
