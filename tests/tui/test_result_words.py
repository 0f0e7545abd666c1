"""What the result says in words, without a screen."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
from app_tools import view_of

from engine.run.directory import RunDirectory
from eqat_tui.run_text import title
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
