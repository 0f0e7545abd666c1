"""Who may import what (the static half of this is `lint-imports`, configured in pyproject.toml).

Each import happens in a process of its own, so that no other test can have loaded the module first.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "datasets", "accelerate", "textual", "numpy", "gguf", "huggingface_hub")


def modules_after(code: str) -> set[str]:
    """Top-level modules that are loaded once ``code`` has run."""
    program = f"{code}\nimport json, sys\nprint(json.dumps(sorted({{m.split('.')[0] for m in sys.modules}})))"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(json.loads(answer.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "module",
    [
        "engine.run",
        "engine.config.sameness",
        "engine.config.field_docs",
        "engine.run.directory",
        "engine.run.events",
        "engine.run.state",
        "engine.run.control",
        "engine.run.launch",
        "engine.plan.plan",
    ],
)
def test_the_run_contract_loads_no_engine_library_and_no_user_interface(module: str) -> None:
    loaded = modules_after(f"import {module}")
    assert not loaded & {*HEAVY, "rich", "typer", "eqat_tui"}


@pytest.mark.parametrize(
    "module",
    [
        "cli",
        "follow",
        "display",
        "run_text",
        "plan_text",
        "overview",
        "doctor",
        "sweeping",
        "compare_text",
        "report.page",
        "tracking.following",
    ],
)
def test_the_command_line_loads_no_engine_library(module: str) -> None:
    assert not modules_after(f"import eqat_tui.{module}") & set(HEAVY)


SWEEP = ["sweep", "smoke", "--sweep", "grid.bits=2,3", "--dry-run"]


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["presets"], ["plan", "smoke"], SWEEP])
def test_commands_that_only_look_load_neither_torch_nor_transformers(arguments: list[str]) -> None:
    code = (
        "import contextlib, io\nfrom eqat_tui.cli import main\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
        f"    main({arguments!r})"
    )
    # pydantic is what newer typers read options with; it costs as much as all of ours together.
    assert not modules_after(code) & {*HEAVY, "pydantic"}


def test_help_does_not_load_what_only_progress_needs() -> None:
    assert "rich" not in modules_after("import eqat_tui.cli")


def test_the_grid_needs_only_torch() -> None:
    loaded = modules_after("import engine.quant.grid, engine.quant.packing, engine.quant.packed")
    assert not loaded & {"transformers", "datasets", "accelerate", "rich", "typer", "textual", "eqat_tui"}


def test_the_app_loads_no_engine_library_whatever_it_shows(tmp_path: Path) -> None:
    """Through all screens, with a plan, a model picker and a run."""
    code = f"""
import os, sys
os.chdir({str(tmp_path)!r})
sys.path[:0] = [{str(REPOSITORY)!r}, {str(REPOSITORY / "tests" / "tui")!r}]
sys.path.insert(0, {str(REPOSITORY / "tests" / "engine")!r})
from pathlib import Path
from app_tools import app_of, drive, picture, press, until
from logs import RECORDED, make_run
run = make_run(Path("runs"), RECORDED["finished"])

async def script(pilot, app):
    for key, words in (("1", "blocks"), ("2", "loss"), ("3", "quality"), ("4", "1 of 1"), ("5", "live")):
        await press(pilot, key)
        await until(pilot, lambda: words in picture(app))
    await press(pilot, "1", "enter")
    await until(pilot, lambda: "supported" in picture(app))

drive(app_of(run), script)
"""
    assert not modules_after(code) & {"torch", "transformers", "datasets", "accelerate", "safetensors"}


def test_the_app_opens_without_what_only_some_screens_need() -> None:
    loaded = modules_after("import eqat_tui.app, eqat_tui.screens.setup, eqat_tui.screens.monitor")
    assert not loaded & {"typer", "psutil", "pynvml", "huggingface_hub", "numpy", "markdown_it"}
