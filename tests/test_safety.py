"""What a checkpoint or a cache holds is data: nothing in the product could run it."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from engine.config.derived import resolve
from engine.config.loading import load
from engine.config.validation import validate
from engine.errors import EqatError, UsageError
from engine.run import control
from engine.run.directory import RunDirectory
from engine.run.generations import read_generation
from engine.run.objects import DamagedCheckpoint
from engine.run.redo import read_origin

ROOT = Path(__file__).parents[1]
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "runpy"}
UNSAFE_NAMES = {
    *("eval", "exec", "compile", "__import__", "builtins.eval", "builtins.exec", "importlib.import_module"),
    *("torch.load", "torch.save", "torch.serialization.load", "torch.serialization.save", "torch.jit.load"),
    *("numpy.load", "yaml.load", "yaml.unsafe_load", "pandas.read_pickle", "datasets.load_from_disk"),
    *("os.system", "allow_pickle=", "shell="),
}
"""Where a file's or a string's content can become code."""

NAMED_CODE = {"engine/config/tables.py importlib.import_module"}
"""What a row of a table names is imported, and an extension that the user named; no file names a module."""

ASKING = {"AutoTokenizer", "AutoConfig", "AutoModelForCausalLM"}
"""Left to themselves these ask on the terminal whether to run a model's code."""


def imported(tree: ast.Module) -> dict[str, str]:
    """What the names that a module's imports bring in stand for: np is numpy, load may be torch.load."""
    known: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            known |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            known |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return known


def dotted(node: ast.expr, known: dict[str, str]) -> str:
    """The full name of what an expression refers to, as far as imports tell."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value, known)}.{node.attr}"
    return known.get(node.id, node.id) if isinstance(node, ast.Name) else ""


def named(node: ast.AST, known: dict[str, str]) -> list[str]:
    """Names that a node imports, refers to or, as an option that is on, passes."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Attribute | ast.Name):
        # A name that is only given a value (a setting called ``compile``) runs nothing.
        return [dotted(node, known)] if isinstance(node.ctx, ast.Load) else []
    if isinstance(node, ast.keyword) and node.arg is not None:
        off = isinstance(node.value, ast.Constant) and not node.value.value
        return [] if off else [f"{node.arg}="]
    return []


def unsafe(path: Path, root: Path = ROOT) -> Iterator[str]:
    """Places in a file that could run data."""
    tree = ast.parse(path.read_text())
    known = imported(tree)
    for node in ast.walk(tree):
        for name in named(node, known):
            if name.partition(".")[0] in UNSAFE_MODULES or name in UNSAFE_NAMES:
                yield f"{path.relative_to(root)}:{getattr(node, 'lineno', '?')} {name}"


def product_files() -> list[Path]:
    files = [*ROOT.glob("engine/**/*.py"), *ROOT.glob("eqat_tui/**/*.py")]
    assert len(files) > 50
    return files


def test_no_product_code_reads_or_writes_pickles_or_evaluates_text() -> None:
    found = [place for path in product_files() for place in unsafe(path)]
    assert {re.sub(r":\d+", "", place) for place in found} == NAMED_CODE


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "import pickle as p",
        "from joblib import load",
        "import torch\ntorch.load(x)",
        "import torch as t\nt.save(x, y)",
        "from torch import load as read\nread(x)",
        "import torch\nwrite = torch.save",
        "import numpy as np\nnp.load(x)",
        "import numpy\nnumpy.lib.format.read_array(x, allow_pickle=True)",
        "eval('1')",
        "import builtins\nbuiltins.exec('1')",
        "run = exec",
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "from importlib import import_module\nimport_module('x')",
    ],
)
def test_the_search_finds_what_it_looks_for(text: str, tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text(text)
    assert list(unsafe(tmp_path / "module.py", tmp_path))


@pytest.mark.parametrize(
    "text", ["import re\nre.compile('x')", "import torch\ntorch.compile(f)", "model.eval()", "x.load(y)"]
)
def test_the_search_finds_nothing_else(text: str, tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text(text)
    assert not list(unsafe(tmp_path / "module.py", tmp_path))


def test_no_library_is_left_to_ask_whether_a_models_code_may_run() -> None:
    silent = []
    for path in ROOT.glob("engine/models/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            owner = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
            if owner not in ASKING or node.func.attr not in ("from_pretrained", "from_config"):
                continue
            # Without a name: the options of a dictionary (**options).
            if not {"trust_remote_code", None} & {keyword.arg for keyword in node.keywords}:
                silent.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert silent == []


@pytest.mark.parametrize("name", ["../../../x", "/etc/passwd", "a" * 63, "A" * 64, ""])
def test_a_generation_that_names_files_elsewhere_is_refused_as_damaged(tmp_path: Path, name: str) -> None:
    content = {"schema": 2, "generation": 1, "identity": {}, "entries": {"block-000": name}, "facts": {}}
    (tmp_path / "generation-000001.json").write_text(json.dumps(content))
    with pytest.raises(DamagedCheckpoint):
        read_generation(tmp_path, 1)


def test_requests_that_name_files_elsewhere_are_passed_over(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "runs", resolve(load("smoke")))
    (tmp_path / "runs" / "x.json").write_text("{}")
    (run.control_dir / "..json").write_text("{}")
    name = f"{1:020d}-00000000"
    for file, number in (("evil.json", "../../evil"), (f"{name}.json", "../../x"), ("x.json", name)):
        content = {"id": number, "request": "abort", "t": 0, "pid": 1}
        (run.control_dir / file).write_text(json.dumps(content))
    assert control.pending(run) == []
    assert control.discard_pending(run) == 0
    for number in ("../../x", "/etc/passwd", f"{name}/../../../x", ""):
        with pytest.raises(UsageError, match="not the id of a request"):
            control.acknowledge(run, number)
    assert (tmp_path / "runs" / "x.json").exists()


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"path": 1, "id": "x", "from_block": 0}', '{"path": "/", "id": "x"}']
)
def test_an_origin_that_is_none_is_named(tmp_path: Path, content: str) -> None:
    run = RunDirectory.create(tmp_path, resolve(load("smoke")))
    assert read_origin(run) is None
    run.origin_path.write_text(content)
    with pytest.raises(EqatError, match="cannot be read"):
        read_origin(run)


@pytest.mark.parametrize(
    "source", ["../../x", "a/../../../b", "/", "..", "x" * 300, "a\nb", "~/../../x", "C:\\x"]
)
def test_no_models_name_leads_a_new_run_out_of_its_folder(tmp_path: Path, source: str) -> None:
    config = resolve(load("smoke"))
    config = replace(config, model=replace(config.model, source=source))
    run = RunDirectory.create(tmp_path / "runs", config)
    assert run.path.parent == tmp_path / "runs"
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


@pytest.mark.parametrize("formats", [["../../x"], ["/etc/x"], ["gptq_v2/../../x"]])
def test_a_config_cannot_name_an_export_elsewhere(tmp_path: Path, formats: list[str]) -> None:
    with pytest.raises(EqatError):
        validate(resolve(load("smoke", overrides={"export.formats": formats})))


def test_a_config_that_is_a_link_to_nothing_is_no_run(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.toml").symlink_to(tmp_path / "absent")
    with pytest.raises(UsageError, match="not a run directory"):
        RunDirectory.open(folder)
