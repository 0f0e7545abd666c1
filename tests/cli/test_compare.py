"""``eqat compare``: runs side by side, marked where their numbers are of one thing, and said where not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cli_tools import Eqat, story

from engine.config.derived import resolve
from engine.config.loading import load
from engine.config.overrides import apply_overrides
from engine.run import events
from engine.run.comparison import Compared, Difference, Row, differing_settings, results
from engine.run.directory import RunDirectory
from engine.run.event_log import EventWriter
from engine.run.measured import Asked, keep
from engine.run.measures import TaskScore
from engine.run.shown import show_run
from eqat_tui.compare_text import compare_text, compare_tree, sentences

MADE_FROM = {"model": "m" * 64, "evaluation text": "e" * 64}


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., RunDirectory]:
    """A finished run with other settings, digests and measurements than another one."""

    def make(
        better: float = 1.0, made_from: dict[str, str] | None = None, *, measured: Any = None, **settings: str
    ) -> RunDirectory:
        names = {name.replace("__", "."): value for name, value in settings.items()}
        run = RunDirectory.create(tmp_path / "runs", apply_overrides(resolve(load("smoke")), names))
        if made_from is not None:
            run.write_manifest({"identity": made_from})
        with EventWriter(run.events_path, 1) as writer:
            for event in story(run):
                if isinstance(event, events.Eval):
                    event = msgspec.structs.replace(
                        event, perplexity=(event.perplexity or 0) * better, **(measured or {})
                    )
                writer.emit(event)
        return run

    return make


def pair(one: RunDirectory, other: RunDirectory) -> list[Compared]:
    return [Compared(one, "A"), Compared(other, "B")]


def marked(runs: list[Compared]) -> set[str]:
    """Names of the rows in which a number is called the best."""
    return {row.name for row in results(runs, Difference(runs)) if row.best}


def test_two_runs_are_one_table_of_results_and_of_settings_that_differ(
    eqat: Eqat, made: Callable[..., RunDirectory]
) -> None:
    one, other = made(), made(0.9, grid__bits="3", name="another")
    shown = eqat("compare", one.id, other.id)
    assert shown.returncode == 0, shown.stderr
    lines = {line.split("  ")[0]: line for line in shown.stdout.splitlines()}
    assert lines["Block-AP"].split() == ["Block-AP", "23.67", "(1.3×)", "21.3", "(1.3×)", "◂"]
    assert lines["grid.bits"].split() == ["grid.bits", "4", "3"]
    assert [name for name in lines if "." in name and "-" not in name] == ["grid.bits"]  # labels do not count

    tree = json.loads(eqat("compare", one.id, other.id, "--json").stdout)
    assert [run["id"] for run in tree["runs"]] == [one.id, other.id]
    assert tree["settings"] == {"grid.bits": [4, 3]}
    (trained,) = [row for row in tree["results"] if (row["name"], row["stage"]) == ("perplexity", "block_ap")]
    assert trained["values"] == pytest.approx([23.67, 21.303])
    assert trained["comparable"]
    assert trained["best"] == ["B"]


def test_one_model_in_two_places_is_one_model_and_two_under_one_name_are_two(
    made: Callable[..., RunDirectory],
) -> None:
    moved = pair(made(), made(0.9))
    moved[1].settings = {**moved[1].settings, "model.source": "/elsewhere/tiny"}
    assert "perplexity" not in marked(moved)  # nothing but names to go by
    moved = pair(made(1, MADE_FROM), made(0.9, MADE_FROM))
    moved[1].settings = {**moved[1].settings, "model.source": "/elsewhere/tiny"}
    assert "perplexity" in marked(moved)
    changed = pair(made(1, MADE_FROM), made(0.9, {**MADE_FROM, "model": "n" * 64}))
    assert marked(changed) == set()
    assert "different models" in sentences(changed, Difference(changed))[0]


def test_blocks_imported_from_a_model_are_compared_with_those_that_were_trained_from_it(
    made: Callable[..., RunDirectory],
) -> None:
    runs = pair(made(1, MADE_FROM), made(0.9, {**MADE_FROM, "model": "q" * 64, "reference": "r" * 64}))
    runs[1].settings = {
        **runs[1].settings,
        "model.source": "/downloads/somebodys-gptq",
        "imported.reference": runs[0].settings["model.source"],
    }
    assert "perplexity" in marked(runs)
    runs[1].settings["imported.reference"] = "somebody/else"
    assert marked(runs) == set()


def test_another_text_under_the_same_name_crowns_no_perplexity(made: Callable[..., RunDirectory]) -> None:
    same = pair(made(1, MADE_FROM), made(0.9, MADE_FROM))
    assert "perplexity" in marked(same)
    other = pair(made(1, MADE_FROM), made(0.9, {**MADE_FROM, "evaluation text": "f" * 64}))
    assert not marked(other) & {"perplexity", "of_full_precision"}
    assert "different texts" in " ".join(sentences(other, Difference(other)))


def test_other_beginnings_of_sequences_crown_no_perplexity(made: Callable[..., RunDirectory]) -> None:
    begin = "each sequence begins with <s>"
    runs = pair(made(), made(0.9, measured={"begin": begin}))
    assert "perplexity" not in marked(runs)
    assert begin in compare_text(runs)


def test_accuracies_count_where_as_many_questions_were_asked_and_larger_ones_are_better(
    made: Callable[..., RunDirectory],
) -> None:
    def asked(right: float, questions: int) -> RunDirectory:
        return made(measured={"accuracy": {"piqa": right}, "questions": {"piqa": questions}})

    runs = pair(asked(0.6, 100), asked(0.7, 100))
    rows = [row for row in results(runs, Difference(runs)) if row.name == "accuracy"]
    assert {(row.stage, row.task, row.best) for row in rows} == {
        ("fp", "piqa", (1,)),
        ("block_ap", "piqa", (1,)),
    }
    assert "70.0 % ◂" in compare_text(runs)
    assert "accuracy" not in marked(pair(asked(0.6, 100), asked(0.7, 50)))


def test_scores_count_where_the_same_was_asked_and_what_was_asked_later_counts_too(
    made: Callable[..., RunDirectory],
) -> None:
    def score(value: float, **more: Any) -> TaskScore:
        known = {"task": "wikitext", "metric": "bits_per_byte", "better": "smaller", "questions": 9}
        return TaskScore(value=value, by="lm-eval 0.4.13", **{**known, **more})

    def asked(value: float, **more: Any) -> RunDirectory:
        return made(measured={"scores": (score(value, **more),)})

    def rows(runs: list[Compared]) -> list[Row]:
        return [row for row in results(runs, Difference(runs)) if row.name == "score" and row.stage == "fp"]

    runs = pair(asked(0.6), asked(0.7))
    (row,) = rows(runs)
    assert (row.task, row.values, row.best) == ("wikitext, bits_per_byte", (0.6, 0.7), (0,))
    assert "wikitext, bits_per_byte, full precision" in compare_text(runs)
    (row,) = rows(pair(asked(0.6), asked(0.7, questions=8)))
    assert row.best == ()
    one, other = asked(0.6), asked(0.6)
    later = [score(0.5), score(0.25, task="mmlu", metric="acc", better="larger", shots=5)]
    keep(other, [], [Asked(stage="fp", score=found) for found in later])
    found = {row.task: row for row in rows(pair(one, other))}
    assert found["wikitext, bits_per_byte"].values == (0.6, 0.5)
    assert found["mmlu 5-shot, acc"].values == (None, 0.25)
    names = [(one["task"], one["value"]) for one in show_run(other)["scores"]["fp"]]
    assert names == [("wikitext", 0.5), ("mmlu", 0.25)]


def test_a_damaged_run_is_an_empty_column_that_is_explained(made: Callable[..., RunDirectory]) -> None:
    one, other = made(), made()
    other.config_toml.write_text("grid = [")
    runs = pair(one, other)
    assert "Of B not all is known: its settings cannot be read" in compare_text(runs)
    assert compare_tree(runs)["runs"][1]["problem"]
    assert marked(runs) == set()  # of which model they are nobody knows
    assert differing_settings(runs)["grid.bits"] == [4, "?"]


@pytest.mark.parametrize("which", [(0,), (0, 0), (0, None)])
def test_what_cannot_be_compared_is_one_line(
    which: tuple[int | None, ...], eqat: Eqat, made: Callable[..., RunDirectory]
) -> None:
    run = made()
    done = eqat("compare", *(run.id if index is not None else "nothing-like-it" for index in which))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
