"""What text from the hub promises: its parts, its order, and mistakes in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from text_files import (
    DOCUMENTS,
    write_jsonl,
    write_parquet,
)

from engine.config.corpora import CORPORA, HubSource
from engine.config.data import DataConfig
from engine.data.hub import HubText, _interleave, _join_articles, hub_source
from engine.data.parts import PARTS, evaluation_text, held_out_bucket
from engine.errors import DataError

# `datasets` reads a folder exactly as it reads a repository, so these run the whole path but the network.


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    for split, texts in {"train": DOCUMENTS, "test": ["judged one", "judged two"]}.items():
        write_jsonl(tmp_path / "repo" / f"{split}.jsonl", texts)
    return tmp_path / "repo"


def test_hub_rows_of_own_split_come_in_order_and_training_is_shuffled_by_seed(repository: Path) -> None:
    text = HubText(HubSource(repo=str(repository)), corpus="c")
    assert list(text.documents("evaluation")) == ["judged one", "judged two"]
    one, again, other = (list(text.documents("train", seed)) for seed in (1, 1, 2))
    assert one == again != other
    assert sorted(one) == sorted(other)


def test_hub_data_without_validation_split_holds_documents_out_by_content(repository: Path) -> None:
    text = HubText(HubSource(repo=str(repository)), corpus="c")
    train, validation = set(text.documents("train", 1)), set(text.documents("validation", 2))
    assert train | validation == set(DOCUMENTS)
    assert not train & validation
    assert validation == {doc for doc in DOCUMENTS if held_out_bucket(doc) < 10}


def test_explicit_split_is_used_for_every_part(repository: Path) -> None:
    text = HubText(HubSource(repo=str(repository), split="train"), corpus="c")
    assert list(text.documents("evaluation")) == DOCUMENTS
    assert not set(text.documents("train")) & set(text.documents("validation"))


def test_hub_data_with_a_train_split_only_keeps_three_parts_apart(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "repo" / "train.jsonl", DOCUMENTS * 5)
    text = HubText(HubSource(repo=str(tmp_path / "repo")), corpus="c")
    parts = [set(text.documents(part)) for part in PARTS]
    assert set.union(*parts) == set(DOCUMENTS)
    assert sum(map(len, parts)) == len(DOCUMENTS)


def test_hub_mistakes_are_data_errors(repository: Path) -> None:
    def message(source: HubSource) -> str:
        with pytest.raises(DataError) as caught:
            list(HubText(source, corpus="c").documents("evaluation"))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    repo = str(repository)
    assert "set data.column to one of: text" in message(HubSource(repo=repo, column="content"))
    assert "cannot be read from the hub" in message(HubSource(repo=repo, split="nosuch"))
    assert "cannot be read from the hub" in message(HubSource(repo=repo, subset="nosuch"))


def test_rows_of_the_hub_without_text_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [*DOCUMENTS, None, None]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    text = HubText(HubSource(repo=str(tmp_path), split="test"), corpus="c")
    assert list(text.documents("evaluation")) == DOCUMENTS
    (line,) = text.skipped()
    assert f"c: 2 of {len(rows)} rows had no text" in line
    (tmp_path / "test.jsonl").write_text('{"text": {"en": "x"}, "n": 1}\n' * 3)
    nested = HubText(HubSource(repo=str(tmp_path), split="test", column="text.en"), corpus="c")
    assert list(nested.documents("evaluation")) == ["x"] * 3
    with pytest.raises(DataError, match=r"a table, not text") as refused:
        list(HubText(HubSource(repo=str(tmp_path), split="test"), corpus="c").documents("evaluation"))
    assert refused.value.hint == "set data.column to one of: text.en"


@pytest.mark.parametrize(
    ("source", "begins", "says"),
    [
        ("c4", "4 allenai/c4 (en): cannot be read from the hub", "builtin"),
        ("a/missing", "4 a/missing: cannot be read from the hub", "no file or folder a/missing lies here"),
    ],
    ids=["c4", "a-missing"],
)
def test_offline_hub_id_says_what_works_without_a_network(source: str, begins: str, says: str) -> None:
    code = (
        "import sys\n"
        "from engine.data.text import open_source\n"
        "from engine.config.data import DataConfig\n"
        "from engine.errors import DataError\n"
        "try:\n"
        "    next(open_source(DataConfig(source=sys.argv[1])).documents('train'))\n"
        "except DataError as error:\n"
        "    print(int(error.exit_code), error)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, source],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stdout.startswith(begins)
    assert says in done.stdout
    assert done.stdout.count("\n") == 1


@given(st.lists(st.sampled_from(["", " = T = \n", " = = S = = \n", " text \n"]), max_size=12))
def test_articles_joined_again_are_the_rows_joined(rows: list[str]) -> None:
    assert evaluation_text(_join_articles(iter(rows))) == evaluation_text(rows)


def test_wikitext_rows_become_articles_and_evaluate_as_published(shared_data: Path, tmp_path: Path) -> None:
    lines = (shared_data / "wikitext-2" / "wiki.test.raw").read_text().split("\n")[:-1]
    rows = ["" if line == " " else line + "\n" for line in lines]
    write_parquet(tmp_path / "test.parquet", rows)
    source = HubSource(repo=str(tmp_path), splits={"train": "test", "evaluation": "test"}, articles=True)
    text = HubText(source, corpus="wikitext2")
    assert evaluation_text(text.documents("evaluation")) == "\n\n".join(rows)
    articles = list(text.documents("evaluation"))
    assert 50 < len(articles) < 70  # the test part of WikiText-2 has 60-odd articles
    assert all(article.strip().startswith("= ") for article in articles)


def test_interleaved_files_are_drawn_by_weight_and_lose_nothing() -> None:
    streams = {"a": 900, "b": 90, "c": 10}
    rows = list(_interleave([iter([name] * count) for name, count in streams.items()], [900, 90, 10], seed=3))
    assert {name: rows.count(name) for name in streams} == streams
    assert 60 < rows[:800].count("b") < 90  # spread over the stream, not appended to it


def test_shortcuts_are_complete_and_configurable() -> None:
    assert set(CORPORA) == {"redpajama", "c4", "wikitext2", "slimpajama", "fineweb-edu"}
    wikitext = hub_source(DataConfig(source="wikitext2", split="test", column="page", revision="abc"))
    assert (wikitext.repo, wikitext.subset) == ("Salesforce/wikitext", "wikitext-2-raw-v1")
    assert (wikitext.split, wikitext.column, wikitext.revision) == ("test", "page", "abc")
    by_id = hub_source(DataConfig(source="allenai/C4", subset="de"))
    assert (by_id.repo, by_id.subset, by_id.splits) == ("allenai/c4", "de", {})
    assert hub_source(DataConfig(source="someone/text")).repo == "someone/text"
