"""Whatever became of a checkpoint's files, `eqat verify` names it: every format, and every kind of damage."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from packed_models import open_model, packed_blocks, save_model, write
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.config.formats import FORMATS
from engine.errors import EqatError, ExitCode
from engine.export.gguf_reader import GGUFContent
from engine.export.judging import judge
from engine.export.layout import form_of

HERE = [name for name in FORMATS.names() if not FORMATS[name].missing_libraries()]
IN_FOLDERS = [name for name in HERE if name not in ("gguf", "onnx")]
LINEAR = "model.layers.0.mlp.up_proj"
SCALES = {"compressed-tensors": "weight_scale", "hf": "weight"}
"""What scales are called, where it is not ``scales``; the numbers of what has none."""
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """An export of a format in several files, where it may have several; made once."""
    model = save_model(tmp_path_factory.mktemp("model") / "fp", "llama", num_hidden_layers=1)
    source, lm = open_model(model)
    blocks, made = packed_blocks(lm, 4, 64, symmetric=True), {}

    def of(name: str) -> Path:
        if name not in made:
            place = tmp_path_factory.mktemp("out") / name
            made[name] = write(
                place, lm, source, blocks.__getitem__, layout=form_of(name), shard_bytes=200_000
            ).path
        return made[name]

    return of


@pytest.fixture
def copied(written: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    def of(name: str) -> Path:
        return Path(shutil.copytree(written(name), tmp_path / name))

    return of


def told(path: Path) -> str:
    """What is said of a checkpoint with something wrong, in whichever way: never of one that is sound."""
    try:
        found = judge(path)
    except EqatError as error:
        code, said = int(error.exit_code), [str(error)]
    else:
        assert not found.sound, "nothing was found"
        code, said = ExitCode.DATA, found.problems
    # What describes itself as something that nobody here reads may be whole.
    foreign = "can be read back" in said[0]
    assert code == (ExitCode.PREFLIGHT if foreign else ExitCode.DATA), said
    assert all("\n" not in each for each in said), said
    assert len(set(said)) == len(said), said
    return "\n".join(said)


def data_file(folder: Path, linear: str = f"{LINEAR}.") -> Path:
    """The file that has the linear's tensors; of formats without an index, their only one."""
    if (folder / INDEX).exists():
        where = json.loads((folder / INDEX).read_text())["weight_map"]
        return folder / next(file for name, file in where.items() if name.startswith(linear))
    (file,) = [file for ending in ("gguf", "data", "safetensors") for file in folder.glob(f"*.{ending}")]
    return file


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object], tensor: str = f"{LINEAR}.") -> None:
    """Change the tensors of the file that has this one; its index goes with it."""
    file = data_file(folder, tensor)
    with safe_open(file, "pt") as opened:
        about = opened.metadata()
    tensors = load_file(file)
    before = set(tensors)
    change(tensors)
    save_file(tensors, file, about)
    if (folder / INDEX).exists():
        index = json.loads((folder / INDEX).read_text())
        for name in before - set(tensors):
            del index["weight_map"][name]
        (folder / INDEX).write_text(json.dumps(index))


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 0x11
    file.write_bytes(content)


@pytest.mark.parametrize("name", HERE)
def test_what_is_whole_is_sound(written: Callable[[str], Path], name: str) -> None:
    assert judge(written(name)).problems == []


@pytest.mark.parametrize("name", [name for name in HERE if name != "onnx"])
@pytest.mark.parametrize("place", [0, 7, 9, 40])
def test_a_byte_of_the_header_that_is_another(copied: Callable[[str], Path], name: str, place: int) -> None:
    folder = copied(name)
    file = data_file(folder)
    flip(file, place)
    assert file.name in told(folder)


@pytest.mark.parametrize("name", HERE)
def test_a_file_that_was_cut(copied: Callable[[str], Path], name: str) -> None:
    folder = copied(name)
    file = data_file(folder)
    os.truncate(file, file.stat().st_size - 100)
    assert file.name in told(folder)


@pytest.mark.parametrize("name", HERE)
def test_a_file_that_is_empty(copied: Callable[[str], Path], name: str) -> None:
    folder = copied(name)
    file = data_file(folder)
    os.truncate(file, 0)
    assert file.name in told(folder)


@pytest.mark.parametrize("name", [name for name in HERE if name != "gguf"])
def test_a_file_that_is_missing(copied: Callable[[str], Path], name: str) -> None:
    folder = copied(name)
    file = data_file(folder)
    file.unlink()
    assert file.name in told(folder)


@pytest.mark.parametrize("name", IN_FOLDERS)
def test_every_tensor_of_a_linear_that_is_missing(copied: Callable[[str], Path], name: str) -> None:
    symmetric = FORMATS[name].asymmetric_tensors
    for part in FORMATS[name].tensors:
        if part in symmetric:
            continue
        folder = copied(name)
        rewrite(folder, lambda tensors, part=part: tensors.pop(f"{LINEAR}.{part}"))
        assert LINEAR in told(folder), part
        shutil.rmtree(folder)


@pytest.mark.parametrize("name", IN_FOLDERS)
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_scale_that_is_none(copied: Callable[[str], Path], name: str, number: float) -> None:
    folder, scales = copied(name), f"{LINEAR}.{SCALES.get(name, 'scales')}"

    def damage(tensors: dict[str, Tensor]) -> None:
        tensors[scales].view(-1)[5] = number

    rewrite(folder, damage)
    assert LINEAR in told(folder)


