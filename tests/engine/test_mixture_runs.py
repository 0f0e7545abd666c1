"""A run that learns from a mixture of texts: what it says of it, and how it goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
from engine_runs import change, exported, failure, of, run_here

from engine.plan.plan import make_plan
from engine.run import events, generations
from engine.run.directory import RunDirectory
from engine.run.shown import show_run
from engine.run.state import load_state
from eqat_tui.plan_text import plan_text
from eqat_tui.run_text import report
from eqat_tui.views.result import perplexities

Make = Callable[..., RunDirectory]


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    rows = [json.dumps({"body": f"note {n} of many; " * 20}) for n in range(200)]
    (tmp_path / "notes.jsonl").write_text("\n".join(rows))
    return tmp_path / "notes.jsonl"


def from_before(run: RunDirectory) -> None:
    """Make the run one of a version that knew no mixtures."""
    place = run.checkpoints_dir
    found = generations.read_generation(place, generations.newest(place))
    identity = {name: value for name, value in found.identity.items() if name != "data.mix"}
    assert len(identity) == len(found.identity) - 1
    older = replace(found, number=found.number + 1, identity=identity)
    older.entries = {name: value for name, value in found.entries.items() if name == "block-000"}
    older.facts = {name: value for name, value in found.facts.items() if name in ("eval_fp", "eval_rtn")}
    for path in place.glob("generation-*"):
        path.unlink()
    generations.publish(place, older)


def test_a_mixture_is_said_by_plan_report_manifest_and_card(make: Make, notes: Path) -> None:
    run = make(**{"data.mix": f"{notes}?column=body:0.75,builtin:0.25"})
    assert run_here(run) == 0
    words = f"75 % {notes} (column body), 25 % builtin"
    plan = make_plan(run.config()).to_dict()
    assert plan["calibration"] == words
    assert words in plan_text(plan)
    assert any(w.startswith("25 % of calibration and evaluation both use builtin") for w in plan["warnings"])
    assert show_run(run)["calibration"] == words
    assert words in report(show_run(run))
    assert (run.manifest() or {})["data"]["calibration"] == words
    assert f"- trained on {words}" in (run.export_dir / "gptq_v2" / "README.md").read_text()

    # Another mixture is another text.
    change(run, **{"data.mix": f"{notes}?column=body:0.5,builtin:0.5"})
    assert run_here(run) == 8
    assert failure(run, 8).where == "data.mix"


def test_a_checkpoint_from_before_mixtures_goes_on_to_the_same_bytes(make: Make) -> None:
    run = make()
    assert run_here(run) == 0
    whole = exported(run)
    assert "mix" not in run.config_toml.read_text()
    assert "trained on" not in (run.export_dir / "gptq_v2" / "README.md").read_text()
    from_before(run)
    assert run_here(run) == 0
    assert exported(run) == whole
    change(run, **{"data.mix": "builtin:1"})
    assert run_here(run) == 8
    assert failure(run, 8).where == "data.mix"


def test_a_version_that_beats_full_precision_is_doubted_by_run_report_and_card(
    make: Make, tmp_path: Path
) -> None:
    # Full precision is a random model, which training on text can only improve: what it is measured on is
    # wrong, and every place that shows the perplexities says so.
    model = str(tiny.build(tmp_path / "model", "llama2"))
    learns = {"e2e_qp.lr": 0.01, "e2e_qp.loss": "cross_entropy", "e2e_qp.epochs": 3, "evaluation.windows": 96}
    run = make(**{"model.source": model, "grid.group_size": 32, **learns})
    assert run_here(run) == 0
    said = [e.message for e in of(run, events.Warning) if e.code == events.MEASUREMENT]
    figures = show_run(run)["perplexity"]
    assert figures["e2e_qp"] < 0.95 * figures["fp"]
    assert said[-1].startswith("E2E-QP is better than full precision (")
    assert said[-1] in report(show_run(run))
    assert "model.bos" in report(show_run(run))
    shown = "".join(text for words in perplexities(load_state(run), 400) for text, _ in words)
    assert said[-1] in shown
    assert said[-1] in (run.export_dir / "gptq_v2" / "README.md").read_text()
