"""EQAT_EXTENSIONS: what a package registers is there for commands and app, and a bad one is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from cli_tools import REPOSITORY, Eqat, environment, story

from engine.run import events
from engine.run.directory import RunDirectory
from engine.run.event_log import EventWriter

EXTENSION = """
from engine.config.stages import STAGES, Stage
STAGES.register(Stage(name="toy", label="Toy method", scope="block"))
"""


def extended(where: Path, **extra: str) -> dict[str, str]:
    (where / "toy_stages.py").write_text(EXTENSION)
    return {"PYTHONPATH": f"{REPOSITORY}:{where}", "EQAT_EXTENSIONS": " toy_stages, ", **extra}


def test_an_extensions_stage_has_its_label_in_what_commands_print(
    eqat: Eqat, finished_run: RunDirectory, tmp_path: Path
) -> None:
    with EventWriter(finished_run.events_path, 1) as writer:
        for event in [
            *story(finished_run),
            events.Eval(
                stage="toy", perplexity=20.5, tokens=512, sequence_length=32, seconds=1.0, corpus="builtin"
            ),
        ]:
            writer.emit(event)
    assert "toy " in eqat("show", "latest").stdout
    assert "Toy method" in eqat("show", "latest", **extended(tmp_path)).stdout


@pytest.mark.parametrize("arguments", [["presets"], ["--help"], ["show", "latest"]])
def test_an_extension_that_cannot_be_imported_is_one_line_and_exit_code_2(
    arguments: list[str], eqat: Eqat
) -> None:
    done = eqat(*arguments, EQAT_EXTENSIONS="there_is_none_of_this_name")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "EQAT_EXTENSIONS=there_is_none_of_this_name" in done.stderr


def test_the_app_refuses_it_in_the_same_way(tmp_path: Path) -> None:
    program = (
        "import sys\nimport eqat_tui.terminal as terminal\n"
        "terminal.can_open_app = lambda: True\nsys.argv = ['eqat']\n"
        "from eqat_tui.__main__ import main\nmain()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=environment(EQAT_EXTENSIONS="there_is_none_of_this_name"),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "EQAT_EXTENSIONS=there_is_none_of_this_name" in done.stderr
