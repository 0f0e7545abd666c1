"""Runs are compared where they can be; what differs is said, and nothing is crowned then."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import pytest

from engine.run import events
from engine.run.comparison import LETTERS, Compared
from engine.run.directory import RunDirectory
from eqat_tui.charts import Series
from eqat_tui.lines import plain, width_of
from eqat_tui.views.comparison import differences
from eqat_tui.widgets.chart_panel import BORDER, place_names

Recorded = Callable[[str], RunDirectory]
MARK = "◂"


def two(recorded: Recorded) -> list[Compared]:
    """A finished run, and one like it whose numbers are a little better."""
    run = recorded("finished")
    one, other = Compared(run, "A"), Compared(run, "B")
    better = {
        stage: msgspec.structs.replace(found, perplexity=(found.perplexity or 0) * 0.9)
        for stage, found in other.state.evaluations.items()
    }
    exports = {
        name: msgspec.structs.replace(made, bytes=made.bytes - 1, bits_per_weight=made.bits_per_weight / 2)
        for name, made in other.state.exports.items()
    }
    phases = tuple(
        msgspec.structs.replace(row, seconds=row.seconds and row.seconds / 2) for row in other.state.phases
    )
    other.state = msgspec.structs.replace(other.state, evaluations=better, exports=exports, phases=phases)
    return [one, other]


def rows(runs: Sequence[Compared], width: int = 100) -> list[str]:
    return [plain(row) for row in differences(runs, width)]


def crowned(lines: Sequence[str]) -> set[str]:
    """Names of the lines in which a number is marked."""
    return {line.split("  ")[0].strip() for line in lines if MARK in line}


QUALITY = {"perplexity, full precision", "round-to-nearest", "Block-AP", "E2E-QP"}


def test_runs_of_one_kind_have_winners(recorded: Recorded) -> None:
    lines = rows(two(recorded))
    assert crowned(lines) == {*QUALITY, "size", "bits per weight", "time"}
    assert not any("≠" in line for line in lines)


def evaluated(run: Compared, **changes: Any) -> None:
    found = {stage: msgspec.structs.replace(one, **changes) for stage, one in run.state.evaluations.items()}
    run.state = msgspec.structs.replace(run.state, evaluations=found)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"corpus": "wikitext2"}, "texts"),
        ({"tokens": 99}, "numbers of tokens"),
        ({"sequence_length": 512}, "contexts"),
    ],
)
def test_another_text_or_context_crowns_no_perplexity(
    changes: dict[str, Any], word: str, recorded: Recorded
) -> None:
    runs = two(recorded)
    evaluated(runs[1], **changes)
    lines = rows(runs)
    assert crowned(lines) == {"size", "bits per weight", "time"}
    said = " ".join(line for line in lines if line.strip())
    assert f"≠ Perplexity was measured with different {word}" in said
    assert all(str(value) in said for value in changes.values())


def test_another_model_crowns_nothing_at_all(recorded: Recorded) -> None:
    runs = two(recorded)
    runs[1].settings = {**runs[1].settings, "model.source": "somebody/Other-1B"}
    lines = rows(runs)
    assert crowned(lines) == set()
    said = " ".join(" ".join(lines).split())
    assert "different models (A tiny-llama, B Other-1B)" in said


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"device": "cpu"}, "different machines or devices"), ({"outcome": "stopped"}, "B is not finished")],
)
def test_another_device_or_an_end_too_early_crowns_no_time(
    changes: dict[str, Any], words: str, recorded: Recorded
) -> None:
    runs = two(recorded)
    runs[1].state = msgspec.structs.replace(runs[1].state, **changes)
    lines = rows(runs)
    assert crowned(lines) == {*QUALITY, "size", "bits per weight"}
    assert any(words in line for line in lines)


@pytest.mark.parametrize("width", [58, 78, 198])
def test_no_column_of_many_runs_is_cut_off(width: int, recorded: Recorded) -> None:
    run = recorded("finished")
    runs = [Compared(run, letter) for letter in LETTERS]
    lines = rows(runs, width)
    heads = [line.split() for line in lines if line.split() and set(line.split()) <= set(LETTERS)]
    assert [letter for head in heads for letter in head] == list(LETTERS)
    assert max(map(len, heads)) - min(map(len, heads)) <= max(map(len, heads)) // 2
    sizes = [line for line in lines if line.startswith("size ")]
    assert len(sizes) == len(heads)
    assert sum(line.count("MiB") for line in sizes) == len(LETTERS), "each number with its unit"
    assert all(width_of(row) <= width for row in differences(runs, width))


def test_a_run_that_measured_nothing_takes_no_others_mark_away(recorded: Recorded) -> None:
    runs = two(recorded)
    nothing: dict[str, events.Eval] = {}
    runs.append(Compared(recorded("stopped"), "C"))
    runs[2].state = msgspec.structs.replace(runs[2].state, evaluations=nothing)
    assert crowned(rows(runs)) >= QUALITY


# -- legends -------------------------------------------------------------------------------------------

TITLES = ("loss of block 13 (log)", "loss of E2E-QP (log)", "loss per block (log)", "memory, GiB", "x" * 70)
LINES = [Series("initial", []), Series("final", []), Series("valid.", []), Series("process", [])]


@pytest.mark.parametrize("title", TITLES)
@pytest.mark.parametrize("marks", [True, False])
def test_a_legend_is_never_cut(title: str, marks: bool) -> None:
    for width in range(20, 201):
        for count in (2, 3, 4):
            names, above = place_names(title, LINES[:count], width, marks=marks)
            said = plain(names) + "".join(map(plain, above))
            assert all(one.name in said for one in LINES[:count])
            assert not names or len(title) + width_of(names) <= width - BORDER
            assert all(width_of(row) <= width for row in above)
    assert place_names("loss", LINES[:2], 80, marks=marks)[1] == []
