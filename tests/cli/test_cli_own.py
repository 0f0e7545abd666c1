"""The user's own defaults from the outside: ``eqat paths``, ``eqat notify``, and what a real run tells."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from cli_tools import Eqat

from engine.config.loading import load
from engine.run.directory import RunDirectory

WRITES = "import sys; open(sys.argv[1], 'a').write(sys.argv[2] + '\\n')"
QUICK = (
    *("--device", "cpu", "--set", "block_ap.enabled=false", "--set", "e2e_qp.enabled=false"),
    *("--set", "evaluation.windows=2"),
)


@pytest.fixture
def told(tmp_path: Path) -> Path:
    """Where messages go."""
    command = [sys.executable, "-c", WRITES, str(tmp_path / "told"), "{message}"]
    (tmp_path / "config.toml").write_text(f"[notify]\ncommand = {json.dumps(command)}\n")
    return tmp_path / "told"


def test_a_real_run_tells_that_it_is_done(eqat: Eqat, tmp_path: Path, told: Path) -> None:
    done = eqat("run", "smoke", *QUICK, EQAT_CONFIG_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    (message,) = told.read_text().splitlines()
    assert "is done: perplexity of full precision " in message
    assert "perplexity of round-to-nearest " in message


def test_a_message_can_be_tried(eqat: Eqat, tmp_path: Path, told: Path, finished_run: RunDirectory) -> None:
    place = str(finished_run.path)
    tried = eqat("notify", place, EQAT_CONFIG_DIR=str(tmp_path))
    assert (tried.returncode, tried.stdout) == (0, told.read_text()), tried.stderr
    refused = eqat("notify", place)
    assert refused.returncode == 2
    (line,) = refused.stderr.splitlines()
    assert "notify: names neither a command nor a webhook" in line
    (tmp_path / "config.toml").write_text('[notify]\nwebhook = "http://127.0.0.1:9/"\n')
    unreachable = eqat("notify", place, EQAT_CONFIG_DIR=str(tmp_path))
    assert unreachable.returncode == 3
    (line,) = unreachable.stderr.splitlines()
    assert line.startswith("warning: notify: the webhook cannot be reached")


def test_paths_say_where_things_are_and_why(eqat: Eqat, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(f'runs_dir = "{tmp_path}/mine"\n[notify]\nbell = true\n')
    given = {"EQAT_CONFIG_DIR": str(tmp_path), "HF_HOME": str(tmp_path / "hf")}
    found = json.loads(eqat("paths", "--json", **given).stdout)
    assert found["runs"] == {"path": f"{tmp_path}/mine", "exists": False, "decided_by": "config.toml"}
    assert found["config"] == {
        "path": f"{tmp_path}/config.toml",
        "exists": True,
        "decided_by": "$EQAT_CONFIG_DIR",
    }
    assert found["hub"]["path"] == f"{tmp_path}/hf/hub"
    assert found["defaults"]["notify"]["bell"] is True
    text = eqat("paths", **given).stdout
    assert f"{tmp_path}/mine (not there, config.toml)" in text
    (tmp_path / "config.toml").write_text("runs_dirs = 3\n")
    for command in (("paths",), ("runs",), ("run", "smoke")):
        refused = eqat(*command, **given)
        assert refused.returncode == 2
        assert "config.toml: runs_dirs: there is no such field (did you mean runs_dir?)" in refused.stderr


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("eqat ru", ["run", "runs"]),
        ("eqat plan smo", ["smoke"]),
        ("eqat sweep st", ["start"]),
        ("eqat run demo --gro", ["--group-size"]),
    ],
)
def test_a_shell_completes_commands_presets_and_options(eqat: Eqat, typed: str, expected: list[str]) -> None:
    words = {"COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split()) - 1)}
    found = eqat(_EQAT_COMPLETE="complete_bash", **words)
    assert found.stdout.split() == expected
    zsh = eqat(_EQAT_COMPLETE="complete_zsh", _TYPER_COMPLETE_ARGS=typed)
    assert all(f'"{name}"' in zsh.stdout for name in expected)


def test_a_shell_completes_runs_of_the_folder_that_is_typed(eqat: Eqat, finished_run: RunDirectory) -> None:
    folder = str(finished_run.path.parent)
    for words in (f"eqat show --runs-dir {folder} ", "eqat show "):
        given = {"COMP_WORDS": words, "COMP_CWORD": str(len(words.split()))}
        found = eqat(_EQAT_COMPLETE="complete_bash", EQAT_RUNS_DIR=folder, **given)
        assert finished_run.id in found.stdout.split()


def test_a_name_that_a_shell_would_evaluate_is_not_completed(eqat: Eqat, tmp_path: Path) -> None:
    for name in ("$(touch evil)", "a'b", "a`b`", "plain-1"):
        RunDirectory.create(tmp_path / "runs", load("smoke")).path.rename(tmp_path / "runs" / name)
    found = eqat(_EQAT_COMPLETE="complete_bash", COMP_WORDS="eqat show ", COMP_CWORD="2")
    assert found.stdout.split() == ["plain-1"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_has_its_script(eqat: Eqat, shell: str) -> None:
    shown = eqat("--show-completion", shell, _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert shown.returncode == 0
    assert "_EQAT_COMPLETE" in shown.stdout
