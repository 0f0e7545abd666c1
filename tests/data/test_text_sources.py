"""The built-in corpus, and the names of corpora: which text is meant, wherever it comes from."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from text_files import (
    documents,
    write_jsonl,
)

from engine.config.corpora import CORPORA, corpus_name, origin
from engine.config.data import DataConfig
from engine.config.field_docs import field_help
from engine.data.builtin import _split_topics
from engine.data.local import LocalText
from engine.data.parts import PARTS
from engine.data.text import open_source


def test_builtin_parts_share_no_paragraph_and_have_their_shares() -> None:
    texts = {part: list(documents(DataConfig(), part)) for part in PARTS}
    paragraphs = {
        part: {" ".join(p.split()) for text in texts[part] for p in text.split("\n\n") if len(p) >= 100}
        for part in PARTS
    }
    for one, other in itertools.combinations(PARTS, 2):
        assert not paragraphs[one] & paragraphs[other]
    sizes = {part: sum(map(len, texts[part])) for part in PARTS}
    total = sum(sizes.values())
    assert total > 200_000
    assert sizes["validation"] / total == pytest.approx(0.10, abs=0.03)
    assert sizes["evaluation"] / total == pytest.approx(0.15, abs=0.03)


def test_builtin_is_the_same_every_time_and_needs_no_split() -> None:
    assert list(documents(DataConfig(split="test"), "train")) == list(documents(DataConfig(), "train"))
    identities = [json.dumps(open_source(DataConfig()).identity(part)) for part in PARTS]
    assert len(set(identities)) == 3


@given(
    st.dictionaries(
        st.text("abcdef", min_size=1, max_size=4),
        st.lists(st.sampled_from([letter * 70 for letter in "uvwxyz"] + ["short"]), max_size=4),
        max_size=12,
    )
)
def test_topics_of_any_python_are_split_without_sharing_paragraphs(topics: dict[str, list[str]]) -> None:
    parts = _split_topics({name: "\n\n".join(paragraphs) for name, paragraphs in topics.items()})
    assert sum(map(len, parts.values())) == len(topics)
    long = [{p for text in texts for p in text.split() if len(p) == 70} for texts in parts.values()]
    assert set.union(*long) == {p for ps in topics.values() for p in ps if len(p) == 70}
    assert sum(map(len, long)) == len(set.union(*long))


# --- names --------------------------------------------------------------------------------------------


def test_one_corpus_has_one_name_wherever_it_comes_from(tmp_path: Path) -> None:
    (tmp_path / "wiki.train.raw.txt").write_text("x")
    write_jsonl(tmp_path / "c4_demo.jsonl", ["x"])
    write_jsonl(tmp_path / "mine.jsonl", ["x"])
    names = {
        source: corpus_name(DataConfig(source=source))
        for source in ("builtin", "wikitext2", "Salesforce/wikitext", "c4", "allenai/c4", "me/other")
    }
    assert names["wikitext2"] == names["Salesforce/wikitext"] == "wikitext2"
    assert names["c4"] == names["allenai/c4"] == "c4"
    assert names["me/other"] == "me/other"
    assert corpus_name(DataConfig(source=str(tmp_path / "wiki.train.raw.txt"))) == "wikitext2"
    assert corpus_name(DataConfig(source=str(tmp_path / "c4_demo.jsonl"))) == "c4"
    mine = tmp_path / "mine.jsonl"
    assert corpus_name(DataConfig(source=str(mine))) == str(mine.resolve())
    assert LocalText(mine, column=None, split=None, corpus="x").corpus == "x"


def test_text_sources_load_without_torch_or_datasets() -> None:
    code = (
        "import sys\n"
        "from engine.data.text import open_source\n"
        "from engine.config.data import DataConfig\n"
        "next(open_source(DataConfig()).documents('train'))\n"
        "assert not {'torch', 'datasets', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True, timeout=60)


def test_every_row_of_the_table_names_itself_by_every_way_to_it(tmp_path: Path) -> None:
    for name, known in CORPORA.items():
        file = tmp_path / f"{name}.jsonl"
        file.write_text("x")
        sources = [name, known.source.repo, known.source.repo.upper(), str(file)]
        assert [corpus_name(DataConfig(source=source)) for source in sources] == [name] * len(sources)
        assert [origin(DataConfig(source=source)) for source in (*sources, *known.copies)] == [name] * (
            len(sources) + len(known.copies)
        )


def test_the_fields_text_names_every_corpus_that_it_takes() -> None:
    text = field_help()["data.source"]
    assert [name for name in ("builtin", *CORPORA) if name not in text] == []


def test_a_copy_on_the_hub_keeps_its_own_name_in_identities() -> None:
    source = open_source(DataConfig(source="cerebras/SlimPajama-627B", split="train"))
    assert source.identity("train")["corpus"] == "cerebras/SlimPajama-627B"
    assert origin(DataConfig(source="cerebras/SlimPajama-627B")) == "slimpajama"
