"""Embedding, blocks one at a time, head: together they are the model, for every architecture."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from engine.config.model import ModelConfig
from engine.models.causal_lm import CausalLM
from engine.models.source import ModelSource

CPU = torch.device("cpu")
STORIES = Path(__file__).parents[2].parent / "shared" / "models" / "stories260K"


def open_model(folder: Path, dtype: torch.dtype = torch.float32) -> CausalLM:
    return CausalLM(ModelSource.open(ModelConfig(source=str(folder))), CPU, dtype)


def streamed_logits(lm: CausalLM, ids_BT: Tensor) -> Tensor:
    hidden = lm.embed(ids_BT)
    for index in range(lm.blocks):
        hidden = lm.run_block(lm.load_block(index), index, hidden)
    return lm.head(hidden)


def reference(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model as transformers loads it."""
    return tiny.with_soft_cap(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    return {name: tiny.build(root / name, name) for name in tiny.ARCHITECTURES}


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_streamed_logits_are_those_of_the_whole_model(name: str, folders: dict[str, Path]) -> None:
    lm, whole, ids = open_model(folders[name]), reference(folders[name]), tiny.tokens()
    with torch.no_grad():
        expected, logits = whole(ids).logits, streamed_logits(lm, ids)
    assert logits.shape == (2, 21, lm.vocab_size)
    assert expected.std() > 0.1, "the model must not be so flat that anything passes"
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_the_head_without_the_models_forward_gives_the_same_bits_or_is_not_taken(
    name: str, folders: dict[str, Path]
) -> None:
    lm = open_model(folders[name])
    caps = getattr(lm.model.config, "final_logit_softcapping", None) is not None
    assert (lm.tail is None) == caps, "a norm and the embeddings are all that most models have there"
    hidden = torch.randn(1, 7, lm.hidden_size)
    with torch.no_grad():
        assert torch.equal(lm.head(hidden), lm._forward_head(hidden))


@pytest.mark.parametrize("name", ["llama3", "gemma3"])
def test_bfloat16_gives_the_same_bits_as_the_whole_model(name: str, folders: dict[str, Path]) -> None:
    lm, whole = open_model(folders[name], torch.bfloat16), reference(folders[name], torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(streamed_logits(lm, tiny.tokens()), whole(tiny.tokens()).logits)


@pytest.mark.parametrize("name", ["llama2", "gemma2", "qwen2_sliding", "phi3"])
def test_gradients_reach_every_weight_and_equal_those_of_the_whole_model(
    name: str, folders: dict[str, Path]
) -> None:
    lm, whole, ids = open_model(folders[name]), reference(folders[name]), tiny.tokens()
    nn.functional.cross_entropy(whole(ids).logits.flatten(0, 1), ids.flatten()).backward()
    blocks = [lm.load_block(index).requires_grad_(True) for index in range(lm.blocks)]
    hidden = lm.embed(ids)
    for index, block in enumerate(blocks):
        hidden = lm.run_block(block, index, hidden)
    nn.functional.cross_entropy(lm.head(hidden).flatten(0, 1), ids.flatten()).backward()
    expected = dict(whole.named_parameters())
    for index, block in enumerate(blocks):
        for parameter_name, parameter in block.named_parameters():
            full = f"{lm.block_prefix(index)}.{parameter_name}"
            torch.testing.assert_close(parameter.grad, expected[full].grad, atol=1e-6, rtol=1e-4, msg=full)
    assert all(parameter.grad is None for parameter in lm.model.parameters())


def test_layers_are_called_with_their_own_masks_and_rotary_tables(folders: dict[str, Path]) -> None:
    lm = open_model(folders["gemma3"])
    local, full = lm.block_kwargs(0, 1, 21), lm.block_kwargs(1, 1, 21)
    assert not torch.equal(local["position_embeddings"][0], full["position_embeddings"][0])
    assert local["attention_mask"].sum() == sum(min(row + 1, tiny.WINDOW) for row in range(21))
    assert full["attention_mask"] is None or full["attention_mask"].sum() == 21 * 22 // 2


def test_block_arguments_are_recorded_once_per_shape_and_can_be_used_in_training(
    folders: dict[str, Path],
) -> None:
    lm = open_model(folders["mistral"])
    with torch.inference_mode():
        first = lm.block_kwargs(0, 2, 12)
    assert lm.block_kwargs(0, 2, 12) is first
    assert not first["position_embeddings"][0].is_inference()
    assert lm.block_kwargs(0, 2, 12, torch.float16)["position_embeddings"][0].dtype == torch.float16


def test_linear_names_and_sizes_describe_the_model(folders: dict[str, Path]) -> None:
    lm = open_model(folders["phi3"])
    assert lm.block_prefix(2) == "model.layers.2"
    assert lm.linear_names(0) == (
        "self_attn.o_proj",
        "self_attn.qkv_proj",
        "mlp.gate_up_proj",
        "mlp.down_proj",
    )
    assert (lm.blocks, lm.hidden_size, lm.vocab_size) == (3, 64, 320)
    whole = reference(folders["phi3"])
    assert lm.parameters_count == sum(p.numel() for p in whole.parameters())
    assert lm.fp_bytes() == 2 * lm.parameters_count


def test_tied_head_shares_the_embedding_and_is_named_once(folders: dict[str, Path]) -> None:
    lm = open_model(folders["smollm2"])
    assert lm.tied
    assert lm.model.get_output_embeddings().weight is lm.model.get_input_embeddings().weight
    assert set(lm.outer_state()) == {"model.embed_tokens.weight", "model.norm.weight"}
    assert "lm_head.weight" in open_model(folders["llama2"]).outer_state()


def test_blocks_are_independent_frozen_and_freed(folders: dict[str, Path]) -> None:
    lm = open_model(folders["gemma3"])
    one, two = lm.load_block(1), lm.load_block(1, torch.bfloat16)
    assert not one.training
    assert not any(parameter.requires_grad for parameter in one.parameters())
    assert {parameter.dtype for parameter in two.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.zero_()
    assert all(p.count_nonzero() > 0 for p in lm.load_block(1).parameters())
    lm.run_block(two, 1, lm.embed(tiny.tokens()).bfloat16())
    gone = weakref.ref(two.self_attn.q_proj.weight)
    del two
    gc.collect()
    assert gone() is None
    assert all(parameter.is_meta for parameter in lm.model.model.layers.parameters())


def test_a_real_trained_model_streams_exactly() -> None:
    if not STORIES.is_dir():
        pytest.skip("the shared model is not here")
    source = ModelSource.open(ModelConfig(source=str(STORIES)))
    ids = torch.tensor([source.tokenizer()("Once upon a time, there was a little girl")["input_ids"]])
    with torch.no_grad():
        logits = streamed_logits(CausalLM(source, CPU, torch.float32), ids)
        torch.testing.assert_close(logits, reference(STORIES)(ids).logits, atol=1e-5, rtol=0)
    loss = nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])
    assert loss < 3.0, "a trained model predicts its kind of story"
