"""What the result says in words, without a screen."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
from app_tools import view_of

from engine.run.directory import RunDirectory
from eqat_tui.views.result import perplexities

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
