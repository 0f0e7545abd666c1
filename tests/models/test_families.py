"""Every variant of every family works, or is refused by the plan and by the engine in the same words."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import families
import pytest
import torch
import variants
from engine_runs import of, output, start

from engine.architecture.families import Architecture, unfit_weight
from engine.architecture.family_table import FAMILIES
from engine.architecture.headers import TensorInfo
from engine.architecture.layers import STRUCTURES
from engine.architecture.positions import PositionTable, position_table
from engine.architecture.refusals import refuse_model
from engine.architecture.unfit import CONVOLUTION, EXPERTS
from engine.config.loading import load
from engine.errors import ExitCode, PreflightError
from engine.models.causal_lm import CausalLM
from engine.plan.lengths import too_long
from engine.plan.plan import make_plan
from engine.run.events import Sample

BOTH = [(name, name) for name in variants.VARIANTS]


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    try:
        yield variants.build(tmp_path / "model", request.param)
    except variants.Unknown:
        pytest.skip(f"this transformers has no {request.param}")


@pytest.mark.parametrize(("folder", "name"), BOTH, indirect=["folder"], ids=variants.VARIANTS)
def test_plan_and_engine_come_to_the_same_verdict(folder: Path, name: str) -> None:
    planned, lm = families.asked(folder), families.opened(folder)
    alone = families.asked(families.without_weights(folder))
    assert families.row(name, planned) == families.written_rows()[key(name)]
    if isinstance(planned, PreflightError):
        assert isinstance(lm, PreflightError), "planned to be refused, and opened"
        assert str(lm) == str(planned)
        assert planned.exit_code == ExitCode.PREFLIGHT
        assert isinstance(alone, PreflightError)
        assert alone.message == planned.message
        return
    assert isinstance(lm, CausalLM), lm
    assert isinstance(alone, Architecture), alone
    assert families.difference(lm, folder) < 1e-5
    assert_positions_are_known(lm, planned, alone)


def key(name: str) -> str:
    return "|".join(families.row(name, PreflightError("")).split("|")[1:3])


def assert_positions_are_known(lm: CausalLM, planned: Architecture, alone: Architecture) -> None:
    """A text that is one token too long is refused where it would fail, and nowhere else."""
    table = planned.position_table
    assert table == alone.position_table == lm.position_table
    longest = table.rows if table else planned.max_positions or 256
    assert families.reads(lm, longest)
    assert families.reads(lm, longest + 1) == (table is None)


def test_the_page_has_every_variant_and_nothing_else() -> None:
    assert set(families.written_rows()) == {key(name) for name in variants.VARIANTS}


def test_every_family_of_the_table_is_tried() -> None:
    tried = {settings.get("model_type", name) for name, settings in variants.VARIANTS.items()}
    assert set(FAMILIES) <= tried


def test_a_model_that_is_opened_inside_of_inference_mode_is_like_any_other(tmp_path: Path) -> None:
    """As a verification opens it; longrope rewrites its table in place."""
    folder = variants.build(tmp_path / "model", "phi3_longrope")
    with torch.inference_mode():
        lm = families.opened(folder)
    assert isinstance(lm, CausalLM), lm
    assert families.difference(lm, folder) < 1e-5


# -- texts that are longer than a table of positions ----------------------------------------------------


def test_a_text_longer_than_a_table_of_positions_is_refused_by_the_plan(tmp_path: Path) -> None:
    """OPT has two rows more than positions; GPT-J computes its table, MPT its slopes up to a length."""
    for name, field in (("opt", "max_position_embeddings"), ("gptj", "n_positions"), ("mpt", "max_seq_len")):
        source = str(variants.build(tmp_path / name, name))
        lengths = {
            "block_ap.sequence_length": 257,
            "e2e_qp.sequence_length": 300,
            "evaluation.sequence_length": 256,
            "grid.group_size": 32,
        }
        plan = make_plan(load("smoke", overrides={"model.source": source, **lengths}))
        found = {problem.where: str(problem) for problem in plan.problems}
        assert set(found) == {"block_ap.sequence_length", "e2e_qp.sequence_length"}
        assert all(field in text and "256" in text for text in found.values())
        assert not any("longer than" in warning for warning in plan.warnings)


def test_a_text_longer_than_rotary_positions_is_only_warned_of(tmp_path: Path) -> None:
    source = str(variants.build(tmp_path / "model", "llama"))
    overrides = {"model.source": source, "grid.group_size": 32, "evaluation.sequence_length": 300}
    plan = make_plan(load("smoke", overrides=overrides))
    assert not plan.problems
    assert any("evaluation.sequence_length 300 is longer" in warning for warning in plan.warnings)


def test_a_table_of_a_family_that_nobody_knows_is_seen_in_its_weights(tmp_path: Path) -> None:
    table = PositionTable("max_position_embeddings", 256)
    text = {"model_type": "my_own", "max_position_embeddings": 256}
    assert position_table(text, {"model.wpe.weight": (258, 64)}) == PositionTable(
        "max_position_embeddings", 256
    )
    assert position_table(text, {"vision.position_embedding.weight": (99, 64)}) is None
    config = load("smoke", overrides={"evaluation.sequence_length": 300})
    (refusal,) = too_long(config, table)
    assert "evaluation.sequence_length" in str(refusal)


def test_a_sample_ends_where_the_table_of_positions_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MPT has another name for their number than most."""
    monkeypatch.setenv("EQAT_CACHE_DIR", str(tmp_path / "cache"))
    source = variants.build(tmp_path / "model", "mpt", max_seq_len=24, eos_token_id=None)
    run = families.small_run(source, **{"block_ap.enabled": False, "e2e_qp.enabled": False})
    assert start(run).code() == ExitCode.DONE, output(run)
    arguments = ("--task", "generate", "--prompt", "ten tokens", "--new-tokens", "100")
    assert start(run, arguments=arguments).code() == ExitCode.DONE, output(run)
    written = [sample.tokens for sample in of(run, Sample)]
    assert len(written) == 2
    assert max(written) <= 24 - len("ten tokens")


