"""The ``config.json`` of an export: what the model's authors wrote, and what other readers need beside it.

What the original says is kept as it says it, in its own words. Only what an export makes different is written
over it, and what is said in the words of transformers 5 alone is repeated in those of version 4, which older
releases and other engines (vLLM, llama.cpp's converter, gptqmodel) read. Without them these take their
defaults, and the model talks nonsense without an error:

    rope_parameters                    as version 4 says it
    {rope_theta}                       rope_theta; GPT-NeoX: rotary_emb_base as well
    {partial_rotary_factor}            partial_rotary_factor; GPT-NeoX: rotary_pct as well
    {rope_type, factor, ...}           rope_scaling, unless the type is "default"
    {full_attention: {...},            rope_theta and rope_scaling of full attention
     sliding_attention: {...}}         Gemma 3: rope_local_base_freq; ModernBERT: local_rope_theta

A name that is repeated has the value that this transformers understood the file by, so that no reader finds
two answers. The other way round nothing has to be done: version 5 reads the names of version 4.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

GPT_NEOX = ("gpt_neox", "gpt_neox_japanese")
PHI3 = ("phi3", "phi4_multimodal")
FULL, SLIDING = "full_attention", "sliding_attention"

NESTED = {
    "gemma3_text": ("rope_theta", "rope_local_base_freq"),
    "gemma3n_text": ("rope_theta", "rope_local_base_freq"),
    "modernbert-decoder": ("global_rope_theta", "local_rope_theta"),
    "olmo3": ("rope_theta", "rope_theta"),
}
"""What version 4 calls the bases of full and of sliding attention, where they are apart in version 5."""

RENAMED = {"qwen3_moe": {"num_experts": "num_local_experts"}}
"""Other settings of families: the name of version 4, and that of version 5."""


def export_config(
    original: Mapping[str, Any] | None, understood: Mapping[str, Any], **ours: Any
) -> dict[str, Any]:
    """The configuration to write.

    ``original`` is the file of the model's authors, none where there is none that describes just this network
    (GGUF files, random weights, the text part of a multimodal model); ``understood`` is what transformers
    made of it, with the defaults filled in; ``ours`` lies over both.
    """
    config = {**(understood if original is None else original), **ours}
    for name, value in _older_names(config, understood):
        if config.get(name) is None:
            config[name] = value
    return config


def _older_names(config: Mapping[str, Any], understood: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Settings under the names of version 4."""
    model_type = str(understood.get("model_type"))
    for older, newer in RENAMED.get(model_type, {}).items():
        if newer in understood:
            yield older, understood[newer]
    # What the file says comes before what was made of it: filling in, transformers adds numbers (the context
    # before scaling) that version 4 would take for the authors' own.
    rope = config.get("rope_parameters") or understood.get("rope_parameters")
    filled_in = understood.get("rope_parameters")
    if not isinstance(rope, Mapping) or not isinstance(filled_in, Mapping):
        return
    if model_type in NESTED:
        yield from _of_layer_types(model_type, rope, filled_in)
    elif not any(isinstance(part, Mapping) for part in filled_in.values()):
        yield from _of_all_layers(model_type, rope, filled_in, understood)


def _of_layer_types(
    model_type: str, rope: Mapping[str, Any], filled_in: Mapping[str, Any]
) -> Iterator[tuple[str, Any]]:
    """Gemma 3 and its like: one base for each kind of attention, and scaling for the full one."""
    bases = [_part(filled_in, kind).get("rope_theta") for kind in (FULL, SLIDING)]
    names = NESTED[model_type]
    if names[0] == names[1] and bases[0] != bases[1]:
        return  # version 4 has one number for both
    for name, base in zip(names, bases, strict=True):
        if base is not None:
            yield name, base
    scaling = _scaling(_part(rope, FULL), filled_in=_part(filled_in, FULL))
    if scaling and _part(filled_in, SLIDING).get("rope_type", "default") == "default":
        yield "rope_scaling", scaling


def _of_all_layers(
    model_type: str, rope: Mapping[str, Any], filled_in: Mapping[str, Any], understood: Mapping[str, Any]
) -> Iterator[tuple[str, Any]]:
    base, partial = filled_in.get("rope_theta"), filled_in.get("partial_rotary_factor")
    if base is not None:
        yield "rope_theta", base
        if model_type in GPT_NEOX:
            yield "rotary_emb_base", base
    if partial is not None:
        yield "partial_rotary_factor", partial
        if model_type in GPT_NEOX:
            yield "rotary_pct", partial
    context = understood.get("max_position_embeddings")
    scaling = _scaling(rope, filled_in=filled_in, context=context)
    if not scaling:
        return
    before = filled_in.get("original_max_position_embeddings")
    if scaling["rope_type"] == "longrope" and before is not None and before != context:
        yield "original_max_position_embeddings", before  # which version 4 expects outside
    if model_type in PHI3:
        # It takes these three and no fourth; what it has no word for stays unsaid, for transformers 5 would
        # read these in the place of its own.
        if not scaling.keys() - {"rope_type", "type", *_LONGROPE, "original_max_position_embeddings"}:
            yield "rope_scaling", {"type": "longrope", **{key: scaling[key] for key in _LONGROPE}}
        return
    yield "rope_scaling", scaling


_LONGROPE = ("short_factor", "long_factor")


def _scaling(
    rope: Mapping[str, Any], *, filled_in: Mapping[str, Any], context: object = None
) -> dict[str, Any]:
    """``rope_scaling`` of version 4; empty where nothing is scaled."""
    kind = filled_in.get("rope_type", "default")
    if kind == "default":
        return {}
    scaling = {
        key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")
    }
    scaling["rope_type"] = kind
    if kind == "yarn" and context is not None and scaling.get("original_max_position_embeddings") == context:
        # transformers 5 fills this in where it was not said; some releases of version 4 took it for "not
        # scaled at all".
        del scaling["original_max_position_embeddings"]
    return scaling


def _part(rope: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    part = rope.get(kind)
    return part if isinstance(part, Mapping) else {}