@pytest.mark.parametrize("name", IN_FOLDERS)
@pytest.mark.parametrize("tensor", ["model.norm.weight", "model.embed_tokens.weight"])
def test_a_tensor_beside_the_linears_that_is_missing(
    copied: Callable[[str], Path], name: str, tensor: str
) -> None:
    folder = copied(name)
    rewrite(folder, lambda tensors: tensors.pop(tensor), tensor)
    assert tensor in told(folder)


@pytest.mark.parametrize("tensor", ["blk.0.ffn_up.weight", "blk.0.ffn_norm.weight", "output_norm.weight"])
def test_a_tensor_that_is_missing_in_a_gguf_file(copied: Callable[[str], Path], tensor: str) -> None:
    folder = copied("gguf")
    file = data_file(folder)
    content = file.read_bytes()
    assert content.count(tensor.encode()) == 1
    file.write_bytes(content.replace(tensor.encode(), tensor.encode()[:-1] + b"x"))
    words = told(folder)
    assert tensor in words or file.name in words


@pytest.mark.parametrize("kind", [0, 3, 8, 42, 10, 99])
def test_a_type_that_is_another_in_a_gguf_file(copied: Callable[[str], Path], kind: int) -> None:
    folder = copied("gguf")
    file = data_file(folder)
    content = bytearray(file.read_bytes())
    # Behind the name: the number of dimensions, those, the type.
    place = content.index(b"blk.0.ffn_up.weight") + len("blk.0.ffn_up.weight") + 4 + 2 * 8
    assert content[place : place + 4] == (2).to_bytes(4, "little")
    content[place : place + 4] = kind.to_bytes(4, "little")
    file.write_bytes(content)
    words = told(folder)
    assert "ffn_up" in words or LINEAR in words or file.name in words


def test_a_scale_that_is_none_in_a_gguf_file(copied: Callable[[str], Path]) -> None:
    folder = copied("gguf")
    file = data_file(folder)
    content = bytearray(file.read_bytes())
    start = GGUFContent(file).tensors["blk.0.ffn_up.weight"].start
    content[start : start + 2] = np.float16("nan").tobytes()
    file.write_bytes(content)
    assert LINEAR in told(folder)


@pytest.mark.parametrize("name", [name for name in IN_FOLDERS if name != "hf"])
@pytest.mark.parametrize(
    ("key", "number"), [("group_size", 32), ("group_size", 128), ("bits", 2), ("bits", 8)]
)
def test_a_description_of_another_grid(
    copied: Callable[[str], Path], name: str, key: str, number: int
) -> None:
    folder = copied(name)
    key = "num_bits" if (name, key) == ("compressed-tensors", "bits") else key
    said, was = (folder / "config.json").read_text(), {"group_size": 64}.get(key, 4)
    assert f'"{key}": {was}' in said
    (folder / "config.json").write_text(said.replace(f'"{key}": {was}', f'"{key}": {number}'))
    words = told(folder)
    assert any(each in words for each in (LINEAR, "groups of", f"{number} bits")), words


@pytest.mark.parametrize("name", IN_FOLDERS)
@pytest.mark.parametrize(
    "text", ["", "{", "[]", "\x00", '{"quantization_config": 7}', '{"architectures": 3}']
)
def test_a_configuration_that_is_none(copied: Callable[[str], Path], name: str, text: str) -> None:
    folder = copied(name)
    (folder / "config.json").write_text(text)
    assert "config" in told(folder)


@pytest.mark.parametrize("name", IN_FOLDERS)
def test_an_index_of_other_files(copied: Callable[[str], Path], name: str) -> None:
    folder = copied(name)
    if not (folder / INDEX).exists():
        pytest.skip("it is one file")
    index = json.loads((folder / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"] = {
        key: files[0] if value == files[1] else value for key, value in index["weight_map"].items()
    }
    (folder / INDEX).write_text(json.dumps(index))
    assert "index" in told(folder)


@pytest.mark.skipif("onnx" not in HERE, reason="ONNX's libraries are not installed")
@pytest.mark.parametrize("damage", ["nan", "missing", "block_size", "bits"])
def test_a_graph_that_says_something_else(copied: Callable[[str], Path], damage: str) -> None:
    import onnx

    folder = copied("onnx")
    file = folder / "model.onnx"
    model = onnx.load(str(file), load_external_data=False)
    made = {each.output[0]: each for each in model.graph.node}
    node = next(
        each for each in model.graph.node if each.op_type == "MatMulNBits" and LINEAR in each.input[1]
    )
    scales = made[node.input[2]].input[0] if node.input[2] in made else node.input[2]
    tensor = next(each for each in model.graph.initializer if each.name == scales)
    if damage == "nan":
        place = {each.key: each.value for each in tensor.external_data}
        beside, start = folder / place["location"], int(place.get("offset", 0))
        content = bytearray(beside.read_bytes())
        content[start : start + 2] = np.float16("nan").tobytes()
        beside.write_bytes(content)
    elif damage == "missing":
        model.graph.initializer.remove(tensor)
        file.write_bytes(model.SerializeToString())
    else:
        attribute = next(each for each in node.attribute if each.name == damage)
        attribute.i = {"block_size": 32, "bits": 2}[damage]
        file.write_bytes(model.SerializeToString())
    words = told(folder)
    assert LINEAR in words or file.name in words
