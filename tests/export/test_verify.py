"""An export that differs from what was trained is caught, wherever the difference is."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from packed_models import compare, export, open_model, save_model, some_ids, write
from safetensors import safe_open
from torch import Tensor, nn

from engine.config.formats import FORMATS
from engine.errors import EqatError
from engine.export.hf import HuggingFace
from engine.export.layout import Form, Layout, form_of
from engine.export.result import ExportResult
from engine.export.verify import TrainedOnce, VerifyResult, verify
from engine.models.causal_lm import CausalLM
from engine.quant.packed import PackedBlock, PackedWeight

Exported = tuple[CausalLM, list[PackedBlock], ExportResult]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    root = tmp_path_factory.mktemp("verify")
    save_model(root / "fp", "qwen2", tie_word_embeddings=False)
    return export(root / "fp", root / "out", 3, 64, shard_bytes=600_000)


def check(exported: Exported, directory: Path) -> VerifyResult:
    lm, blocks, _ = exported
    return compare(directory, lm, blocks.__getitem__, some_ids(1, 8))


def position_of(directory: Path, name: str) -> tuple[Path, int]:
    """File and byte offset of a tensor's first byte."""
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(str(path), framework="pt") as file:
            if name not in file.keys():  # noqa: SIM118 (not a dict)
                continue
        length = int.from_bytes(path.read_bytes()[:8], "little")
        header = json.loads(path.read_bytes()[8 : 8 + length])
        return path, 8 + length + header[name]["data_offsets"][0]
    raise AssertionError(name)


def flip(path: Path, offset: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("model.layers.0.self_attn.q_proj.qweight", "1 integers differ"),
        ("model.layers.1.mlp.down_proj.qzeros", "1 zero points differ"),
        ("model.layers.1.mlp.up_proj.scales", "1 scales differ"),
        ("model.layers.0.mlp.gate_proj.g_idx", "1 group indices differ"),
        ("model.layers.1.self_attn.k_proj.bias", "1 values differ"),
        ("model.layers.0.input_layernorm.weight", "1 values differ"),
        ("model.embed_tokens.weight", "1 values differ"),
        ("lm_head.weight", "1 values differ"),
        ("model.norm.weight", "1 values differ"),
    ],
)
def test_one_flipped_bit_is_caught(exported: Exported, tmp_path: Path, name: str, says: str) -> None:
    copy = shutil.copytree(exported[2].path, tmp_path / "copy")
    flip(*position_of(copy, name))
    result = check(exported, copy)
    assert not result.verified
    assert any(says in problem and name.rpartition(".")[0] in problem for problem in result.problems)
    with pytest.raises(EqatError, match="differs from the trained model"):
        result.raise_if_failed()


def test_the_untouched_export_is_verified(exported: Exported) -> None:
    result = check(exported, exported[2].path)
    assert result.verified
    assert result.problems == ()
    result.raise_if_failed()


def test_a_flipped_bit_in_a_header_is_caught(exported: Exported, tmp_path: Path) -> None:
    copy = shutil.copytree(exported[2].path, tmp_path / "copy")
    flip(copy / exported[2].files[0], 9, bit=6)
    assert not check(exported, copy).verified


def test_a_truncated_or_missing_shard_is_caught(exported: Exported, tmp_path: Path) -> None:
    copy = shutil.copytree(exported[2].path, tmp_path / "copy")
    last = copy / exported[2].files[-1]
    last.write_bytes(last.read_bytes()[:-100])
    assert not check(exported, copy).verified
    last.unlink()
    result = check(exported, copy)
    assert not result.verified
    assert last.name in result.problems[0]


