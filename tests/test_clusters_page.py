"""What the page on clusters tells to type can be typed, and what it says of options is so."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from engine.config.fields import field_names
from engine.config.loading import preset_names
from engine.run.elsewhere import SILENT_S
from engine.run.slurm import ASK_EVERY_S
from eqat_tui.cli import app
from eqat_tui.clusters.asked import WARN_S
from eqat_tui.clusters.script import HEAD

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "clusters.md").read_text()


def lines() -> Iterator[str]:
    """Every command of ours in a block or in the text."""
    for line in PAGE.splitlines():
        found = re.match(r"\s+(?:exec )?(?:if )?(eqat [^#>;]*)", line) or re.match(r"exec (eqat .*)", line)
        if found:
            yield found[1].strip()
    yield from re.findall(r"`(eqat [^`]*)`", PAGE)


def context(words: list[str]) -> Any:
    """What the command line makes of it, with nothing carried out."""
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands"):
        name = words.pop(0)
        if name not in command.commands:  # eqat sweep FILE
            words.insert(0, name)
            name = "start"
        command = command.commands[name]
    return command.make_context("eqat", words)


def test_every_command_on_the_page_is_one() -> None:
    found = list(lines())
    assert len(found) > 12
    for line in found:
        words = shlex.split(line)[1:]
        if words in (["plan"], ["rm"], ["run"], ["resume"], ["stop", "RUN"]):  # named, and not to be typed so
            continue
        try:
            made = context(list(words))
        except Exception as error:
            pytest.fail(f"{line}: {error}")
        target = made.params.get("target")
        assert target is None or target == "…" or target in preset_names(), line


def test_the_fields_and_options_that_are_named_are_there() -> None:
    assert set(re.findall(r"`runtime\.\w+`", PAGE)) == {"`runtime.checkpoint_minutes`"}
    assert "runtime.checkpoint_minutes" in field_names()
    assert "runtime.deterministic" in field_names()
    options = {parameter.opts[0] for parameter in context(["run", "smoke"]).command.params}
    named = set(re.findall(r"`(--[a-z]+)", PAGE.split("### A sweep")[0].split("| option |")[1]))
    assert named - {"--gres"} <= options
    assert {"--on", "--partition", "--account", "--time", "--cpus", "--memory", "--sbatch"} <= named


def test_the_numbers_are_those_of_the_program() -> None:
    assert f"--signal=B:USR1@{WARN_S}" in HEAD
    assert PAGE.count(f"B:USR1@{WARN_S}") == 2
    assert (WARN_S, SILENT_S, ASK_EVERY_S) == (120, 120.0, 5.0)  # two minutes, two minutes, five seconds


def test_the_file_for_skypilot_can_be_read_and_its_script_too() -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    task = yaml.safe_load(text)
    assert {"resources", "volumes", "setup", "run"} <= task.keys()
    assert task["envs"]["EQAT_RUNS_DIR"].startswith(next(iter(task["volumes"])))
    subprocess.run(["bash", "-n"], input=task["run"], text=True, check=True)


def test_the_readme_leads_there() -> None:
    assert "(docs/clusters.md)" in (ROOT / "README.md").read_text()
