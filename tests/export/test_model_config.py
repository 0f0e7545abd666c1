"""config.json of an export: as its authors wrote it, and readable under the names of version 4 as well."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from packed_models import open_model, packed_blocks, write
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from engine.config.model import ModelConfig
from engine.export.checkpoint import _architectures
from engine.export.model_config import export_config
from engine.models.source import ModelSource

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))

import tiny

OURS = ("dtype", "torch_dtype", "quantization_config", "tie_word_embeddings", "architectures")

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
NESTED = {
    "full_attention": {"rope_type": "linear", "rope_theta": 5e5, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 7e3},
}
PLAIN = {kind: {"rope_type": "default", "rope_theta": part["rope_theta"]} for kind, part in NESTED.items()}


def saved(config: Any) -> dict[str, Any]:
    """config.json as transformers writes it."""
    return json.loads(json.dumps(config.to_diff_dict(), default=str))


def understood(content: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """How transformers reads a config.json, and what it would write of that."""
    config = CONFIG_MAPPING[content["model_type"]].from_dict(json.loads(json.dumps(content)))
    return config, saved(config)


def older_spelling(content: dict[str, Any]) -> dict[str, Any]:
    """The same settings as version 4 would have written them."""
    said = export_config(content, content)
    return {key: value for key, value in said.items() if key != "rope_parameters"}


CAUSAL = sorted(
    name
    for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if name in CONFIG_MAPPING and hasattr(CONFIG_MAPPING[name], "rope_parameters")
)


def test_every_causal_family_is_read_the_same_in_either_spelling() -> None:
    """Also by the transformers that is installed: what is added contradicts nothing."""
    seen = 0
    for name in CAUSAL:
        try:
            original = CONFIG_MAPPING[name]()
        except Exception:  # classes that cannot be made of defaults
            continue
        content = saved(original)
        if "rope_parameters" not in content:
            continue
        seen += 1
        written = export_config(content, content)
        assert {key: written[key] for key in content} == content, name
        for spelling in (written, older_spelling(content)):
            read, filled_in = understood(spelling)
            assert read.rope_parameters == original.rope_parameters, name
            assert export_config(spelling, filled_in) == spelling, name
    assert seen > 60


SCALED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": ({"rope_parameters": LLAMA3}, {"rope_theta": 5e5, "rope_scaling": ("rope_type", "llama3")}),
    "qwen2": ({"rope_parameters": YARN}, {"rope_theta": 1e4, "rope_scaling": ("factor", 4.0)}),
    "mistral": (
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 3e4, "factor": 2.0}},
        {"rope_theta": 3e4, "rope_scaling": ("rope_type", "dynamic")},
    ),
    "stablelm": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 2e4, "partial_rotary_factor": 0.5}},
        {"rope_theta": 2e4, "partial_rotary_factor": 0.5},
    ),
    "phi": (
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.75}},
        {"rope_theta": 1e4, "partial_rotary_factor": 0.75, "rope_scaling": ("factor", 2.0)},
    ),
    "gpt_neox": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 2e4, "partial_rotary_factor": 0.5}},
        {"rotary_emb_base": 2e4, "rotary_pct": 0.5},
    ),
    "phi3": (
        {
            "rope_parameters": LONGROPE,
            "original_max_position_embeddings": 64,
            "hidden_size": 64,
            "num_attention_heads": 4,
        },
        {"rope_scaling": ("type", "longrope"), "original_max_position_embeddings": 64},
    ),
    "gemma3_text": (
        {"rope_parameters": NESTED},
        {"rope_theta": 5e5, "rope_local_base_freq": 7e3, "rope_scaling": ("factor", 8.0)},
    ),
    "olmo3": (
        {
            "rope_parameters": {
                "full_attention": {**YARN, "rope_theta": 5e5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 5e5},
            }
        },
        {"rope_theta": 5e5, "rope_scaling": ("rope_type", "yarn")},
    ),
    "modernbert-decoder": (
        {"rope_parameters": PLAIN},
        {"global_rope_theta": 5e5, "local_rope_theta": 7e3},
    ),
}


@pytest.mark.parametrize("family", SCALED)
def test_scaled_partial_and_nested_settings_have_their_older_names(family: str) -> None:
    changes, wanted = SCALED[family]
    original = CONFIG_MAPPING[family](**{"max_position_embeddings": 256, **json.loads(json.dumps(changes))})
    # Some versions of transformers write an older name beside it, with the default of its class.
    content = {name: value for name, value in saved(original).items() if name not in wanted}
    written = export_config(content, content)
    for name, value in wanted.items():
        if isinstance(value, tuple):
            assert written[name][value[0]] == value[1]
            assert "rope_theta" not in written[name]
        else:
            assert written[name] == value
    read, _ = understood(written)
    read.rope_parameters.pop("type", None)  # Phi-3's older word stays beside the newer one
    assert read.rope_parameters == original.rope_parameters


def test_phi3_gets_exactly_the_three_fields_that_version_4_accepts() -> None:
    changes, _ = SCALED["phi3"]
    content = saved(CONFIG_MAPPING["phi3"](max_position_embeddings=256, **changes))
    assert sorted(export_config(content, content)["rope_scaling"]) == ["long_factor", "short_factor", "type"]


def test_what_version_4_has_no_word_for_is_not_said_wrongly() -> None:
    two_bases = {
        "full_attention": {"rope_type": "default", "rope_theta": 5e5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    content = saved(CONFIG_MAPPING["olmo3"](rope_parameters=two_bases))
    assert "rope_theta" not in export_config(content, content)


def test_a_number_that_transformers_filled_in_is_not_passed_off_as_the_authors() -> None:
    """yarn without the context before it: version 4 would divide the context by itself and not scale."""
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
    config = CONFIG_MAPPING["llama"](max_position_embeddings=256, rope_parameters=dict(rope))
    content = saved(config)
    written = export_config({**content, "rope_parameters": rope}, content)
    assert written["rope_scaling"] == {"rope_type": "yarn", "factor": 4.0}
    assert export_config(content, content)["rope_scaling"] == {"rope_type": "yarn", "factor": 4.0}


def test_an_empty_older_name_gives_way_and_a_stated_one_stays() -> None:
    config = CONFIG_MAPPING["llama"](max_position_embeddings=256, rope_parameters=dict(LLAMA3))
    content = saved(config)
    written = export_config({**content, "rope_scaling": None, "rope_theta": "500000"}, content)
    assert written["rope_scaling"]["factor"] == 8.0
    assert written["rope_theta"] == "500000"


def test_a_default_that_changed_between_versions_is_written_down() -> None:
    """A Cohere file without a base: version 5 takes 500000, version 4 takes 10000."""
    content = saved(CONFIG_MAPPING["cohere"]())
    bare = {key: value for key, value in content.items() if key != "rope_parameters"}
    read, filled_in = understood(bare)
    assert export_config(bare, filled_in)["rope_theta"] == read.rope_parameters["rope_theta"]


@pytest.mark.parametrize(
    ("said", "written"),
    [
        (None, ["LlamaForCausalLM"]),
        ([], ["LlamaForCausalLM"]),
        (["LlamaModel"], ["LlamaForCausalLM"]),
        (["LlamaForSequenceClassification"], ["LlamaForCausalLM"]),
        (["MistralForCausalLM"], ["MistralForCausalLM"]),
        (["LlamaForCausalLM", "Other"], ["LlamaForCausalLM", "Other"]),
    ],
)
def test_the_class_named_is_one_that_writes_text(said: list[str] | None, written: list[str]) -> None:
    assert _architectures(said, "LlamaForCausalLM") == written


@pytest.mark.parametrize(
    ("family", "older"),
    [*((family, False) for family in tiny.ARCHITECTURES), ("llama3", True), ("gemma3", True), ("phi3", True)],
)
def test_an_export_keeps_every_key_of_the_original(tmp_path: Path, family: str, older: bool) -> None:
    folder = tiny.build(tmp_path / "fp", family)
    content = json.loads((folder / "config.json").read_text())
    content = {**(older_spelling(content) if older else content), "our_own_note": {"kept": [1, None]}}
    (folder / "config.json").write_text(json.dumps(content))
    before = ModelSource.open(ModelConfig(source=str(folder))).config.rope_parameters
    source, lm = open_model(folder)
    result = write(tmp_path / "out", lm, source, packed_blocks(lm, 4, 32).__getitem__)
    written = json.loads((result.path / "config.json").read_text())
    assert {key: written[key] for key in content if key not in OURS} == {
        key: value for key, value in content.items() if key not in OURS
    }
    assert written.keys() - content.keys() <= {*OURS, *older_spelling(content)}
    assert AutoConfig.from_pretrained(result.path).rope_parameters == before
