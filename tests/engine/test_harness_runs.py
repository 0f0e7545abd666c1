"""Runs that ask tasks of lm-eval: every version of the model is asked, and its numbers are shown."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from engine_runs import run_here

from engine.run.directory import RunDirectory
from engine.run.shown import show_run

pytest.importorskip("lm_eval", reason="lm-eval is an extra: pip install 'eqat[tasks]'")

sys.path.insert(0, str(Path(__file__).parents[1] / "evaluation"))
from harness_tasks import write_tasks

Make = Callable[..., RunDirectory]


def test_every_version_is_asked_and_more_can_be_asked_later(make: Make, tmp_path: Path) -> None:
    folder = write_tasks(tmp_path / "tasks", questions=4)
    asked = {"evaluation.tasks": "letters:1,written", "evaluation.task_folder": str(folder)}
    run = make(**asked)
    assert run_here(run) == 0
    shown = show_run(run)
    stages = [stage for stage, value in shown["perplexity"].items() if value is not None]
    assert list(shown["scores"]) == stages
    expected = [("letters", "acc", 1, 4), ("letters", "acc_norm", 1, 4), ("written", "bleu (whole)", 0, 4)]
    for found in shown["scores"].values():
        assert [(one["task"], one["metric"], one["shots"], one["questions"]) for one in found] == expected
    card = (run.export_dir / "gptq_v2" / "README.md").read_text()
    assert "## Tasks, asked by lm-eval" in card
    assert "letters 1-shot, acc_norm" in card

    own = tmp_path / "mine.jsonl"
    own.write_text('{"query": "a", "choices": ["b", "c"], "gold": 0}\n')
    later = ("--ask", "whole", "--ask", str(own), "--task-folder", str(folder))
    assert run_here(run, "--task", "eval", *later) == 0
    scores = show_run(run)["scores"]
    newest = [one["task"] for one in scores[stages[-1]]]
    assert newest == ["letters", "letters", "written", "mine", "whole", "whole"]
    assert show_run(run)["measured"] == []  # no text was asked for
    assert scores[stages[0]] == shown["scores"][stages[0]]
    assert run_here(run, "--task", "eval", "--ask", "bad name") == 2