# -- what nobody has a tiny model of --------------------------------------------------------------------


def stored(**shapes: tuple[int, ...]) -> dict[str, TensorInfo]:
    return {name: TensorInfo(shape, "F16", 2) for name, shape in shapes.items()}


BLOCK = {"self_attn.q_proj.weight": (64, 64), "norm.weight": (64,)}


@pytest.mark.parametrize(
    ("tensor", "shape", "why"),
    [
        ("mlp.experts.gate_up_proj", (4, 64, 96), EXPERTS),
        ("mlp.experts.3.w1.weight", (64, 96), EXPERTS),
        ("ffn_gate_exps.weight", (4, 64, 96), EXPERTS),
        ("ffn_gate.3.weight", (64, 96), EXPERTS),
        ("mixer.conv1d.weight", (96, 1, 4), CONVOLUTION),
        ("short.kernel", (96, 1, 4), CONVOLUTION),
        ("mixer.A_log", (128, 16), CONVOLUTION),
        ("mlp.shared_experts.up_proj.weight", (64, 64), None),
        ("self_attn.q_norm.weight", (4, 16), None),
        ("attn.bias", (1, 1, 64, 64), None),
        ("attn.masked_bias", (), None),
        ("self_attn.rotary_emb.cos_cached", (1, 1, 64, 16), None),
    ],
)
def test_a_weight_is_known_by_its_name_and_shape(
    tensor: str, shape: tuple[int, ...], why: str | None
) -> None:
    """Masks and tables that older releases stored are no weights; norms may have a row for each head."""
    for stack in ("model.layers", "transformer.h", "blk"):
        tensors = stored(**{f"{stack}.0.{name}": size for name, size in {**BLOCK, tensor: shape}.items()})
        found = unfit_weight(tensors, 1)
        assert (found and found.why) == why
        assert found is None or found.name == f"{stack}.0.{tensor}"
        # What lies beyond the last block is asked for by nobody.
        beyond = {name.replace(".0.", ".1.", 1): info for name, info in tensors.items()}
        plain = stored(**{f"{stack}.0.{name}": size for name, size in BLOCK.items()})
        assert unfit_weight({**plain, **beyond}, 1) is None


@pytest.mark.parametrize("name", sorted(STRUCTURES))
def test_a_structure_is_refused_by_both_for_the_same_reason(name: str, tmp_path: Path) -> None:
    """Whatever else its configuration has or lacks."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": name}))
    for found in (families.asked(tmp_path), families.opened(tmp_path)):
        assert isinstance(found, PreflightError)
        assert found.message == STRUCTURES[name]


def test_blocks_are_looked_at_also_where_nobody_says_how_many_there_are() -> None:
    shapes = {"model.layers.5.mixer.conv1d.weight": (96, 1, 4), "model.layers.5.norm.weight": (64,)}
    with pytest.raises(PreflightError, match=r"model\.layers\.5\.mixer\.conv1d\.weight.*convolutions"):
        refuse_model({"model_type": "nemotron_h", "layers_block_type": ["mamba"] * 6}, stored(**shapes))


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"model_type": "qwen3_moe", "num_experts": 8}, EXPERTS),
        ({"model_type": "qwen3_moe", "num_experts": 8, "mlp_only_layers": [0, 1]}, None),
        ({"model_type": "qwen3_moe", "num_experts": 8, "decoder_sparse_step": 3}, None),
        ({"model_type": "deepseek_v3", "n_routed_experts": 8, "first_k_dense_replace": 1}, EXPERTS),
        ({"model_type": "deepseek_v3", "n_routed_experts": 8, "first_k_dense_replace": 3}, None),
        ({"model_type": "exaone_moe", "num_experts": 8, "mlp_layer_types": ["dense", "dense"]}, None),
        ({"model_type": "dbrx", "ffn_config": {"moe_num_experts": 16}}, EXPERTS),
        ({"model_type": "llama", "num_experts": 8, "num_experts_per_tok": 2}, None),
        ({"model_type": "my_own", "num_experts_per_tok": 2}, None),
        ({"model_type": "my_own", "num_experts": 1, "num_local_experts": None}, None),
        ({"model_type": "my_own", "num_local_experts": 4}, EXPERTS),
        ({"model_type": "doge", "num_experts": 16384}, None),
        ({"model_type": "doge", "is_moe": True, "num_experts": 16384}, EXPERTS),
        ({"model_type": "gemma4_text", "enable_moe_block": True, "num_experts": 8}, EXPERTS),
        ({"model_type": "qwen3_5_text"}, CONVOLUTION),
        ({"model_type": "my_own", "layer_types": ["full_attention", "linear_attention"]}, CONVOLUTION),
        ({"model_type": "jamba", "layers_block_type": ["mamba", "attention"]}, CONVOLUTION),
    ],
    ids=lambda value: str(value)[:70],
)
def test_without_files_the_configuration_says_what_the_blocks_are(
    fields: dict[str, Any], why: str | None
) -> None:
    config = {"num_hidden_layers": 2, **fields}
    if why is None:
        refuse_model(config, {})
        return
    with pytest.raises(PreflightError) as caught:
        refuse_model(config, {})
    assert caught.value.message == why
