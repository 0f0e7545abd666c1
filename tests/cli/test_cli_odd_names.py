"""Names that no file can have, links to themselves, homes of nobody: one line, never a traceback."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_tools import Eqat

LONG = "b" * 300
LOOP = "loop.toml"

COMMANDS = {
    "a configuration that is a loop": ("plan", f"./{LOOP}"),
    "a run of one": ("run", f"./{LOOP}", "--dry-run"),
    "a configuration with a long name": ("plan", f"{LONG}.toml"),
    "a text with a long name": ("plan", "smoke", "--data", f"./{LONG}"),
    "an evaluation text with a long name": ("plan", "smoke", "--set", f"evaluation.data.source=/{LONG}"),
    "a text in the home of nobody": ("plan", "smoke", "--data", "~nobody-has-this-name/x.txt"),
    "a model with a long name": ("plan", "smoke", "--model", f"./{LONG}"),
    "a model that is a loop": ("plan", "smoke", "--model", f"./{LOOP}"),
    "runs in a loop": ("runs", "--runs-dir", LOOP),
    "a run in a loop": ("run", "smoke", "--runs-dir", f"{LOOP}/x"),
    "runs nowhere": ("runs", "--runs-dir", ""),
    "a run with a long name": ("show", f"./{LONG}"),
    "a deletion of one": ("rm", "-y", f"./{LONG}"),
    "an evaluation of one": ("eval", f"./{LONG}"),
    "a stop of a loop": ("stop", f"./{LOOP}"),
    "shards of nothing": ("plan", "smoke", "--set", "export.shard_gib=1e-300"),
}


@pytest.mark.parametrize("what", COMMANDS)
def test_a_name_that_no_file_can_have_is_one_line(eqat: Eqat, tmp_path: Path, what: str) -> None:
    loop = tmp_path / LOOP
    loop.symlink_to(LOOP)
    done = eqat(*COMMANDS[what])
    assert done.returncode in (2, 3, 4), done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: ")
    assert loop.is_symlink()


def test_a_text_with_a_name_too_long_for_a_file_is_only_a_name(eqat: Eqat) -> None:
    """With an owner it could be a hub's: the plan does not ask there."""
    done = eqat("plan", "smoke", "--data", f"owner/{LONG}")
    assert done.returncode == 0, done.stderr
    done = eqat("plan", "smoke", "--data", LONG)
    assert (done.returncode, done.stderr.count("\n")) == (4, 1), done.stderr
    assert "known names" in done.stderr