@pytest.mark.parametrize("change", [{"bits": 2}, {"group_size": 32}, {"sym": True}, {"desc_act": True}])
def test_a_configuration_of_another_grid_is_caught(
    exported: Exported, tmp_path: Path, change: dict[str, object]
) -> None:
    copy = shutil.copytree(exported[2].path, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"] |= change
    (copy / "config.json").write_text(json.dumps(config))
    assert not check(exported, copy).verified


def test_a_configuration_of_another_network_is_caught_by_the_logits(
    exported: Exported, tmp_path: Path
) -> None:
    copy = shutil.copytree(exported[2].path, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    config["rms_norm_eps"] = 0.5
    (copy / "config.json").write_text(json.dumps(config))
    result = check(exported, copy)
    assert not result.verified
    assert "logits differ" in result.problems[0]


def test_other_blocks_than_the_trained_ones_are_caught(exported: Exported) -> None:
    lm, blocks, result = exported
    swapped = list(reversed(blocks))
    assert not compare(result.path, lm, swapped.__getitem__, some_ids(1, 8)).verified


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_verification_holds_in_the_arithmetic_of_a_gpu_run(exported: Exported, dtype: torch.dtype) -> None:
    _, blocks, result = exported
    _, lm = open_model(result.path.parent / "fp", dtype)
    assert compare(result.path, lm, blocks.__getitem__, some_ids(1, 8)).problems == ()


def test_verification_leaves_the_trained_model_as_it_was(exported: Exported) -> None:
    lm = exported[0]
    lm.model.get_input_embeddings().weight.data[0, 0] = 0.1  # no number of 16 bits
    before = {name: tensor.clone() for name, tensor in lm.outer_state().items()}
    check(exported, exported[2].path)
    after = lm.outer_state()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


# -- one trained model, several formats ----------------------------------------------------------------


class Once:
    """Verifies with what was kept, and counts the blocks of the original that are loaded for it."""

    def __init__(self, exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
        self.lm, self.blocks, self.result = exported
        self.source = self.lm.source
        self.known, self.loaded = TrainedOnce(), 0
        load = self.lm.load_block

        def counted(index: int) -> nn.Module:
            self.loaded += 1
            return load(index)

        monkeypatch.setattr(self.lm, "load_block", counted)
        self.block_for = self.blocks.__getitem__
        self.ids = some_ids(1, 8)

    def written(self, out: Path, form: Form) -> Path:
        """An export in another format, in float16, which the dense one rounds to."""
        assert isinstance(form, Layout)
        write(out, self.lm, self.source, self.block_for, layout=form, dtype="float16")
        return out

    def __call__(self, folder: Path, form: Form, **changes: Any) -> tuple[VerifyResult, int]:
        asked: dict[str, Any] = {"block_for": self.block_for, "tokens_NT": self.ids, "dtype": "float16"}
        before = self.loaded
        result = verify(folder, form, self.lm, known=self.known, **{**asked, **changes})
        return result, self.loaded - before


class LastRounded(HuggingFace):
    """A dense format that is taken to round the last block alone."""

    blocks: ClassVar[list[PackedBlock]]

    def stored_weight(self, weight: PackedWeight) -> Tensor | None:
        last = any(weight is each for each in self.blocks[-1].linears.values())
        return super().stored_weight(weight) if last else None


@pytest.fixture
def once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Once:
    save_model(tmp_path / "fp", "qwen2", tie_word_embeddings=False)
    return Once(export(tmp_path / "fp", tmp_path / "out", 3, 64), monkeypatch)


def test_the_trained_model_passes_its_blocks_once_for_several_formats(once: Once, tmp_path: Path) -> None:
    forms = {name: form_of(name) for name in ("gptq_v2", "compressed-tensors", "hf", "auto-round")}
    folders = {name: once.written(tmp_path / name, form) for name, form in forms.items()}
    alone = {name: compare_alone(once, folders[name], form_of(name)) for name in forms}
    loads = {}
    for name, form in forms.items():
        result, loads[name] = once(folders[name], form)
        assert (result.verified, result) == (True, alone[name]), name
    # The one that rounds is compared with the trained integers as it rounds them.
    blocks = len(once.blocks)
    assert loads == {"gptq_v2": blocks, "compressed-tensors": 0, "hf": blocks, "auto-round": 0}


def compare_alone(once: Once, folder: Path, form: Form) -> VerifyResult:
    return verify(folder, form, once.lm, once.block_for, once.ids, dtype="float16")


def test_what_is_rounded_from_a_later_block_on_is_compared_from_there(once: Once, tmp_path: Path) -> None:
    LastRounded.blocks, form = once.blocks, LastRounded(FORMATS["hf"])
    folder = once.written(tmp_path / "dense", form)
    alone = compare_alone(once, folder, form)
    once(once.written(tmp_path / "packed", form_of("gptq_v2")), form_of("gptq_v2"))
    result, loaded = once(folder, form)
    assert (result, loaded) == (alone, len(once.blocks))  # those before it too: what reaches it is not kept


def test_what_is_kept_serves_the_same_question_alone(once: Once, tmp_path: Path) -> None:
    form, blocks = form_of("gptq_v2"), len(once.blocks)
    folder = once.written(tmp_path / "packed", form)
    assert once(folder, form)[1] == blocks
    assert once(folder, form)[1] == 0
    result, loaded = once(folder, form, tokens_NT=some_ids(2, 12))
    assert (result.verified, result.tokens, loaded) == (True, 12, blocks)  # of its first window
    assert once(folder, form, dtype="bfloat16")[1] == blocks
    swapped = list(reversed(once.blocks))
    result, loaded = once(folder, form, block_for=swapped.__getitem__)
    assert (result.verified, loaded) == (False, blocks)


def test_an_export_is_not_taken_for_right_because_another_was(once: Once, tmp_path: Path) -> None:
    form = form_of("gptq_v2")
    folder = once.written(tmp_path / "packed", form)
    assert once(folder, form)[0].verified
    flip(*position_of(folder, "model.layers.1.mlp.up_proj.scales"))
    assert any("1 scales differ" in problem for problem in once(folder, form)[0].problems)
    config = json.loads((once.result.path / "config.json").read_text())
    (once.result.path / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    result, loaded = once(once.result.path, form, dtype="auto")
    assert "logits differ" in result.problems[0]
    assert loaded == len(once.blocks)
    again, loaded = once(once.result.path, form, dtype="auto")
    assert (again, loaded) == (result, 0)


# -- files that are something else ---------------------------------------------------------------------


def header_of(path: Path) -> dict[str, object]:
    content = path.read_bytes()
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


def with_header(path: Path, text: str) -> None:
    """Another header, of a length that fits it."""
    path.write_bytes(len(text).to_bytes(8, "little") + text.encode() + bytes(1000))


def odd_offsets(path: Path) -> None:
    if path.suffix != ".safetensors":
        path.write_text("{")
        return
    header = header_of(path)
    name = next(name for name in header if name != "__metadata__")
    header[name] |= {"data_offsets": [0, 1 << 60], "shape": [1 << 59]}  # type: ignore[operator]
    with_header(path, json.dumps(header))


ODD_FILES = {
    "a FIFO": lambda path, other: (path.unlink(), os.mkfifo(path)),
    "a link": lambda path, other: (path.rename(other), path.symlink_to(other)),
    "a link to nothing": lambda path, other: (path.unlink(), path.symlink_to(other / "absent")),
    "a device": lambda path, other: (path.unlink(), path.symlink_to("/dev/zero")),
    "a folder": lambda path, other: (path.unlink(), path.mkdir()),
    "empty": lambda path, other: path.write_bytes(b""),
    "zeros": lambda path, other: path.write_bytes(bytes(100)),
    "too long a header": lambda path, other: path.write_bytes(b"\xff" * 100),
    "nested": lambda path, other: with_header(path, "[" * 100_000 + "]" * 100_000),
    "no object": lambda path, other: with_header(path, "[1, 2]"),
    "a number of many digits": lambda path, other: with_header(path, "9" * 10_000),
    "no text": lambda path, other: path.write_bytes((4).to_bytes(8, "little") + b"\xff\xfe\xfd\xfc" * 9),
    "fields of other types": lambda path, other: with_header(path, '{"a": {"dtype": 1, "shape": "x"}}'),
    "offsets beyond the file": lambda path, other: odd_offsets(path),
}


@pytest.mark.parametrize("odd", ODD_FILES)
@pytest.mark.parametrize(
    "name", ["model-00001-of-00003.safetensors", "config.json", "index", "quantize_config.json"]
)
def test_files_that_are_something_else_are_caught_without_waiting_or_following(
    exported: Exported, tmp_path: Path, odd: str, name: str
) -> None:
    copy = shutil.copytree(exported[2].path, tmp_path / "copy")
    files = exported[2].files
    named = {"index": "model.safetensors.index.json", "model-00001-of-00003.safetensors": files[0]}
    ODD_FILES[odd](copy / named.get(name, name), tmp_path / "other")
    result = check(exported, copy)
    assert not result.verified
    assert all(problem and "\n" not in problem for problem in result.problems)


@pytest.mark.parametrize("place", ["../out/{}", "/etc/passwd", "..", "", "a\0b"])
def test_an_index_names_files_of_its_own_folder_only(exported: Exported, tmp_path: Path, place: str) -> None:
    copy = shutil.copytree(exported[2].path, tmp_path / "copy")
    index = copy / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    first = next(iter(content["weight_map"]))
    content["weight_map"][first] = place.format(exported[2].files[0])
    index.write_text(json.dumps(content))
    result = check(exported, copy)
    assert not result.verified


@pytest.mark.parametrize(
    "said", [None, [], "gptq_v2", {"checkpoint_format": "gptq_v2", "bits": [3]}, {"bits": 3}]
)
def test_a_configuration_of_odd_types_is_caught(exported: Exported, tmp_path: Path, said: object) -> None:
    copy = shutil.copytree(exported[2].path, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "quantization_config": said}))
    assert not check(exported, copy).verified
