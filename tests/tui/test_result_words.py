"""What the result says in words, without a screen."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
from app_tools import view_of

from engine.run.comparison import Compared, Difference, results
from engine.run.directory import RunDirectory
from engine.run.shown import show_run
from eqat_tui.compare_text import row_name, row_values
from eqat_tui.report.sections import run_section
from eqat_tui.run_text import report, title
from eqat_tui.views.result import perplexities, unfit_formats

Recorded = Callable[[str], RunDirectory]


def test_zero_shot_tasks_stand_below_the_perplexities(recorded: Recorded) -> None:
    run = recorded("finished")
    view = view_of(run, "done")
    asked = {"fp": {"piqa": 0.684, "arc_easy": 0.5}, "e2e_qp": {"piqa": 0.61}}
    evaluations = {
        stage: msgspec.structs.replace(
            found, accuracy=asked.get(stage, {}), questions={"piqa": 1838} if stage in asked else {}
        )
        for stage, found in view.state.evaluations.items()
    }
    state = msgspec.structs.replace(view.state, evaluations=evaluations)
    shown = ["".join(text for text, _ in line).split() for line in perplexities(state, 78)]
    first = next(index for index, words in enumerate(shown) if words[:1] == ["accuracy,"])
    assert shown[first] == ["accuracy,", "%", "full", "precision", "E2E-QP"]
    assert shown[first + 1 : first + 4] == [
        ["piqa", "68.4", "61.0"],
        ["arc_easy", "50.0", "–"],
        ["mean", "59.2", "61.0"],
    ]
    assert " ".join(shown[first + 4]) == "questions: 1,838 of piqa"


def test_answer_perplexity_is_told_wherever_perplexity_is(recorded: Recorded) -> None:
    run = recorded("finished")
    view = view_of(run, "done")
    measured = {"fp": 5.05, "block_ap": 9.37, "e2e_qp": None}
    evaluations = {
        stage: msgspec.structs.replace(found, answer_perplexity=measured[stage], answer_tokens=2898)
        if stage in measured
        else found
        for stage, found in view.state.evaluations.items()
    }
    state = msgspec.structs.replace(view.state, evaluations=evaluations)
    screen = ["".join(text for text, _ in line).split() for line in perplexities(state, 78)]
    first = screen.index(["answer", "perplexity"])
    assert screen[first + 1 : first + 4] == [
        ["full", "precision", "5.05"],
        ["Block-AP", "9.37"],
        ["E2E-QP", "not", "finite"],
    ]
    shown = {**show_run(run), "answer_perplexity": state.answer_perplexity()}
    text = report(shown)
    assert "answer perplexity" in text
    assert "1.86×" in text
    assert "answer perplexity" in str(run_section(run, shown, state))
    runs = [Compared(run, "A"), Compared(run, "B")]
    for one in runs:
        one.state = state
    (row,) = [
        row for row in results(runs, Difference(runs)) if (row.name, row.stage) == ("answer_perplexity", "fp")
    ]
    assert row_name(row) == "answer perplexity, full precision"
    assert row_values(row) == ["5.05", "5.05"]
    assert row.comparable


def test_formats_that_hold_no_quantized_head_are_not_offered_for_one() -> None:
    grid = {"bits": 4, "group_size": 64, "symmetric": False}
    plain, quantized = (unfit_formats({"grid": {**grid, **head}}) for head in ({}, {"head_bits": 8}))
    assert not {"gptq_v2", "gguf", "mlx", "hf"} & plain.keys()
    assert not {"gguf", "mlx", "hf"} & quantized.keys()
    assert quantized["gptq_v2"] == "cannot hold an embedding and a head of 8 bits (grid.head_bits)"


def test_the_title_of_a_report_says_that_the_head_is_quantized_too() -> None:
    grid = {"bits": 4, "group_size": 64}
    tree = {"id": "a-run", "state": "done", "config": {"model": {"source": "org/name"}, "grid": grid}}
    assert "at 4 bits, groups of 64 · done" in title(tree)
    grid["head_bits"] = 8
    assert "at 4 bits, groups of 64, embedding and head at 8 · done" in title(tree)
