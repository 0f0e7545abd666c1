"""Rows of the usual data sets are read as conversations, and what is none is counted or refused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from engine.config.data import DataConfig
from engine.data import instructions
from engine.data.conversations import Turn, Unusable, conversation_of, question
from engine.data.instructions import Instructions, route
from engine.data.parts import PARTS, Part
from engine.errors import DataError

ASKED, SAID = Turn("user", "Name a colour."), Turn("assistant", "Blue.")
OPENAI = [{"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Blue."}]
SHAREGPT = [{"from": "human", "value": "Name a colour."}, {"from": "gpt", "value": "Blue."}]
PARTED = [{"type": "text", "text": "Blue."}]
SYSTEM = Turn("system", "Be brief.")


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        ({"messages": OPENAI}, (ASKED, SAID)),
        ({"conversations": SHAREGPT}, (ASKED, SAID)),
        ({"conversations": OPENAI, "id": 7}, (ASKED, SAID)),
        ({"messages": [{"role": "system", "content": "Be brief."}, *OPENAI]}, (SYSTEM, ASKED, SAID)),
        ({"messages": [*OPENAI, {"role": "user", "content": "And?"}]}, (ASKED, SAID)),
        ({"messages": [OPENAI[0], {**OPENAI[1], "content": PARTED}]}, (ASKED, SAID)),
        ({"instruction": "Name a colour.", "input": "", "output": "Blue.", "text": "…"}, (ASKED, SAID)),
        ({"instruction": "Add.", "input": "1, 2", "output": "Blue."}, (Turn("user", "Add.", "1, 2"), SAID)),
        ({"instruction": "Name a colour.", "output": "Blue.", "system": "Be brief."}, (SYSTEM, ASKED, SAID)),
        (
            {"instruction": "And?", "output": "Red.", "history": [["Name a colour.", "Blue."]]},
            (ASKED, SAID, Turn("user", "And?"), Turn("assistant", "Red.")),
        ),
        ({"prompt": "Name a colour.", "response": "Blue."}, (ASKED, SAID)),
        ({"prompt": "Name a colour.", "completion": "Blue."}, (ASKED, SAID)),
        ({"question": "Name a colour.", "answer": "Blue."}, (ASKED, SAID)),
    ],
)
def test_a_form_is_told_by_its_columns(row: dict[str, Any], turns: tuple[Turn, ...]) -> None:
    assert conversation_of(row) == turns


def test_an_answer_of_weight_0_is_only_read() -> None:
    row = {"messages": [OPENAI[0], {**OPENAI[1], "weight": 0}, *OPENAI]}
    assert [turn.learned for turn in conversation_of(row)] == [True, False, True, True]
    with pytest.raises(Unusable, match="has no answer"):
        conversation_of({"messages": [OPENAI[0], {**OPENAI[1], "weight": 0}]})


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"text": "once", "title": "x"}, "has the columns text, title"),
        ({"messages": OPENAI[:1]}, "has no answer"),
        ({"messages": []}, "has no answer"),
        ({"messages": None}, "has no answer"),
        ({"messages": "hello"}, "holds text that is not made of turns"),
        ({"messages": [1, 2]}, "holds a list that is not made of turns"),
        (
            {"messages": [{"role": "tool", "content": "4"}, *OPENAI]},
            "a turn of tool, which is none of system",
        ),
        ({"messages": [OPENAI[1]]}, "begins with an answer"),
        ({"messages": [OPENAI[0], {"role": "assistant", "content": None}]}, "holds nothing"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, OPENAI[1]]}, "more than text"),
        ({"instruction": "Name a colour.", "output": ""}, "has no answer"),
        ({"instruction": "Name a colour.", "output": None}, "has no answer"),
        ({"instruction": "", "input": "", "output": "Blue."}, "column 'instruction' is empty"),
        ({"instruction": 7, "output": "Blue."}, "holds a number, not text"),
        ({"prompt": "a", "response": "\ud800"}, "half a character"),
        ({"instruction": "a", "output": "b", "history": ["c"]}, "not a list of pairs"),
        ([1], "not a JSON object"),
    ],
)
def test_what_is_no_conversation_says_why(row: Any, why: str) -> None:
    with pytest.raises(Unusable, match=why):
        conversation_of(row)


def written(folder: Path, rows: list[Any], name: str = "some.jsonl") -> str:
    folder.mkdir(exist_ok=True)
    if name.endswith(".parquet"):
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / name)
    else:
        (folder / name).write_text("\n".join(map(json.dumps, rows)))
    return str(folder / name)


def rows(count: int, *, of: str = "q") -> list[dict[str, str]]:
    return [{"instruction": f"{of} {n}", "input": "", "output": f"answer {n}"} for n in range(count)]


def asked(source: str, part: Part, **options: Any) -> list[str]:
    found = Instructions(DataConfig(source=source, **options)).conversations(part, seed=1)
    return [conversation[0].text for conversation in found]


@pytest.mark.parametrize("name", ["some.jsonl", "some.json", "some.parquet"])
def test_no_question_is_in_two_parts_and_each_in_one(tmp_path: Path, name: str) -> None:
    source = written(tmp_path, [*rows(300), *rows(300)], name)
    parts = {part: asked(source, part) for part in PARTS}
    assert [len(parts[part]) > 20 for part in PARTS] == [True] * 3
    assert set(Counter(text for texts in parts.values() for text in texts).values()) == {2}
    for one, other in (("train", "validation"), ("train", "evaluation"), ("validation", "evaluation")):
        assert not set(parts[one]) & set(parts[other])
    assert parts["train"] != sorted(parts["train"], key=lambda text: int(text.split()[1])), "shuffled"


def test_parts_that_a_folder_brings_are_taken_as_they_are(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    written(folder, rows(200, of="train"), "train.jsonl")
    written(folder, rows(20, of="test"), "test.jsonl")
    assert sorted(asked(str(folder), "evaluation")) == sorted(f"test {n}" for n in range(20))
    learned, validated = asked(str(folder), "train"), asked(str(folder), "validation")
    assert sorted([*learned, *validated]) == sorted(f"train {n}" for n in range(200))
    assert validated
    assert all(text.startswith("test") for text in asked(str(folder), "train", split="test"))


def test_what_a_source_has_apart_is_not_held_out_of_what_is_trained_on() -> None:
    assert route("train", ()) == ("train", set(range(20, 100)))
    assert route("train", ("evaluation",)) == ("train", set(range(10, 100)))
    assert route("evaluation", ("evaluation",)) == ("evaluation", range(100))
    assert route("evaluation", ("validation",)) == ("train", range(10, 20))


def test_rows_without_an_answer_are_counted_and_told(tmp_path: Path) -> None:
    wrong = [
        {"instruction": "?", "output": ""},
        {"instruction": "?", "output": ""},
        {"instruction": 1, "output": ""},
    ]
    source = Instructions(DataConfig(source=written(tmp_path, [*rows(40), *wrong])))
    list(source.conversations("train"))
    (line,) = source.skipped()
    assert "3 of 43 rows are no conversations (2 without an answer)" in line
    assert "has no answer (" in line
    assert line.endswith(".jsonl:41)")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([{"text": "once upon a time"}], "has the columns text.*understood are rows with messages"),
        ([*rows(2), *[{"text": "x"}] * 3], "3 of 5 rows are no conversations; the first"),
        ([], "no row"),
    ],
)
def test_a_file_of_another_form_is_refused_with_what_it_has(
    tmp_path: Path, content: list[Any], says: str
) -> None:
    with pytest.raises(DataError, match=says) as caught:
        asked(written(tmp_path, content), "train")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("./none.jsonl", "no such file"),
        ("nonsense", "neither a file nor a hub id"),
        ("{tmp}/plain.txt", "is plain text"),
    ],
)
def test_a_source_that_is_none_is_refused(tmp_path: Path, source: str, says: str) -> None:
    (tmp_path / "plain.txt").write_text("once")
    with pytest.raises(DataError, match=says):
        asked(source.format(tmp=tmp_path), "train")


def test_the_question_is_what_precedes_the_first_answer() -> None:
    first = conversation_of({"messages": [*OPENAI, *OPENAI]})
    other = conversation_of({"messages": [OPENAI[0], {"role": "assistant", "content": "Red."}]})
    assert question(first) == question(other) == "user:Name a colour."


def test_a_hub_set_is_read_split_by_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` reads a folder as it reads a repository: the whole path but the network."""
    written(tmp_path / "repo", rows(150, of="train"), "train.jsonl")
    written(tmp_path / "repo", rows(20, of="test"), "test.jsonl")
    monkeypatch.setattr(instructions, "_opened", instructions._Hub)
    source = str(tmp_path / "repo")
    assert set(asked(source, "evaluation")) == {f"test {n}" for n in range(20)}
    learned, validated = asked(source, "train"), asked(source, "validation")
    assert set(learned) | set(validated) == {f"train {n}" for n in range(150)}
    assert not set(learned) & set(validated)
    assert learned != sorted(learned, key=lambda text: int(text.split()[1])), "shuffled"
    only = {part: set(asked(source, part, split="train")) for part in PARTS}
    assert not only["train"] & only["evaluation"]
    assert not only["validation"] & only["evaluation"]


def test_what_was_read_from_the_hub_is_found_again_without_it(tmp_path: Path) -> None:
    named = Instructions(DataConfig(source="owner/nowhere", revision="v1"))
    assert named.identity("train")["revision"] == "v1"
    assert named.identity("train") != named.identity("evaluation")


def test_a_hub_set_of_another_form_is_refused_at_its_first_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path / "repo", [{"text": "once"}] * 3, "train.jsonl")
    monkeypatch.setattr(instructions, "_opened", instructions._Hub)
    with pytest.raises(DataError, match="has the columns text"):
        asked(str(tmp_path / "repo"), "train")
