"""What a checkpoint or a cache holds is data: nothing in the product could run it."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.run import control
from engine.run.config import load, resolve
from engine.run.directory import RunDirectory
from engine.run.errors import EqatError
from engine.run.generations import DamagedCheckpoint, read_generation
from engine.run.redo import read_origin

ROOT = Path(__file__).parents[1]
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
UNSAFE_CALLS = {"eval", "exec", "torch.load", "torch.save", "numpy.load", "np.load", "yaml.load"}


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def unsafe(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        if any(name.partition(".")[0] in UNSAFE_MODULES for name in names):
            yield f"{path.relative_to(ROOT)}:{node.lineno} imports {names}"
        if isinstance(node, ast.Call) and dotted(node.func) in UNSAFE_CALLS:
            yield f"{path.relative_to(ROOT)}:{node.lineno} calls {dotted(node.func)}"


def test_no_product_code_reads_or_writes_pickles_or_evaluates_text() -> None:
    files = [*ROOT.glob("engine/**/*.py"), *ROOT.glob("eqat_tui/**/*.py")]
    assert len(files) > 50
    assert [found for path in files for found in unsafe(path)] == []


@pytest.mark.parametrize("text", ["import pickle", "torch.load(x)", "eval('1')", "from joblib import load"])
def test_the_search_finds_what_it_looks_for(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "module.py").write_text(text)
    assert list(unsafe(tmp_path / "module.py"))


@pytest.mark.parametrize("name", ["../../../x", "/etc/passwd", "a" * 63, "A" * 64, ""])
def test_a_generation_that_names_files_elsewhere_is_refused_as_damaged(tmp_path: Path, name: str) -> None:
    content = {"schema": 2, "generation": 1, "identity": {}, "entries": {"block-000": name}, "facts": {}}
    (tmp_path / "generation-000001.json").write_text(json.dumps(content))
    with pytest.raises(DamagedCheckpoint):
        read_generation(tmp_path, 1)


def test_requests_and_origins_that_are_none_are_passed_over_or_named(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, resolve(load("smoke")))
    (run.control_dir / "..json").write_text("{}")
    (run.control_dir / "evil.json").write_text('{"id": "../../evil", "request": "abort", "t": 0, "pid": 1}')
    assert control.pending(run) == []
    assert read_origin(run) is None
    run.origin_path.write_text("{")
    with pytest.raises(EqatError, match="cannot be read"):
        read_origin(run)
