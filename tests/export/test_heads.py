"""A quantized embedding and head, in every format that holds them, as others read the files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import pytest
import torch
from packed_models import (
    compare,
    open_model,
    packed_blocks,
    rounded_heads,
    save_model,
    some_ids,
    trained_logits,
    write,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from engine.architecture.description import describe
from engine.architecture.refusals import refuse
from engine.config.formats import FORMATS
from engine.config.grid import GridConfig
from engine.config.loading import load
from engine.errors import PreflightError
from engine.export.gguf_reader import GGUFContent
from engine.export.layout import form_of
from engine.methods.blockwise.rtn import round_matrix
from engine.models.heads import head_names
from engine.plan import memory_terms
from engine.plan.export_sizes import exported_bytes
from engine.plan.plan import make_plan
from engine.quant.packed import PackedWeight

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
GEMMA = {"head_dim": 64, "query_pre_attn_scalar": 64, "tie_word_embeddings": True}
MODELS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "llama": ("llama", {"tie_word_embeddings": False}, (EMBEDDING, HEAD)),
    "tied": ("llama", {"tie_word_embeddings": True}, (EMBEDDING,)),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}, (EMBEDDING,)),  # with biases
    "gemma3": ("gemma3_text", GEMMA, (EMBEDDING,)),
}


class Case(NamedTuple):
    format: str
    model: str
    bits: int
    """Of embedding and head; the linears have others, where the format holds them."""
    group: int
    fixed: bool = False
    """Zero points in the middle; at 8 bits they are there anyway."""

    def __str__(self) -> str:
        return f"{self.format}-{self.model}-h{self.bits}g{self.group}{'f' * self.fixed}"

    @property
    def grid(self) -> GridConfig:
        held = "fixed" if self.fixed else "learned"
        return GridConfig(bits=3, group_size=self.group, head_bits=self.bits, zero_point=held)


CASES = [
    *(Case(name, model, 8, 64) for name in ("hf", "mlx", "gguf") for model in MODELS),
    *(Case(name, "llama", 4, 32) for name in ("hf", "mlx", "gguf")),
    *(Case(name, "tied", 4, 128, fixed=True) for name in ("hf", "mlx", "gguf")),
    Case("gguf", "llama", 8, -1),
]
each_case = pytest.mark.parametrize("case", CASES, ids=str)


class Written:
    """A model whose embedding and head are quantized, and an export of it."""

    def __init__(self, case: Case, place: Path) -> None:
        self.case = case
        model_type, changes, self.names = MODELS[case.model]
        self.model = save_model(place / "fp", model_type, **changes)
        self.source, self.lm = open_model(self.model)
        self.blocks = packed_blocks(self.lm, 3, case.group)
        self.heads = rounded_heads(self.lm, case.bits, case.group, case.fixed)
        self.result = write(
            place / "out",
            self.lm,
            self.source,
            self.blocks.__getitem__,
            layout=form_of(case.format),  # type: ignore[arg-type]
            heads=self.heads,
        )
        self.path = self.result.path

    def compared(self) -> Any:
        form: Any = form_of(self.case.format)
        return compare(self.path, self.lm, self.blocks.__getitem__, some_ids(), layout=form, heads=self.heads)


def dequantized(weight: PackedWeight, rounds_biases: bool) -> np.ndarray:
    """By hand, in float64: one product a weight, rounded to float32; or with a bias in float16."""
    codes = weight.codes().numpy().astype(np.float64)
    scale, zero = (
        each.numpy().astype(np.float64).repeat(weight.group_size, 1)
        for each in (weight.scale, weight.zero_point)
    )
    if rounds_biases:
        bias = (-zero * scale).astype(np.float16).astype(np.float32)
        return (codes * scale).astype(np.float32) + bias
    return ((codes - zero) * scale).astype(np.float32)


@each_case
def test_what_is_in_the_files_is_what_was_rounded(case: Case, tmp_path: Path) -> None:
    made = Written(case, tmp_path)
    assert tuple(made.heads) == made.names
    check = made.compared()
    assert (check.problems, check.verified) == ((), True)
    # Wherever the format rounds nothing, what is left is the order of sums.
    assert check.max_logit_diff < 0.02
    rounds = case.format == "gguf" and case.bits == 4 and not case.fixed
    assert ("of a step" in check.rounded) is rounds
    want = {name: dequantized(weight, rounds) for name, weight in made.heads.items()}
    have = {"hf": as_transformers, "mlx": as_mlx, "gguf": as_llama_cpp}[case.format](made)
    assert have.keys() == want.keys()
    for name, weight in have.items():
        exact = want[name]
        if case.format == "hf":  # once to the type of the export
            exact = torch.from_numpy(exact).to(torch.bfloat16).float().numpy()
        assert np.array_equal(weight, exact), name


def as_transformers(made: Written) -> dict[str, np.ndarray]:
    """What transformers loads, whose head is the embedding where they are tied."""
    model = AutoModelForCausalLM.from_pretrained(made.path, dtype=torch.float32)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (embedding is head) is (made.case.model != "llama")
    found = {EMBEDDING: embedding, HEAD: head}
    return {name: found[name].detach().numpy() for name in made.names}


def as_mlx(made: Written) -> dict[str, np.ndarray]:
    """By the description of the format alone: words of each row are one number of many bits."""
    said = json.loads((made.path / "config.json").read_text())["quantization"]
    assert (said["bits"], said["mode"]) == (3, "affine")
    stored = load_file(made.path / "model.safetensors")
    found = {}
    for name in made.names:
        own = said[name]
        assert own == {"group_size": made.case.group, "bits": made.case.bits, "mode": "affine"}
        words = stored[f"{name}.weight"].view(torch.int32).numpy().view(np.uint8)
        bits = np.unpackbits(words, axis=1, bitorder="little").reshape(len(words), -1, own["bits"])
        codes = (bits * (1 << np.arange(own["bits"]))).sum(-1).astype(np.float32)
        scale, bias = (
            stored[f"{name}.{part}"].numpy().repeat(own["group_size"], 1) for part in ("scales", "biases")
        )
        found[name] = codes * scale + bias
    assert (HEAD in said) is (HEAD in made.names)
    return found


def as_llama_cpp(made: Written) -> dict[str, np.ndarray]:
    """By the package of llama.cpp's authors."""
    reader = gguf.GGUFReader(next(made.path.glob("*.gguf")))
    called = {EMBEDDING: "token_embd.weight", HEAD: "output.weight"}
    stored = {tensor.name: tensor for tensor in reader.tensors}
    assert (called[HEAD] in stored) is (HEAD in made.names)
    kinds = gguf.GGMLQuantizationType
    kind = kinds.Q8_0 if made.case.bits == 8 else kinds.Q4_0 if made.case.fixed else kinds.Q4_1
    found = {}
    for name in made.names:
        tensor = stored[called[name]]
        assert tensor.tensor_type == kind
        found[name] = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    return found


