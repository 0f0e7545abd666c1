"""An export as an ONNX graph: ONNX Runtime computes the trained model from it, and what differs is found.

Where the packages of the extra ``onnx`` are not installed, only that is tried: that they are asked for, in
one line, before anything is trained.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import variants
from onnx_traces import traced_once
from packed_models import (
    compare,
    open_model,
    packed_blocks,
    save_model,
    some_ids,
    trained_logits,
    write,
)

from engine.architecture.description import describe
from engine.architecture.refusals import refuse
from engine.config.formats import FORMATS, matmul_nbits_bytes
from engine.config.grid import Grid, GridConfig
from engine.errors import EqatError, PreflightError
from engine.export import onnx_file, onnx_graph
from engine.export.described import format_in
from engine.export.judging import judge
from engine.export.layout import form_of
from engine.export.onnx_reader import ONNXReader
from engine.export.result import ExportResult
from engine.models.causal_lm import CausalLM
from engine.plan.export_sizes import exported_bytes
from engine.quant.packed import PackedBlock
from eqat_tui.views.result import loading_snippet

HERE = not FORMATS["onnx"].missing_libraries()
needed = pytest.mark.skipif(not HERE, reason="the packages of the extra onnx are not installed")
ONNX = form_of("onnx")
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "biases": ("llama", {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}),
    "tied": ("qwen3", {"tie_word_embeddings": True, "head_dim": 64}),
}
GRIDS = [Grid(2, 64), Grid(4, 128), Grid(8, 32), Grid(2, 32, True), Grid(4, 64, True), Grid(2, 64, False, 1)]
NAMES = [f"w{g.bits}g{g.group_size}{'s' * g.symmetric}z{g.fixed_zero_point}" for g in GRIDS]
LINEAR = "model.layers.1.mlp.up_proj"

Written = tuple[CausalLM, list[PackedBlock], ExportResult]


@pytest.fixture(autouse=True, scope="module")
def _traced_once() -> Iterator[None]:
    with traced_once():
        yield


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Written]:
    """An export of a model in a grid, made once."""
    models = {name: tmp_path_factory.mktemp(name) / "fp" for name in MODELS}
    made: dict[object, Written] = {}

    def of(name: str = "biases", grid: Grid = GRIDS[0], **options: Any) -> Written:
        if not models[name].exists():
            save_model(models[name], MODELS[name][0], **MODELS[name][1])
        key = name, grid, tuple(options.items())
        if key not in made:
            source, lm = open_model(models[name])
            blocks = packed_blocks(lm, grid.bits, grid.group_size, grid.symmetric, grid.fixed_zero_point)
            out = tmp_path_factory.mktemp("out") / "onnx"
            made[key] = lm, blocks, write(out, lm, source, blocks.__getitem__, layout=ONNX, **options)
        return made[key]

    return of


def runtime_logits(folder: Path, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    mask = torch.ones_like(ids) if mask is None else mask
    (logits,) = session.run(["logits"], {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
    return torch.from_numpy(logits)


def assert_same(have: torch.Tensor, want: torch.Tensor) -> None:
    assert (have - want).abs().max() < 1e-3 * want.std()


@needed
@pytest.mark.parametrize("grid", GRIDS, ids=NAMES)
def test_onnxruntime_computes_what_was_trained(exported: Callable[..., Written], grid: Grid) -> None:
    lm, blocks, result = exported(grid=grid)
    check = compare(result.path, lm, blocks.__getitem__, some_ids(2, 30), ONNX)
    assert (check.problems, check.verified, check.rounded) == ((), True, "")
    for shape in ((1, 1), (3, 33)):
        ids = some_ids(*shape)
        assert_same(runtime_logits(result.path, ids), trained_logits(lm, blocks, ids))


@needed
def test_a_tied_head_is_one_tensor_and_padding_on_either_side_changes_nothing(
    exported: Callable[..., Written],
) -> None:
    lm, blocks, result = exported("tied")
    assert compare(result.path, lm, blocks.__getitem__, some_ids(1, 12), ONNX).problems == ()
    reader = ONNXReader(result.path)
    assert "lm_head.weight" not in reader.stored_names()
    assert reader.stored("model.embed_tokens.weight").dtype == torch.bfloat16
    ids, padding = some_ids(2, 20), torch.zeros(2, 5, dtype=torch.int64)
    want = trained_logits(lm, blocks, ids)
    ones = torch.ones_like(ids)
    left = runtime_logits(
        result.path, torch.cat([padding, ids], 1), torch.cat([torch.zeros_like(padding), ones], 1)
    )
    right = runtime_logits(
        result.path, torch.cat([ids, padding], 1), torch.cat([ones, torch.zeros_like(padding)], 1)
    )
    assert_same(left[:, 5:], want)
    assert_same(right[:, :-5], want)


@needed
@pytest.mark.parametrize("grid", GRIDS, ids=NAMES)
def test_the_files_are_as_large_as_planned(exported: Callable[..., Written], grid: Grid) -> None:
    lm, blocks, result = exported(grid=grid)
    reader = ONNXReader(result.path)
    stored = {name: reader.stored(name) for name in reader.stored_names()}
    size = sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
    fixed = "fixed" if grid.fixed_zero_point is not None and not grid.symmetric else "learned"
    section = GridConfig(
        bits=grid.bits, group_size=grid.group_size, symmetric=grid.symmetric, zero_point=fixed
    )
    planned = exported_bytes(describe(str(lm.source.directory)).architecture, section, "onnx")
    assert planned == size
    assert 0 <= result.bytes - size < 64 * len(stored)  # where each begins at a round place
    assert (result.path / "model.onnx").stat().st_size < lm.blocks * FORMATS["onnx"].network_bytes + len(
        stored
    ) * 200
    names = ONNX.names(LINEAR, grid)
    assert set(names) == {name for name in stored if name.startswith(f"{LINEAR}.") and "bias" not in name}
    weight = blocks[1].linears["mlp.up_proj"]
    of_linear = sum(stored[name].numel() * stored[name].element_size() for name in names)
    assert FORMATS["onnx"].linear_bytes(weight.out_features, weight.in_features, grid) == of_linear


def test_zero_points_of_a_row_fill_whole_bytes() -> None:
    assert matmul_nbits_bytes(1, 3 * 64, 2, 64) == 48 + 6 + 1
    assert matmul_nbits_bytes(1, 5 * 64, 2, 64) == 80 + 10 + 2
    assert matmul_nbits_bytes(1, 3 * 64, 8, 64) == 192 + 6 + 3


@needed
def test_tensors_lie_in_several_files_where_one_would_be_too_large(exported: Callable[..., Written]) -> None:
    lm, blocks, result = exported(shard_bytes=200_000, dtype="float16")
    data = sorted(path.name for path in result.path.glob("*.data*"))
    assert len(data) > 2
    assert set(result.files) == {"model.onnx", *data}
    assert compare(result.path, lm, blocks.__getitem__, some_ids(1, 12), ONNX, "float16").problems == ()


@needed
def test_one_changed_number_in_any_tensor_is_caught(exported: Callable[..., Written], tmp_path: Path) -> None:
    lm, blocks, result = exported()
    places = ONNXReader(result.path)._entries
    for name in (*ONNX.names(LINEAR), "model.norm.weight", "model.layers.0.mlp.down_proj.bias"):
        folder = shutil.copytree(result.path, tmp_path / name)
        with (folder / places[name].path.name).open("r+b") as file:
            file.seek(places[name].start)
            byte = file.read(1)[0]
            file.seek(places[name].start)
            file.write(bytes([byte ^ 1]))
        check = compare(folder, lm, blocks.__getitem__, some_ids(1, 8), ONNX)
        assert not check.verified
        assert any(
            name.removesuffix(".qweight").removesuffix(".scales").removesuffix(".qzeros") in problem
            for problem in check.problems
        ), (name, check.problems)


def edited(result: ExportResult, place: Path, change: Callable[[Any], object]) -> Path:
    """A copy of an export whose graph is another."""
    import onnx

    folder = shutil.copytree(result.path, place)
    proto = onnx.load(folder / "model.onnx", load_external_data=False)
    change(proto.graph)
    (folder / "model.onnx").write_bytes(proto.SerializeToString())
    return folder


def operators(graph: Any) -> list[Any]:
    return [node for node in graph.node if node.op_type == "MatMulNBits"]


@needed
def test_a_graph_that_computes_something_else_from_the_right_tensors_is_caught(
    exported: Callable[..., Written], tmp_path: Path
) -> None:
    lm, blocks, result = exported()

    def problems(name: str, change: Callable[[Any], object]) -> str:
        folder = edited(result, tmp_path / name, change)
        check = compare(folder, lm, blocks.__getitem__, some_ids(1, 20), ONNX)
        assert not check.verified, name
        return check.problems[0]

    def swap(graph: Any) -> None:
        gate, up = (
            next(n for n in operators(graph) if f"0.mlp.{name}" in n.input[1])
            for name in ("gate_proj", "up_proj")
        )
        gate.output[0], up.output[0] = up.output[0], gate.output[0]

    def other_sign(graph: Any) -> None:
        next(node for node in graph.node if node.op_type == "Neg").op_type = "Abs"

    def without_mask(graph: Any) -> None:
        next(node for node in graph.node if node.op_type == "Where").input[0] = "model.norm.weight"

    assert "logits differ" in problems("swap", swap)
    assert "logits differ" in problems("sign", other_sign)
    assert problems("unloadable", without_mask)


@needed
def test_truncated_edited_and_foreign_files_are_named(
    exported: Callable[..., Written], tmp_path: Path
) -> None:
    lm, blocks, result = exported()

    def said(folder: Path) -> str:
        check = compare(folder, lm, blocks.__getitem__, some_ids(1, 8), ONNX)
        assert not check.verified
        assert all("\n" not in problem for problem in check.problems)
        try:
            found = judge(folder)
        except EqatError as error:
            return str(error)
        assert not found.sound
        return " ".join(found.problems)

    def with_attribute(name: str, value: int) -> Callable[[Any], None]:
        def change(graph: Any) -> None:
            next(each for each in operators(graph)[3].attribute if each.name == name).i = value

        return change

    def outside(graph: Any) -> None:
        beside = next(each for each in graph.initializer if each.external_data)
        beside.external_data[0].value = "../model.onnx.data"

    short = shutil.copytree(result.path, tmp_path / "short")
    with (short / "model.onnx.data").open("r+b") as file:
        file.truncate(1000)
    assert "it ends inside tensor" in said(short)
    graph = shutil.copytree(result.path, tmp_path / "graph")
    content = (graph / "model.onnx").read_bytes()
    (graph / "model.onnx").write_bytes(content[: len(content) // 2])
    assert "model.onnx" in said(graph)
    (graph / "model.onnx").write_bytes(b"")
    assert "there is no graph in it" in said(graph)
    missing = shutil.copytree(result.path, tmp_path / "missing")
    (missing / "model.onnx.data").unlink()
    assert "model.onnx.data" in said(missing)
    for name, change, words in (
        ("bits", with_attribute("bits", 3), "3 bits"),
        ("wide", with_attribute("bits", 4), "do not fit"),
        ("blocks", with_attribute("block_size", 48), "power of 2"),
        ("inputs", with_attribute("K", 512), "do not fit"),
        ("outside", outside, "is no file of this folder"),
    ):
        assert words in said(edited(result, tmp_path / name, change)), name


@needed
def test_verify_knows_a_graph_and_tells_of_its_grid(exported: Callable[..., Written]) -> None:
    for grid, name in ((GRIDS[0], "w2g64"), (GRIDS[4], "w4g64 symmetric")):
        lm, _, result = exported(grid=grid)
        assert format_in(result.path) == "onnx"
        found = judge(result.path, str(lm.source.directory))
        assert (found.problems, found.linears, found.grids) == ([], 14, {name: 14})
        assert len(found.errors) == 14


@needed
def test_the_lines_that_screen_and_card_show_load_it(
    exported: Callable[..., Written], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, result = exported(grid=GRIDS[1])
    found: dict[str, Any] = {}
    exec(loading_snippet(result.path, "onnx"), found)
    assert found["logits"].shape[::2] == (1, 320)
    card = (result.path / "README.md").read_text()
    assert "library_name: onnx\n" in card
    lines = card.partition("```python\n")[2].partition("```")[0]
    exec(lines.replace("path/to/this/directory", str(result.path)), found := {})
    assert found["ids"].shape[1] > 16
    names = {path.name for path in result.path.iterdir()}
    assert {"config.json", "tokenizer.json", "generation_config.json"} <= names


@needed
def test_a_graph_is_the_same_each_time_and_says_nothing_of_this_machine(
    exported: Callable[..., Written],
) -> None:
    lm, _, result = exported()
    buffers = onnx_file.stored_buffers(lm)
    one, other = (trace(lm, buffers) for trace in (onnx_file.traced, onnx_graph.traced))
    assert one.SerializeToString(deterministic=True) == other.SerializeToString(deterministic=True)
    content = (result.path / "model.onnx").read_bytes()
    assert str(Path(torch.__file__).parent).encode() not in content
    assert b"engine/export" not in content


@needed
def test_a_model_that_asks_the_text_first_is_refused_by_plan_and_trace(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    folder = save_model(tmp_path / "fp", rope_parameters=rope, max_position_embeddings=16)
    with pytest.raises(PreflightError, match="ONNX cannot hold rotary scaling of type 'dynamic'"):
        refused(folder, GridConfig(bits=4))
    with pytest.raises(PreflightError, match="no ONNX graph can be made of LlamaForCausalLM") as caught:
        ONNX.check(open_model(folder)[1], torch.bfloat16)
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)


@needed
def test_a_model_that_the_runtime_has_no_kernel_for_is_refused_before_it_is_trained(tmp_path: Path) -> None:
    folder = variants.build(tmp_path / "fp", "falcon_alibi")
    with pytest.raises(PreflightError, match="ONNX Runtime cannot run FalconForCausalLM") as caught:
        ONNX.check(open_model(folder)[1], torch.bfloat16)
    assert "\n" not in str(caught.value)
    assert "leave onnx out of export.formats" in caught.value.hint


def refused(folder: Path, grid: GridConfig) -> None:
    found = describe(str(folder))
    refuse(found.architecture, found.config, grid, ("onnx",))


@pytest.mark.parametrize(
    ("grid", "words", "instead"),
    [
        (GridConfig(bits=3), "3 bits (its operator takes 2, 4 and 8 bits", "compressed-tensors can"),
        (GridConfig(bits=4, group_size=-1), "one group a row (its operator takes", "compressed-tensors can"),
    ],
)
def test_what_the_operator_does_not_take_is_refused_with_the_nearest_that_does(
    tmp_path: Path, grid: GridConfig, words: str, instead: str
) -> None:
    with pytest.raises(PreflightError) as caught:
        refused(save_model(tmp_path / "fp"), grid)
    assert words in caught.value.message
    assert instead in caught.value.hint


def test_without_its_packages_it_is_refused_in_one_line_and_nothing_imports_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.config.formats.find_spec", lambda name: None)
    with pytest.raises(PreflightError) as caught:
        refused(save_model(tmp_path / "fp"), GridConfig(bits=4))
    assert str(caught.value) == (
        "export.formats: ONNX needs onnx, onnxscript, onnxruntime, not installed here (pip install "
        "onnx onnxscript onnxruntime, or leave onnx out of export.formats)"
    )
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "model.onnx").write_bytes(b"")
    with pytest.raises(PreflightError, match="ONNX needs onnx") as caught:
        judge(tmp_path / "foreign")
    assert "export.formats" not in str(caught.value)
    loaded = "import sys; from engine.export.layout import form_of; form_of('onnx'); import eqat_tui.app"
    ask = f"{loaded}; sys.exit(any(n in sys.modules for n in ('onnx', 'onnxscript', 'onnxruntime')))"
    assert subprocess.run([sys.executable, "-c", ask], check=False).returncode == 0
