"""Whether a checkpoint is sound: what is wrong with one is named, and one that is whole has nothing wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from packed_models import open_model, packed_blocks, save_model, write
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.config.formats import FORMATS
from engine.errors import PreflightError
from engine.export.described import format_in
from engine.export.judging import Judgement, judge
from engine.export.layout import form_of
from eqat_tui.judging import judgement_text

PACKED = ["gptq_v2", "compressed-tensors"]
FILE = "model.safetensors"
LINEAR = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "fp", "llama", tie_word_embeddings=False)


@pytest.fixture(scope="module")
def written(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """An export in a format, made once."""
    made: dict[str, Path] = {}
    source, lm = open_model(model)
    blocks = packed_blocks(lm, 3, 32)

    def of(name: str) -> Path:
        if name not in made:
            place = tmp_path_factory.mktemp(name) / name
            made[name] = write(place, lm, source, blocks.__getitem__, layout=form_of(name)).path
        return made[name]

    return of


def changed(export: Path, place: Path, change: Callable[[dict[str, Tensor]], object]) -> Judgement:
    """What is found in a copy of ``export`` whose tensors are changed."""
    place.mkdir()
    for file in export.iterdir():
        os.link(file, place / file.name)
    tensors = load_file(export / FILE)
    change(tensors)
    (place / FILE).unlink()
    save_file(tensors, place / FILE, {"format": "pt"})
    return judge(place)


@pytest.mark.parametrize("name", [*PACKED, "auto-round", "mlx", "gguf", "hf"])
def test_an_export_of_ours_is_sound(written: Callable[[str], Path], name: str) -> None:
    found = judge(written(name))
    assert found.notes == []
    assert (found.problems, found.sound, found.format) == ([], True, name)
    assert found.linears == (0 if name == "hf" else 7 * found.blocks)
    assert found.bytes == sum(f.stat().st_size for f in written(name).glob("*.[gs][ga][uf]*"))
    grid = {"hf": "", "gguf": "w4g32 symmetric"}.get(name, "w3g32")  # of which Q4_0 is one
    assert found.grids == ({grid: found.linears} if grid else {})


@pytest.mark.parametrize("name", ["gptq_v2", "mlx", "hf"])
def test_a_snapshot_of_a_hub_cache_is_read_through_its_links(
    written: Callable[[str], Path], name: str, tmp_path: Path
) -> None:
    """As the hub's library keeps it; links that lead anywhere else are followed as little as before."""
    repository = tmp_path / "models--somebody--model"
    snapshot, blobs = repository / "snapshots" / ("a" * 40), repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(written(name).iterdir())):
        os.link(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert format_in(snapshot) == name
    found = judge(snapshot)
    assert (found.problems, found.format) == ([], name)
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(written(name) / "config.json")
    with pytest.raises(PreflightError, match="links are not followed here"):
        format_in(snapshot)


def test_a_gguf_file_is_named_by_itself_where_its_folder_has_others(
    written: Callable[[str], Path], tmp_path: Path
) -> None:
    (file,) = written("gguf").glob("*.gguf")
    for name in ("one.gguf", "two.gguf"):
        shutil.copy(file, tmp_path / name)
    found = judge(tmp_path / "two.gguf")
    assert (found.problems, found.format, found.bytes) == ([], "gguf", file.stat().st_size)
    with pytest.raises(PreflightError, match="holds 2 GGUF files, not one"):
        judge(tmp_path)
    (tmp_path / "three.txt").touch()
    with pytest.raises(PreflightError, match="is a file; name its folder"):
        judge(tmp_path / "three.txt")


@pytest.mark.parametrize("name", PACKED)
def test_against_the_model_that_it_was_made_from_the_error_of_every_linear_is_told(
    model: Path, written: Callable[[str], Path], name: str
) -> None:
    found = judge(written(name), str(model))
    assert len(found.errors) == found.linears
    _, lm = open_model(model)
    want = lm.load_block(1).get_submodule("mlp.up_proj").weight
    have = packed_blocks(lm, 3, 32)[1].linears["mlp.up_proj"].dequantize()
    assert found.errors[LINEAR] == pytest.approx(float((have - want).norm() / want.norm()), rel=1e-4)


@pytest.mark.parametrize("name", PACKED)
def test_a_scale_that_is_not_finite_and_one_of_zero_are_counted(
    written: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    scales = f"{LINEAR}.{'scales' if name == 'gptq_v2' else 'weight_scale'}"

    def damage(tensors: dict[str, Tensor]) -> None:
        flat = tensors[scales].view(-1)
        flat[0], flat[1], flat[2] = torch.nan, torch.inf, 0.0

    found = changed(written(name), tmp_path / "out", damage)
    count = load_file(written(name) / FILE)[scales].numel()
    assert f"{LINEAR}: 2 of {count} scales are not finite" in found.problems
    assert f"{LINEAR}: 1 of {count} scales are zero" in found.problems
    assert any("NaN or infinity" in problem for problem in found.problems)


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("which", [0, 1])
def test_a_missing_tensor_is_named(
    written: Callable[[str], Path], tmp_path: Path, name: str, which: int
) -> None:
    tensor = f"{LINEAR}.{FORMATS[name].tensors[which]}"
    found = changed(written(name), tmp_path / "out", lambda tensors: tensors.pop(tensor))
    assert any(LINEAR in problem for problem in found.problems)
    assert not found.sound


def test_scales_of_another_shape_and_a_norm_that_is_not_finite_are_named(
    written: Callable[[str], Path], tmp_path: Path
) -> None:
    def damage(tensors: dict[str, Tensor]) -> None:
        tensors[f"{LINEAR}.scales"] = tensors[f"{LINEAR}.scales"][:1].clone()
        tensors["model.layers.0.input_layernorm.weight"][3] = torch.inf
        tensors["model.norm.weight"][0] = torch.nan

    problems = changed(written("gptq_v2"), tmp_path / "out", damage).problems
    for words in (LINEAR, "model.layers.0.input_layernorm.weight: 1 of ", "model.norm.weight: 1 of "):
        assert any(words in problem for problem in problems), (words, problems)


CUTS: dict[str, tuple[str, str, Callable[[Tensor], Tensor]]] = {
    "fewer scales": ("gptq_v2", "scales", lambda t: t[:, :-1]),
    "fewer groups": ("gptq_v2", "scales", lambda t: t[:-1]),
    "inputs in groups that are not there": ("gptq_v2", "g_idx", lambda t: t + 50),
    "scales that are integers": ("gptq_v2", "scales", lambda t: t.to(torch.int32)),
    "fewer integers": ("compressed-tensors", "weight_packed", lambda t: t[:, :-1]),
    "fewer rows of scales": ("compressed-tensors", "weight_scale", lambda t: t[:-1]),
    "fewer columns of zero points": ("compressed-tensors", "weight_zero_point", lambda t: t[:, :-1]),
    "fewer zero points": ("compressed-tensors", "weight_zero_point", lambda t: t[:-1]),
    "fewer packed zero points": ("auto-round", "qzeros", lambda t: t[:, :-1]),
}


@pytest.mark.parametrize("name", CUTS)
def test_tensors_that_do_not_fit_each_other_are_a_problem_and_no_bug(
    written: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    format, which, cut = CUTS[name]

    def damage(tensors: dict[str, Tensor]) -> None:
        tensors[f"{LINEAR}.{which}"] = cut(tensors[f"{LINEAR}.{which}"]).contiguous()

    problems = changed(written(format), tmp_path / "out", damage).problems
    assert any(LINEAR in problem for problem in problems), problems
    assert len(set(problems)) == len(problems)


@pytest.mark.parametrize("name", [*PACKED, "mlx"])
def test_groups_that_are_not_those_of_the_scales_are_a_problem(
    written: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    place = tmp_path / "out"
    shutil.copytree(written(name), place)
    text = (place / "config.json").read_text()
    assert '"group_size": 32' in text
    (place / "config.json").write_text(text.replace('"group_size": 32', '"group_size": 64'))
    assert any("groups of 64" in problem for problem in judge(place).problems)


def test_what_is_no_checkpoint_of_a_known_format_is_refused_by_name(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    (tmp_path / "run" / "export").mkdir(parents=True)
    many = tmp_path / "many"
    for name in ("gguf", "hf"):
        (many / name).mkdir(parents=True)
        (many / name / "config.json").write_text("{}")
    for place, words in (
        (tmp_path / "nothing", "is not there"),
        (file, "is a file"),
        (tmp_path / "run", r"config.json is missing \(a run's are in the folders of its export/\)"),
        (many, r"there are some in gguf, hf"),
    ):
        with pytest.raises(PreflightError, match=words):
            format_in(place)
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "nobody"}}))
    with pytest.raises(PreflightError, match="its quantization is 'nobody'"):
        format_in(other)


def test_a_reference_that_cannot_be_read_is_no_fault_of_the_checkpoint(
    written: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(PreflightError, match=r"config\.json"):
        judge(written("gptq_v2"), str(tmp_path))
    refused = eqat_verify(str(written("gptq_v2")), "--reference", str(tmp_path))
    assert refused.returncode == 3


def test_what_a_person_is_told(written: Callable[[str], Path]) -> None:
    found = judge(written("gptq_v2"))
    text = judgement_text({**msgspec.to_builtins(found), "sound": True})
    assert "GPTQ v2, llama with 2 blocks" in text
    assert "14 quantized linears (w3g32), " in text
    assert "sound: every tensor is there" in text
    found.errors, found.reference = {"a": 0.25, "b": 0.5}, "somewhere"
    for number in range(30):
        found.tell(f"\x1b]0;problem {number}")
    text = judgement_text(msgspec.to_builtins(found))
    assert "median 0.3750, largest 0.5000" in text
    assert "30 problems:" in text
    assert "and 10 more" in text
    assert "\x1b" not in text


def eqat_verify(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "eqat_tui", "verify", *arguments], capture_output=True, text=True, check=False
    )


def test_the_command_tells_what_was_found_and_exits_by_it(
    written: Callable[[str], Path], tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    changed(written("gptq_v2"), broken, lambda tensors: tensors.pop(f"{LINEAR}.scales"))
    result = eqat_verify(str(broken), "--json")
    assert result.returncode == 4
    told = json.loads(result.stdout)
    assert not told["sound"]
    assert any(LINEAR in problem for problem in told["problems"])
    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / "config.json").write_bytes((broken / "config.json").read_bytes())
    (cut / FILE).write_bytes((broken / FILE).read_bytes()[:-100])
    refused = eqat_verify(str(cut))
    assert refused.returncode == 4
    assert refused.stderr.startswith("error: ")
    assert len(refused.stderr.splitlines()) == 1
    nothing = eqat_verify(str(tmp_path / "nothing"))
    assert nothing.returncode == 3
    assert "is not there" in nothing.stderr


def edited(export: Path, place: Path, change: Callable[[dict[str, Any]], object]) -> Judgement:
    """What is found in a copy of ``export`` whose config.json is changed."""
    shutil.copytree(export, place)
    config = json.loads((place / "config.json").read_text())
    change(config)
    (place / "config.json").write_text(json.dumps(config))
    return judge(place)


@pytest.mark.parametrize("name", [*PACKED, "hf"])
def test_what_is_none_of_the_models_is_noted_and_has_to_be_finite(
    written: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    extra = {"extra.head.weight": torch.ones(3), "extra.norm.weight": torch.ones(2)}
    found = changed(written(name), tmp_path / "extra", lambda tensors: tensors.update(extra))
    assert found.sound
    assert found.notes == [
        "extra.head.weight and 1 more tensors are none of the model's that config.json describes: loaders "
        "ignore them"
    ]
    extra["extra.norm.weight"][1] = torch.nan
    found = changed(written(name), tmp_path / "nan", lambda tensors: tensors.update(extra))
    assert found.problems == ["extra.norm.weight: 1 of 2 values are not finite"]


@pytest.mark.parametrize("name", PACKED)
def test_a_bias_that_the_model_has_no_place_for_has_to_be_finite(
    written: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    bias = {"model.layers.1.mlp.up_proj.bias": torch.full((4,), torch.inf)}
    found = changed(written(name), tmp_path / "bias", lambda tensors: tensors.update(bias))
    assert found.problems == ["model.layers.1.mlp.up_proj.bias: 4 of 4 values are not finite"]


def test_blocks_beyond_those_of_the_configuration_are_noted(
    written: Callable[[str], Path], tmp_path: Path
) -> None:
    found = edited(written("gptq_v2"), tmp_path / "few", lambda config: config.update(num_hidden_layers=1))
    assert found.blocks == 1
    (note,) = found.notes
    assert note.startswith("model.layers.1.input_layernorm.weight and ")


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("quant_method", "zzz", "config.json: quant_method is 'zzz', which no loader"),
        ("group_size", "x", "config.json: group_size is 'x', which is no number"),
        ("sym", True, "config.json: it says that the grid is symmetric, and there are zero points besides 4"),
    ],
)
def test_a_description_that_does_not_fit_is_a_problem(
    written: Callable[[str], Path], tmp_path: Path, name: str, field: str, value: object, problem: str
) -> None:
    def change(config: dict[str, Any]) -> None:
        said = config["quantization_config"]
        said["checkpoint_format"] = name  # by which a reader is found
        inner = said["config_groups"]["group_0"]["weights"] if "config_groups" in said else said
        (said if field == "quant_method" else inner)[field] = value

    if (name, field) == ("compressed-tensors", "quant_method"):
        with pytest.raises(PreflightError, match="its quantization is zzz pack-quantized, and only"):
            edited(written(name), tmp_path / "edited", change)
        return
    found = edited(written(name), tmp_path / "edited", change)
    assert len(found.problems) == 1
    assert found.problems[0].startswith(problem)


@pytest.mark.parametrize("said", [None, {}])
def test_a_description_that_loaders_do_not_see_is_noted(
    written: Callable[[str], Path], tmp_path: Path, said: object
) -> None:
    def change(config: dict[str, Any]) -> None:
        config["quantization_config"] = said

    found = edited(written("gptq_v2"), tmp_path / "edited", change)
    assert found.sound
    assert found.notes == [
        "config.json names no quant_method: loaders that go by it take the linears for unquantized ones"
    ]


def test_activations_that_are_quantized_as_well_are_noted(
    written: Callable[[str], Path], tmp_path: Path
) -> None:
    def change(config: dict[str, Any]) -> None:
        group = config["quantization_config"]["config_groups"]["group_0"]
        group["input_activations"] = {"num_bits": 8, "type": "int"}

    found = edited(written("compressed-tensors"), tmp_path / "edited", change)
    assert found.notes == ["its activations are quantized as well (config.json)"]


def test_groups_without_an_input_are_a_problem(written: Callable[[str], Path], tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj"

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{name}.g_idx"] = torch.zeros_like(tensors[f"{name}.g_idx"])

    found = changed(written("gptq_v2"), tmp_path / "groups", change)
    assert [
        problem for problem in found.problems if problem.startswith(f"{name}: its inputs are in 1 of its ")
    ]


def test_a_number_of_blocks_that_no_model_has_is_refused_before_any_is_made(
    written: Callable[[str], Path], tmp_path: Path
) -> None:
    found = edited(written("gptq_v2"), tmp_path / "huge", lambda c: c.update(num_hidden_layers=10**9))
    assert any("num_hidden_layers is 1e+09" in problem for problem in found.problems)