@each_case
def test_the_plan_knows_the_bytes_of_the_tensors(case: Case, tmp_path: Path) -> None:
    made = Written(case, tmp_path)
    described = describe(str(made.model))
    grid = case.grid
    refuse(described.architecture, described.config, grid, [case.format])
    planned = exported_bytes(described.architecture, grid, case.format)
    if case.format == "gguf":
        content = GGUFContent(next(made.path.glob("*.gguf")))
        stored = sum(place.nbytes for place in content.tensors.values())
    else:
        tensors = load_file(made.path / "model.safetensors").values()
        stored = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert planned == stored
    plain = GridConfig(bits=3, group_size=case.group)
    smaller = planned < exported_bytes(described.architecture, plain, case.format)
    assert smaller is (case.format != "hf")


def test_transformers_reads_the_gguf_file_as_what_was_measured(tmp_path: Path) -> None:
    made = Written(Case("gguf", "tied", 8, 64), tmp_path)
    file = next(made.path.glob("*.gguf"))
    model = AutoModelForCausalLM.from_pretrained(made.path, gguf_file=file.name, dtype=torch.float32)
    with torch.no_grad():
        have = model(some_ids()).logits
    want = trained_logits(made.lm, made.blocks, some_ids(), heads=made.heads)
    assert (have - want).abs().max() < 0.02
    plain = trained_logits(made.lm, made.blocks, some_ids())
    assert (want - plain).abs().max() > 0.001, "the measured model has the quantized head"


def test_a_file_is_called_after_its_linears_though_the_head_is_larger(tmp_path: Path) -> None:
    made = Written(Case("gguf", "llama", 8, 64), tmp_path)
    (name,) = made.result.files
    assert name.endswith("-Q4_0.gguf")
    content = GGUFContent(made.path / name)
    assert content.metadata["general.file_type"] == 2
    heads = sum(weight.out_features * weight.in_features for weight in made.heads.values())
    linears = sum(w.out_features * w.in_features for block in made.blocks for w in block.linears.values())
    mean = (8.5 * heads + 4.5 * linears) / (heads + linears)
    assert made.result.bits_per_weight == pytest.approx(mean)


@pytest.mark.parametrize("name", ["hf", "mlx", "gguf"])
def test_the_card_says_what_embedding_and_head_are(name: str, tmp_path: Path) -> None:
    made = Written(Case(name, "tied", 8, 64), tmp_path)
    card = (made.path / "README.md").read_text()
    assert "embedding and head are 8-bit integers in groups of 64; " in card
    config = made.path / "config.json"
    if config.exists():
        assert json.loads(config.read_text())["tie_word_embeddings"] is True


@pytest.mark.parametrize("tensor", ["weight", "scales", "biases"])
def test_an_embedding_that_was_changed_is_found(tensor: str, tmp_path: Path) -> None:
    made = Written(Case("mlx", "tied", 8, 64), tmp_path)
    file = made.path / "model.safetensors"
    tensors = load_file(file)
    changed = tensors[f"{EMBEDDING}.{tensor}"]
    changed.view(torch.int32)[7, 1] ^= 1
    save_file(tensors, file, metadata={"format": "mlx"})
    check = made.compared()
    assert not check.verified
    assert any(problem.startswith(f"{EMBEDDING}: 1 ") for problem in check.problems), check.problems


