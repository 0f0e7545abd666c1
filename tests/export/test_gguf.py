"""A GGUF export is what was trained, as its own reader, the gguf package, transformers and eqat read it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import gguf_models
import made_tokenizers
import numpy as np
import pytest
import tiny
import torch
from gguf_models import CASES, Case
from packed_models import (
    compare,
    logits,
    open_model,
    packed_blocks,
    save_model,
    some_ids,
    trained_logits,
    write,
)
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from engine.architecture.description import describe
from engine.architecture.refusals import refuse
from engine.config.derived import resolve
from engine.config.grid import GridConfig
from engine.config.loading import load
from engine.errors import PreflightError
from engine.export.gguf_file import file_name
from engine.export.gguf_reader import GGUFContent
from engine.export.gguf_tokenizer import PRE_TOKENIZERS, tokenizer_metadata
from engine.export.layout import form_of
from engine.plan.export_sizes import exported_bytes
from engine.plan.plan import make_plan
from engine.quant.packed import PackedBlock, PackedWeight

PLAIN = (0, 1, 30)


class Written:
    """A model, its trained blocks, and the file."""

    def __init__(self, case: Case, place: Path) -> None:
        self.case = case
        self.model = save_model(place / "fp", case.model_type, **case.changes)
        self.source, self.lm = open_model(self.model)
        self.blocks = packed_blocks(self.lm, case.bits, case.group, case.symmetric, case.fixed)
        self.form = form_of("gguf")
        self.form.check(self.lm, torch.bfloat16)
        card = {"base_model": "org/Mine-7B"}
        self.result = write(
            place / "out", self.lm, self.source, self.blocks.__getitem__, layout=self.form, card=card
        )
        self.file = self.result.path / self.result.files[0]

    def compared(self) -> Any:
        return compare(self.result.path, self.lm, self.blocks.__getitem__, some_ids(), layout=form_of("gguf"))

    def trained(self) -> torch.Tensor:
        return trained_logits(self.lm, self.blocks, some_ids())


LLAMA = Case("llama", {}, 4, 64, False, "Q4_1")


@pytest.mark.parametrize("case", CASES, ids=gguf_models.NAMES)
def test_what_is_in_the_file_is_what_was_trained(case: Case, tmp_path: Path) -> None:
    made = Written(case, tmp_path)
    assert made.file.name == f"Mine-7B-{case.kind}.gguf"
    check = made.compared()
    assert (check.problems, check.verified) == ((), True)
    assert check.max_logit_diff < 0.02
    bits = {"Q2_0_g64": 2.25, "Q4_0": 4.5, "Q4_1": 5.0, "Q8_0": 8.5}[case.kind]
    assert made.result.bits_per_weight == bits
    assert ("of a step" in check.rounded) is (case.kind == "Q4_1")
    # eqat reads it back as a model of its own: names, row orders and metadata come from its other reader.
    _, again = open_model(made.file)
    difference = logits(again, again.load_block, some_ids()) - made.trained()
    assert difference.abs().max() < 0.02


@pytest.mark.parametrize("case", CASES[1::2], ids=gguf_models.NAMES[1::2])
def test_the_plan_knows_the_bytes_of_the_tensors(case: Case, tmp_path: Path) -> None:
    made = Written(case, tmp_path)
    described = describe(str(made.model))
    grid = GridConfig(
        bits=case.bits,
        group_size=case.group,
        symmetric=case.symmetric,
        zero_point="fixed" if case.fixed else "learned",
    )
    refuse(described.architecture, described.config, grid, ["gguf"])
    stored = GGUFContent(made.file).tensors
    beside = sum(place.nbytes for name, place in stored.items() if name == "rope_freqs.weight")
    planned = exported_bytes(described.architecture, grid, "gguf")
    assert planned == sum(place.nbytes for place in stored.values()) - beside
    padded = sum(-(-place.nbytes // 32) * 32 for place in stored.values())
    assert made.result.bytes == min(place.start for place in stored.values()) + padded


@pytest.mark.parametrize("case", [case for case in CASES if case.transformers], ids=str)
def test_transformers_computes_the_trained_logits(case: Case, tmp_path: Path) -> None:
    made = Written(case, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        made.result.path, gguf_file=made.file.name, dtype=torch.float32
    ).eval()
    with torch.no_grad():
        have = model(some_ids()).logits
    assert (have - made.trained()).abs().max() < 0.01


@pytest.mark.parametrize(
    ("bits", "symmetric", "kind"), [(3, False, "Q4_0"), (4, False, "Q4_1"), (8, True, "Q8_0")]
)
def test_the_gguf_package_reads_the_trained_weights(
    bits: int, symmetric: bool, kind: str, tmp_path: Path
) -> None:
    made = Written(Case("qwen2", {}, bits, 64, symmetric, kind), tmp_path)
    reader = gguf.GGUFReader(made.file)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    tensor = stored["blk.1.ffn_down.weight"]
    assert tensor.tensor_type.name == kind
    have = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type))
    want = made.blocks[1].linears["mlp.down_proj"].dequantize(torch.float32)
    assert (have - want).abs().max() <= (2e-3 if kind == "Q4_1" else 0) * want.abs().max()
    assert reader.fields["general.file_type"].contents() == {"Q4_0": 2, "Q4_1": 3, "Q8_0": 7}[kind]
    assert reader.fields["tokenizer.ggml.eos_token_id"].contents() == 2


def test_each_block_is_asked_for_once_and_in_order(tmp_path: Path) -> None:
    made = Written(LLAMA, tmp_path)
    asked: list[int] = []

    def block(index: int) -> PackedBlock:
        asked.append(index)
        return made.blocks[index]

    result = write(tmp_path / "again", made.lm, made.source, block, layout=made.form)
    assert asked == [0, 1]
    assert [path.name for path in sorted(result.path.iterdir())] == ["README.md", result.files[0]]
    card = (result.path / "README.md").read_text()
    assert f"llama-cli -m {result.files[0]}" in card
    twice = write(tmp_path / "twice", made.lm, made.source, block, layout=made.form)
    assert (twice.path / result.files[0]).read_bytes() == (result.path / result.files[0]).read_bytes()


def _flip(tensor: str, at: int) -> Callable[[bytearray, GGUFContent], None]:
    def change(data: bytearray, content: GGUFContent) -> None:
        data[content.tensors[tensor].start + at] ^= 1

    return change


def _replace(old: bytes, new: bytes) -> Callable[[bytearray, GGUFContent], None]:
    def change(data: bytearray, content: GGUFContent) -> None:
        assert len(old) == len(new)
        where = data.index(old)
        data[where : where + len(old)] = new

    return change


def _number(key: str, value: int | float) -> Callable[[bytearray, GGUFContent], None]:
    def change(data: bytearray, content: GGUFContent) -> None:
        where = data.index(key.encode()) + len(key) + 4
        data[where : where + 4] = (np.float32 if isinstance(value, float) else np.uint32)(value).tobytes()

    return change


Q = "blk.1.ffn_up.weight"
DAMAGE = {
    "a number": (_flip(Q, 9), "model.layers.1.mlp.up_proj: 1 integers differ"),
    "a scale": (_flip(Q, 0), "model.layers.1.mlp.up_proj: 1 scales differ"),
    "a bias": (_flip(Q, 2), "model.layers.1.mlp.up_proj: 1 biases differ"),
    "a row of the queries": (_flip("blk.0.attn_q.weight", 9), "layers.0.self_attn.q_proj: 1 integers differ"),
    "a norm": (_flip("blk.0.attn_norm.weight", 2), "model.layers.0.input_layernorm.weight: 1 values differ"),
    "the embedding": (_flip("token_embd.weight", 0), "model.embed_tokens.weight: 1 values differ"),
    "a name": (
        _replace(b"blk.1.ffn_up.", b"blk.1.ffn_ub."),
        "tensor 'model.layers.1.mlp.up_proj.weight' is missing",
    ),
    "heads": (
        _number("llama.attention.head_count", 8),
        "has shape [256, 256], but config.json asks for [512, 256]",
    ),
    "the context": (_number("llama.context_length", 8), "max_position_embeddings 8, and it is 512"),
    "the rotary base": (_number("llama.rope.freq_base", 5e5), "rope_theta 500000.0, and it is 10000.0"),
    "the file's type": (_number("general.file_type", 7), "general.file_type is of no type"),
    "a token": (_replace(b"<|unused300|>", b"<|unused30x|>"), "token 300 is '<|unused30x|>'"),
    "the magic": (_replace(b"GGUF", b"GGUX"), "its header is damaged (this is no GGUF file)"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_what_differs_in_the_file_is_named(what: str, tmp_path: Path) -> None:
    made = Written(LLAMA, tmp_path)
    change, says = DAMAGE[what]
    data = bytearray(made.file.read_bytes())
    change(data, GGUFContent(made.file))
    made.file.write_bytes(data)
    check = made.compared()
    assert not check.verified
    assert says in " | ".join(check.problems)


@pytest.mark.parametrize("kept", [0, 10, 3000, -100])
def test_a_file_that_is_cut_off_is_named(kept: int, tmp_path: Path) -> None:
    made = Written(LLAMA, tmp_path)
    made.file.write_bytes(made.file.read_bytes()[:kept])
    check = made.compared()
    assert not check.verified
    assert "Mine-7B-Q4_1.gguf" in check.problems[0]


def test_integers_that_the_type_of_their_grid_does_not_reach_are_refused(tmp_path: Path) -> None:
    """A grid that says that its zero points are fixed, and integers of one that has them free."""
    made = Written(Case("qwen2", {}, 4, 64, False, "Q4_1"), tmp_path)
    block = made.blocks[0]
    free = block.linears["mlp.up_proj"]
    said = dataclasses.replace(free.grid, symmetric=True)
    wrong = PackedWeight(free.words, free.scale, free.zero_point, said)
    linears = {**block.linears, "mlp.up_proj": wrong}
    with pytest.raises(PreflightError, match=r"its integers lie -15 to 15 .* Q4_0 holds -8 to 7") as caught:
        write(
            tmp_path / "wrong",
            made.lm,
            made.source,
            lambda index: PackedBlock(linears, block.others),
            layout=made.form,
        )
    assert caught.value.where == "model.layers.0.mlp.up_proj.weight"
    assert not (tmp_path / "wrong").exists()


REFUSED: dict[str, tuple[str, dict[str, Any], GridConfig]] = {
    "8 bits with zero points of their own; grid.zero_point": (
        "llama2",
        {},
        GridConfig(bits=8, group_size=32),
    ),
    "a model of type 'olmo2'": ("olmo2", {}, GridConfig()),
    "a window of 8 tokens": ("mistral", {}, GridConfig()),
    "a window of 8 tokens of": ("qwen2_sliding", {}, GridConfig()),
    "other limits than those of Llama 3.1": ("llama3", {}, GridConfig()),
    "attention that is scaled by 24": ("gemma2", {}, GridConfig()),
    "another order of layers": ("gemma3", {"query_pre_attn_scalar": 16}, GridConfig()),
    "biases of this architecture": ("qwen3", {"attention_bias": True}, GridConfig()),
    "scaling of type 'yarn'": (
        "llama2",
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}},
        GridConfig(),
    ),
    "the activation gelu": ("llama2", {"hidden_act": "gelu"}, GridConfig()),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_a_file_cannot_hold_is_refused_by_the_plan_with_a_format_that_does(
    words: str, tmp_path: Path
) -> None:
    name, changes, grid = REFUSED[words]
    described = describe(str(tiny.build(tmp_path / "model", name, **changes)))
    refuse(described.architecture, described.config, grid, ["gptq_v2"])
    with pytest.raises(PreflightError) as caught:
        refuse(described.architecture, described.config, grid, ["gptq_v2", "gguf"])
    assert words in str(caught.value)
    assert caught.value.where == "export.formats"
    assert (
        "gptq_v2 can; or choose a grid that it holds, or leave gguf out of export.formats"
        in caught.value.hint
    )


EXPECTATIONS: dict[str, tuple[str, GridConfig]] = {
    "at 4.5 bits a weight; fixed zero points": ("llama2", GridConfig(bits=2, group_size=64)),
    "loads in llama.cpp from mid-2026 on": ("llama2", GridConfig(bits=2, group_size=64, symmetric=True)),
    "no type of 3 bits": ("qwen3", GridConfig(bits=3, group_size=32)),
    "whose biases are rounded": ("qwen2", GridConfig(bits=4)),
    "without its window of 8 tokens": ("phi3", GridConfig(bits=4, symmetric=True)),
}


@pytest.mark.parametrize("words", EXPECTATIONS)
def test_the_plan_says_what_somebody_might_not_expect_of_a_file(words: str, tmp_path: Path) -> None:
    name, grid = EXPECTATIONS[words]
    folder = tiny.build(tmp_path / "model", name)
    settings = {
        "model.source": str(folder),
        "grid.bits": grid.bits,
        "grid.group_size": grid.group_size,
        "grid.symmetric": grid.symmetric,
    }
    said = {
        format: make_plan(resolve(load("smoke", overrides={**settings, "export.formats": [format]})))
        for format in ("gguf", "gptq_v2")
    }
    assert [warning for warning in said["gguf"].warnings if words in warning]
    assert not [warning for warning in said["gptq_v2"].warnings if words in warning]


def test_what_the_checkpoint_holds_besides_has_no_place(tmp_path: Path) -> None:
    """llama.cpp counts tensors: one more, and it refuses the file."""
    from safetensors.torch import load_file, save_file

    folder = save_model(tmp_path / "fp", "llama")
    file = folder / "model.safetensors"
    extra = {"model.layers.2.mlp.up_proj.weight": torch.ones(8, 8)}
    save_file({**load_file(file), **extra}, file, metadata={"format": "pt"})
    source, lm = open_model(folder)
    blocks, form = packed_blocks(lm, 4, 64), form_of("gguf")
    result = write(tmp_path / "out", lm, source, blocks.__getitem__, layout=form)
    assert compare(result.path, lm, blocks.__getitem__, some_ids(), layout=form).problems == ()
    assert not [name for name in GGUFContent(result.path / result.files[0]).tensors if ".2." in name]


def test_a_model_of_a_gguf_file_keeps_what_that_file_said(tmp_path: Path) -> None:
    first = Written(Case("llama", {}, 8, 32, True, "Q8_0"), tmp_path / "first")
    source, lm = open_model(first.file)
    blocks, form = packed_blocks(lm, 2, 64, True), form_of("gguf")
    form.check(lm, torch.bfloat16)
    card = {"base_model": str(first.file)}
    result = write(tmp_path / "second", lm, source, blocks.__getitem__, layout=form, card=card)
    check = compare(result.path, lm, blocks.__getitem__, some_ids(), layout=form)
    assert (check.problems, check.verified) == ((), True)
    assert result.files == ("Mine-7B-Q2_0_g64.gguf",)
    before, after = (GGUFContent(file).metadata for file in (first.file, result.path / result.files[0]))
    changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    assert changed == {"general.file_type"}


def test_every_linear_has_the_type_of_its_own_grid(tmp_path: Path) -> None:
    source, lm = open_model(save_model(tmp_path / "fp", "llama"))
    grids = [(2, 64, True), (3, 32, False), (4, 64, False), (8, 128, True)]
    kinds = [packed_blocks(lm, *grid) for grid in grids]
    names = lm.linear_names(0)
    blocks = [
        PackedBlock(
            {name: kinds[number % 4][index].linears[name] for number, name in enumerate(names)},
            kinds[0][index].others,
        )
        for index in range(lm.blocks)
    ]
    result = write(tmp_path / "out", lm, source, blocks.__getitem__, layout=form_of("gguf"))
    check = compare(result.path, lm, blocks.__getitem__, some_ids(), layout=form_of("gguf"))
    assert (check.problems, check.verified) == ((), True)
    stored = GGUFContent(result.path / result.files[0]).tensors
    types = {place.type for name, place in stored.items() if name.startswith("blk.0.") and place.type > 1}
    assert types == {42, 2, 3, 8}


@pytest.mark.parametrize(("dtype", "number"), [("float32", 0), ("float16", 1), ("bfloat16", 30)])
def test_embeddings_have_the_type_that_was_asked_for_and_vectors_are_float32(
    dtype: str, number: int, tmp_path: Path
) -> None:
    source, lm = open_model(save_model(tmp_path / "fp", "gemma2", **gguf_models.GEMMA))
    blocks, form = packed_blocks(lm, 4, 64, True), form_of("gguf")
    result = write(tmp_path / "out", lm, source, blocks.__getitem__, layout=form, dtype=dtype)
    check = compare(result.path, lm, blocks.__getitem__, some_ids(), layout=form, dtype=dtype)
    assert (check.problems, check.verified) == ((), True)
    stored = GGUFContent(result.path / result.files[0]).tensors
    assert stored["token_embd.weight"].type == number
    assert {place.type for place in stored.values() if len(place.shape) == 1} == {0}
    arch = describe(str(tmp_path / "fp")).architecture
    planned = exported_bytes(arch, GridConfig(bits=4, symmetric=True), "gguf", {0: 4}.get(number, 2))
    assert planned == sum(place.nbytes for place in stored.values())


def test_the_language_model_of_a_larger_one_is_written_alone(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save_model(tmp_path / "fp", "gemma3_text", **gguf_models.GEMMA)
    config = json.loads((folder / "config.json").read_text())
    AutoConfig.for_model("gemma3", text_config=config).save_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    inside = {f"language_model.{name}": tensor for name, tensor in stored.items()}
    sees = {"vision_tower.encoder.layers.0.mlp.weight": torch.ones(9, 9)}
    save_file({**inside, **sees}, folder / "model.safetensors", metadata={"format": "pt"})
    described = describe(str(folder))
    refuse(described.architecture, described.config, GridConfig(bits=3), ["gguf"])
    source, lm = open_model(folder)
    blocks, form = packed_blocks(lm, 3, 64), form_of("gguf")
    form.check(lm, torch.bfloat16)
    result = write(tmp_path / "out", lm, source, blocks.__getitem__, layout=form)
    check = compare(result.path, lm, blocks.__getitem__, some_ids(), layout=form)
    assert (check.problems, check.verified) == ((), True)
    assert "blk.1.post_ffw_norm.weight" in GGUFContent(result.path / result.files[0]).tensors


def test_names_of_files_say_the_type_and_hold_no_odd_letters() -> None:
    assert file_name("org model/7B", "Q2_0") == "org-model-7B-Q2_0_g64.gguf"
    assert file_name("../..", "Q4_0") == "model-Q4_0.gguf"


# ------------------------------------------------------------------------------------------ tokenizers


def said(tokenizer: Any, rows: int = 1000) -> dict[str, Any]:
    found = tokenizer_metadata(tokenizer, rows, type("Config", (), {"bos_token_id": 5})())
    return {key.removeprefix("tokenizer."): value for key, (value, _, _) in found.items()}


@pytest.mark.parametrize(("key", "name"), PRE_TOKENIZERS.items(), ids=PRE_TOKENIZERS.values())
def test_how_text_is_split_has_its_name_in_llama_cpp(key: Any, name: str) -> None:
    tokenizer = made_tokenizers.byte_level(*key)
    found = said(tokenizer)
    assert (found["ggml.model"], found["ggml.pre"]) == ("gpt2", name)
    assert len(found["ggml.tokens"]) == len(found["ggml.token_type"]) == 1000
    assert found["ggml.tokens"][-1] == "[PAD999]"
    assert [found["ggml.token_type"][number] for number in (0, 2, 3, 999)] == [3, 3, 1, 5]
    assert (found["ggml.eos_token_id"], found["ggml.add_bos_token"]) == (2, False)
    assert found["chat_template"] == made_tokenizers.TEMPLATE
    words = dict(zip(found["ggml.tokens"], range(1000), strict=True))
    assert {word: words[word] for word in tokenizer.get_vocab()} == tokenizer.get_vocab()


def test_a_sentencepiece_vocabulary_has_scores_in_the_order_of_its_merges() -> None:
    tokenizer = made_tokenizers.sentencepiece()
    found = said(tokenizer)
    assert (found["ggml.model"], found["ggml.add_space_prefix"], found["ggml.add_bos_token"]) == (
        "llama",
        True,
        True,
    )
    types = dict(zip(found["ggml.tokens"], found["ggml.token_type"], strict=True))
    assert (types["<unk>"], types["<s>"], types["<0x0A>"], types["<|im_end|>"]) == (2, 3, 6, 3)
    score = dict(zip(found["ggml.tokens"], found["ggml.scores"], strict=True))
    assert score["\u2581t"] > score["\u2581th"] > score["\u2581the"] > score["t"]
    assert said(made_tokenizers.sentencepiece(prefix=False))["ggml.add_space_prefix"] is False


def _changed(change: Callable[[Any], None]) -> Any:
    tokenizer = made_tokenizers.byte_level((made_tokenizers.GPT2,))
    change(tokenizer.backend_tokenizer)
    return tokenizer


def _lower(backend: Any) -> None:
    backend.normalizer = normalizers.Lowercase()


def _space(backend: Any) -> None:
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def _unsplit(backend: Any) -> None:
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def _other(backend: Any) -> None:
    pattern = pre_tokenizers.Split(Regex(r"\w+"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pattern, pre_tokenizers.ByteLevel(False, use_regex=False)]
    )


def _words() -> Any:
    backend = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend)


UNKNOWN_TOKENIZERS: dict[str, Callable[[], Any]] = {
    "of the kind WordLevel": _words,
    "normalizes text (Lowercase)": lambda: _changed(_lower),
    "puts a space before every text": lambda: _changed(_space),
    "splits text before merging (nothing)": lambda: _changed(_unsplit),
    r"splits text before merging (\w+)": lambda: _changed(_other),
    "its merges lack": lambda: made_tokenizers.sentencepiece(without=200),
}


@pytest.mark.parametrize("words", UNKNOWN_TOKENIZERS)
def test_a_tokenizer_that_llama_cpp_has_no_like_of_is_refused(words: str) -> None:
    with pytest.raises(PreflightError, match="cannot hold the tokenizer") as caught:
        said(UNKNOWN_TOKENIZERS[words]())
    assert words in str(caught.value)
    assert "the other formats take the tokenizer's files" in caught.value.hint
