"""What is installed from a wheel: every module, the presets, the app's look; and it works without a clone."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from cli_tools import REPOSITORY, environment

CODE = """
import engine, sys
from eqat_tui.__main__ import main
sys.argv = sys.argv[1:]
print(engine.__file__, flush=True)
main()
"""
PRESETS = sorted((REPOSITORY / "presets").rglob("*.toml"))
"""Of runs, and of sweeps in a folder of their own."""
builder = pytest.importorskip("hatchling.builders.wheel", reason="hatchling builds the wheel")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = str(tmp_path_factory.mktemp("dist"))
    (made,) = builder.WheelBuilder(str(REPOSITORY)).build(directory=place, versions=["standard"])
    return Path(made)


def test_the_wheel_has_what_the_program_reads_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    here = {
        str(path.relative_to(REPOSITORY))
        for folder in ("engine", "eqat_tui")
        for path in (REPOSITORY / folder).rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".so") and "__pycache__" not in path.parts
    }
    presets = {f"engine/{path.relative_to(REPOSITORY)}" for path in PRESETS}
    assert {name for name in names if ".dist-info/" not in name} == here | presets
    assert len(presets) > 20
    assert not any(name.startswith(("tests/", "benchmarks/", "docs/")) for name in names)


def test_what_is_installed_from_it_works_without_a_clone(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    scripts = next(site.glob("*.dist-info")) / "entry_points.txt"
    assert "eqat = eqat_tui.__main__:main" in scripts.read_text()
    done = subprocess.run(
        [sys.executable, "-c", CODE, "eqat", "presets", "--json"],
        cwd=tmp_path,
        env=environment(PYTHONPATH=str(site)),
        capture_output=True,
        text=True,
        check=False,
    )
    where, _, printed = done.stdout.partition("\n")
    assert (done.returncode, where) == (0, str(site / "engine" / "__init__.py")), done.stderr
    names = {preset["name"] for preset in json.loads(printed)}
    assert names == {path.stem for path in PRESETS}
