"""The public interface of every command, frozen: a flag is added or renamed on purpose or not at all."""

from __future__ import annotations

from typing import Any

import typer.main

from eqat_tui.cli import app
from eqat_tui.configure import build_config

CONFIGURE = {"--model", "--bits", "--group-size", "--data", "--device", "--set", "--trust-remote-code"}
CLUSTER = {"--on", "--partition", "--account", "--time", "--cpus", "--memory", "--sbatch"}
PUBLIC = {
    "run": {*CONFIGURE, *CLUSTER, "--gpus", "--runs-dir", "--detach", "--dry-run", "--json"},
    "plan": {*CONFIGURE, "--gpus", "--runs-dir", "--json"},
    "resume": {
        *("--from-block", "--set", "--gpus", "--allow-world-size-change"),
        *("--runs-dir", "--detach", "--json", *CLUSTER),
    },
    "attach": {
        *("--runs-dir", "--plain", "--read-only", "--ascii", "--json"),
        *("--ssh-option", "--remote-command"),
    },
    "tail-events": {"--from", "--log", "--once", "--runs-dir"},
    "replay": {"--runs-dir", "--speed", "--ascii"},
    "memory": {"--runs-dir", "--ascii"},
    "monitor": {"--runs-dir", "--ascii"},
    "verify": {"--reference", "--runs-dir", "--json"},
    "import": {
        *("--reference", "--preset", "--data", "--device", "--set"),
        *("--runs-dir", "--dry-run", "--detach", "--json"),
    },
    "generate": {"--prompt", "--new-tokens", "--runs-dir", "--json"},
    "bench": {"--format", "--prompt-tokens", "--new-tokens", "--device", "--runs-dir", "--json"},
    "stop": {"--runs-dir", "--abort", "--kill", "--wait"},
    "runs": {"--runs-dir", "--limit", "-n", "--json"},
    "show": {"--runs-dir", "--json"},
    "compare": {"--runs-dir", "--json"},
    "report": {"--to", "--charts", "--png", "--runs-dir"},
    "log-to": {"--to", "--follow", "-f", "--runs-dir"},
    "presets": {"--json"},
    "doctor": {"--runs-dir", "--quick", "--json"},
    "eval": {
        *("--data", "--sequence-length", "--windows", "--bos", "--reference", "--out", "--device"),
        *("--tasks", "--task-limit", "--task-folder", "--task-chat"),
        *("--trust-remote-code", "--runs-dir", "--detach", "--json"),
    },
    "rm": {"--runs-dir", "--yes", "-y"},
    "gc": {"--runs-dir", "--tokens", "--dry-run", "--json"},
    "export": {"--format", "--to", "--set", "--runs-dir", "--detach", "--json"},
    "push": {"--format", "--base-model", "--revision", "--private", "--yes", "-y", "--runs-dir"},
    "paths": {"--runs-dir", "--json"},
    "notify": {"--runs-dir"},
    "queue": set(),
    "queue add": {*CONFIGURE, "--gpus", "--runs-dir", "--json"},
    "queue list": {"--json"},
    "queue move": set(),
    "queue remove": {"--over"},
    "queue pause": set(),
    "queue stop": {"--wait"},
    "queue resume": set(),
    "queue work": set(),
    "sweep": set(),
    "sweep start": {
        *(*CONFIGURE, *CLUSTER),
        *("--sweep", "--jobs", "--gpus", "--runs-dir", "--detach", "--dry-run", "--json"),
    },
    "sweep resume": {*CLUSTER, "--jobs", "--runs-dir", "--detach", "--json"},
    "sweep list": {"--runs-dir", "--json"},
    "sweep show": {"--runs-dir", "--json", "--csv", "--markdown"},
}


def commands() -> dict[str, Any]:
    """Every command by what is typed for it."""
    found = dict(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    inner = {
        f"{name} {below}": command
        for name, group in found.items()
        for below, command in getattr(group, "commands", {}).items()
    }
    return found | inner


def test_commands_and_their_flags_are_the_documented_ones() -> None:
    found = {
        name: {flag for parameter in command.params for flag in parameter.opts if flag.startswith("-")}
        for name, command in commands().items()
    }
    assert found == PUBLIC


def test_memory_is_also_called_what_it_was_called_before_and_the_help_does_not_say_so() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert commands["monitor"].callback.__wrapped__ is commands["memory"].callback.__wrapped__  # one function
    assert [name for name, command in commands.items() if command.hidden] == ["monitor"]


def test_every_command_and_flag_has_help() -> None:
    for name, command in commands().items():
        assert command.help, name
        for parameter in command.params:
            assert getattr(parameter, "help", None), f"{name} {parameter.name}"


def test_a_repositorys_own_code_is_trusted_only_when_that_is_typed() -> None:
    for model in (None, "somebody/model"):
        assert not build_config("smoke", model=model).model.trust_remote_code
        assert build_config("smoke", model=model, trust_remote_code=True).model.trust_remote_code
    for name in ("run", "plan", "sweep start"):
        (flag,) = [found for found in commands()[name].params if "--trust-remote-code" in found.opts]
        assert "with your rights" in flag.help