def test_a_configuration_without_the_head_is_found(tmp_path: Path) -> None:
    made = Written(Case("mlx", "tied", 4, 64), tmp_path)
    file = made.path / "config.json"
    said = json.loads(file.read_text())
    del said["quantization"][EMBEDDING]
    file.write_text(json.dumps(said))
    assert not made.compared().verified


def test_the_model_is_as_before_after_it_was_measured(tmp_path: Path) -> None:
    _, lm = open_model(save_model(tmp_path / "fp"))
    before = {name: tensor.clone() for name, tensor in lm.outer_state().items()}
    blocks = packed_blocks(lm, 3, 64)
    trained_logits(lm, blocks, some_ids(1, 8), heads=rounded_heads(lm, 4, 64))
    assert all(torch.equal(tensor, before[name]) for name, tensor in lm.outer_state().items())


# -- rounding ------------------------------------------------------------------------------------------


def test_rows_are_rounded_alike_whatever_part_they_are_in(monkeypatch: pytest.MonkeyPatch) -> None:
    from engine.methods.blockwise import rtn

    weight = torch.randn(50, 64, generator=torch.Generator().manual_seed(3))
    grid = GridConfig(head_bits=4, group_size=32).head
    assert grid is not None
    whole = round_matrix(weight, grid, method="search", norm=2.5)
    polled: list[int] = []
    monkeypatch.setattr(rtn, "HEAD_PART", 64 * 7)
    parts = round_matrix(weight, grid, method="search", norm=2.5, poll=lambda: polled.append(1))
    assert len(polled) == 8
    assert torch.equal(whole.words, parts.words)
    assert torch.equal(whole.scale, parts.scale)
    assert len(whole.zero_point.unique()) > 1
    held = GridConfig(head_bits=4, group_size=32, zero_point="fixed").head
    assert held is not None
    fixed = round_matrix(weight, held, method="search", norm=2.5)
    assert set(fixed.zero_point.unique().tolist()) == {8}
    assert memory_terms.HEAD_PART >= 64 * 50


@pytest.mark.parametrize(("bits", "most"), [(8, 0.006), (4, 0.12)])
def test_rounding_loses_as_little_as_so_many_bits_can(bits: int, most: float) -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(5))
    grid = GridConfig(head_bits=bits, group_size=64).head
    assert grid is not None
    error = round_matrix(weight, grid, method="search", norm=2.5).dequantize() - weight
    assert error.norm() / weight.norm() < most


def test_a_head_of_its_own_and_a_tied_one_are_told_apart(tmp_path: Path) -> None:
    for name, (model_type, changes, wanted) in MODELS.items():
        _, lm = open_model(save_model(tmp_path / name, model_type, **changes))
        assert head_names(lm) == wanted


# -- refusals ------------------------------------------------------------------------------------------


def test_formats_that_hold_no_quantized_head_are_refused_with_one_that_does(tmp_path: Path) -> None:
    described = describe(str(save_model(tmp_path / "fp")))
    others = [row.name for row in FORMATS if not row.head_bits]
    assert "gptq_v2" in others
    grid = GridConfig(bits=4, group_size=64, head_bits=8)
    for name in others:
        with pytest.raises(PreflightError) as caught:
            refuse(described.architecture, described.config, grid, [name])
        assert "cannot hold an embedding and a head of 8 bits" in caught.value.message
        assert caught.value.hint.startswith(("gguf can", "mlx can", "hf can"))
        if not FORMATS[name].missing_libraries():
            refuse(described.architecture, described.config, GridConfig(bits=4, group_size=64), [name])


def test_the_plan_counts_the_rounding_of_a_large_vocabulary(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "fp", vocab_size=4000)
    plans = [
        make_plan(
            load(
                "smoke",
                overrides={
                    "model.source": str(folder),
                    "grid.head_bits": bits,
                    "export.formats": "mlx",
                    "runtime.device": "cpu",
                },
            )
        )
        for bits in (0, 8)
    ]
    before, now = ({phase.name: phase for phase in plan.phases} for plan in plans)
    assert now["prepare"].seconds > before["prepare"].seconds
    assert now["export"].parts["quantized embedding and head"] == 4 * 2 * 4000 * 256
    assert "quantized embedding and head" not in now["evaluate_fp"].parts
    assert now["evaluate_rtn"].peak_host_bytes > before["evaluate_rtn"].peak_host_bytes
    assert plans[1].export_bytes < plans[0].export_bytes
    assert plans[1].disk_bytes < plans[0].disk_bytes + 2 * 4000 * 256 * 2


def test_rows_that_do_not_fill_a_group_are_refused(tmp_path: Path) -> None:
    described = describe(str(save_model(tmp_path / "fp", hidden_size=260, head_dim=64)))
    grid = GridConfig(bits=4, group_size=-1, head_bits=4)
    with pytest.raises(PreflightError, match="whole 32-bit words") as caught:
        refuse(described.architecture, described.config, grid, ["hf"])
    assert caught.value.where == "grid.head_bits"
