"""What each source of text promises: disjoint parts, everything readable, errors that say what to do."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config.data import DataConfig
from engine.data import local
from engine.data.hub import SHORTCUTS, HubSource, HubText, _interleave, _join_articles, hub_source
from engine.data.local import LocalText, _split_by_position
from engine.data.text import (
    PARTS,
    _split_topics,
    corpus_name,
    documents,
    evaluation_text,
    held_out_bucket,
    open_source,
)
from engine.errors import DataError, ExitCode

DOCUMENTS = [f"Document {n} speaks.\n" + f"Line {n} of it.\n" * 20 for n in range(40)]


def text_of(path: Path, part: str = "evaluation", **fields: str) -> list[str]:
    return list(documents(DataConfig(source=str(path), **fields), part))


def write_jsonl(path: Path, texts: list[str], column: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"id": n, column: text}) + "\n" for n, text in enumerate(texts)))
    return path


def write_jsonl_gz(path: Path, texts: list[str]) -> None:
    path.write_bytes(gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in texts).encode()))


def write_jsonl_zst(path: Path, texts: list[str]) -> None:
    raw = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    with pa.CompressedOutputStream(str(path), "zstd") as stream:
        stream.write(raw)


def write_parquet(path: Path, texts: list[str]) -> None:
    pq.write_table(pa.table({"n": list(range(len(texts))), "text": texts}), path)


def write_arrow_stream(path: Path, texts: list[str]) -> None:
    table = pa.table({"text": texts})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)


def write_arrow_file(path: Path, texts: list[str]) -> None:
    table = pa.table({"text": texts})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)


# --- the built-in corpus ------------------------------------------------------------------------------


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


# --- local files --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.jsonl", write_jsonl),
        ("a.jsonl.gz", write_jsonl_gz),
        ("a.jsonl.zst", write_jsonl_zst),
        ("a.parquet", write_parquet),
        ("stream.arrow", write_arrow_stream),
        ("file.arrow", write_arrow_file),
    ],
)
def test_every_format_gives_the_same_documents(
    tmp_path: Path, name: str, write: Callable[[Path, list[str]], None]
) -> None:
    write(tmp_path / name, DOCUMENTS)
    assert text_of(tmp_path / name) == DOCUMENTS
    assert text_of(tmp_path) == DOCUMENTS


def test_text_file_is_one_document_read_as_it_is(tmp_path: Path) -> None:
    raw = " = Title = \r\n \n Text with ünïcode \n"
    (tmp_path / "wiki.test.raw.txt").write_bytes(raw.encode())
    assert text_of(tmp_path / "wiki.test.raw.txt") == [raw]
    with gzip.open(tmp_path / "b.txt.gz", "wb") as file:
        file.write(raw.encode())
    assert text_of(tmp_path / "b.txt.gz") == [raw]


def test_folder_is_read_in_path_order_without_hidden_or_cached_files(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "b" / "1.jsonl", ["third"])
    write_jsonl(tmp_path / "a" / "2.jsonl", ["second"])
    (tmp_path / "a" / "1.txt").write_text("first")
    write_jsonl(tmp_path / ".git" / "x.jsonl", ["hidden"])
    write_arrow_stream(tmp_path / "cache-17.arrow", ["cached"])
    (tmp_path / "README.md").write_text("not data")
    assert text_of(tmp_path) == ["first", "second", "third"]


def test_folder_with_named_splits_brings_its_own_parts(tmp_path: Path) -> None:
    for part in ("train", "validation", "test"):
        write_jsonl(tmp_path / part / "data-00000.jsonl", [f"{part} text"])
    assert text_of(tmp_path, "train") == ["train text"]
    assert text_of(tmp_path, "validation") == ["validation text"]
    assert text_of(tmp_path, "evaluation") == ["test text"]
    assert text_of(tmp_path, "evaluation", split="train") == ["train text"]


def test_folder_with_test_split_only_holds_validation_out_of_train(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train-0.jsonl", DOCUMENTS)
    write_jsonl(tmp_path / "test-0.jsonl", ["judged"])
    train, validation = text_of(tmp_path, "train"), text_of(tmp_path, "validation")
    assert "".join(train + validation) == "".join(DOCUMENTS)
    assert text_of(tmp_path) == ["judged"]


@given(st.lists(st.text("ab \n", min_size=1, max_size=60), min_size=1, max_size=8))
def test_split_by_position_loses_nothing_and_shares_nothing(texts: list[str]) -> None:
    head = "".join(_split_by_position(texts, "train"))
    tail = "".join(_split_by_position(texts, "validation"))
    assert "".join((head + tail).split()) == "".join("".join(texts).split())


def test_validation_is_the_last_tenth_cut_at_a_line(tmp_path: Path) -> None:
    text = "".join(f"line {n} of the file\n" for n in range(1000))
    (tmp_path / "a.txt").write_text(text)
    (train,), (validation,) = text_of(tmp_path / "a.txt", "train"), text_of(tmp_path / "a.txt", "validation")
    assert train + validation == text
    assert train.endswith("file")
    assert validation.startswith("\nline")
    assert len(validation) / len(text) == pytest.approx(0.1, abs=0.01)


def test_large_source_is_split_by_content_without_being_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "SMALL_CHARS", 2000)
    monkeypatch.setattr(local, "_PIECE_CHARS", 500)
    texts = [f"{n} " + "words " * 20 for n in range(300)]
    write_jsonl(tmp_path / "a.jsonl", texts)
    train, validation = text_of(tmp_path, "train"), text_of(tmp_path, "validation")
    assert sorted(train + validation) == sorted(texts)
    assert 10 <= len(validation) <= 60
    big = tmp_path / "big.txt"
    big.write_text("".join(f"line {n}\n" for n in range(3000)))
    assert "".join(text_of(big)) == big.read_text()
    pieces = text_of(big, "train") + text_of(big, "validation")
    assert sorted("".join(pieces)) == sorted(big.read_text())
    assert len(set(pieces)) > 10


def test_identity_follows_the_content(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    data = DataConfig(source=str(path))
    before = open_source(data).identity("train")
    os.utime(path, (1, 1))
    assert open_source(data).identity("train") == before
    write_jsonl(path, DOCUMENTS[::-1])
    assert open_source(data).identity("train") != before


# --- errors -------------------------------------------------------------------------------------------


def failure(data: DataConfig, part: str = "train") -> DataError:
    with pytest.raises(DataError) as caught:
        list(documents(data, part))
    assert caught.value.exit_code == ExitCode.DATA
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("empty.txt", b"", "no text"),
        ("blank.txt", b" \n\n ", "no text"),
        ("empty.jsonl", b"", "no text"),
        ("a.jsonl", b'{"content": "x"}\n', "no column 'text'"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "a.jsonl:2"),
        ("a.jsonl", b"[1, 2]\n", "not a JSON object"),
        ("a.jsonl", b'{"text": 3}\n', "holds int, not text"),
        ("latin.txt", "naïve".encode("latin-1"), "UTF-8"),
        ("a.parquet", b"PAR1 this is not parquet", "cannot be read"),
        ("a.arrow", b"neither stream nor file", "cannot be read"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n', mtime=0)[:-4], "cannot be read"),
        ("a.jsonl.zst", b"not zstd at all", "cannot be read"),
        ("a.txt.gz", b"not gzip at all", "cannot be read"),
        ("a.pdf", b"%PDF", "unknown kind"),
    ],
)
def test_bad_file_is_one_clear_line(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    error = failure(DataConfig(source=str(tmp_path / name)))
    assert says in str(error)
    assert name in str(error)


@pytest.mark.parametrize("write", [write_parquet, write_arrow_stream, write_arrow_file])
def test_missing_column_names_those_that_exist(
    tmp_path: Path, write: Callable[[Path, list[str]], None]
) -> None:
    path = tmp_path / ("a.parquet" if write is write_parquet else "a.arrow")
    write(path, DOCUMENTS)
    error = failure(DataConfig(source=str(path), column="content"))
    assert "no column 'content'" in error.message
    assert "text" in error.hint


def test_missing_path_empty_folder_and_unknown_name(tmp_path: Path) -> None:
    assert "no such file" in failure(DataConfig(source=str(tmp_path / "nowhere"))).message
    assert "no such file" in failure(DataConfig(source="calibration.jsonl")).message
    assert "no text files" in failure(DataConfig(source=str(tmp_path))).message
    assert "wikitext2" in failure(DataConfig(source="wikitxt2")).hint
    write_jsonl(tmp_path / "train-0.jsonl", DOCUMENTS)
    assert "split 'test'" in failure(DataConfig(source=str(tmp_path), split="test"), "evaluation").message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file_is_a_data_error(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    path.chmod(0)
    assert "cannot be read" in failure(DataConfig(source=str(path))).message


# --- the hub ------------------------------------------------------------------------------------------
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
    assert "set data.column to one of: id, text" in message(HubSource(repo=repo, column="content"))
    assert "cannot be read from the hub" in message(HubSource(repo=repo, split="nosuch"))
    assert "cannot be read from the hub" in message(HubSource(repo=repo, subset="nosuch"))


def test_offline_hub_id_says_what_works_without_a_network() -> None:
    code = (
        "from engine.data.text import documents\n"
        "from engine.config.data import DataConfig\n"
        "from engine.errors import DataError\n"
        "try:\n"
        "    next(documents(DataConfig(source='c4'), 'train'))\n"
        "except DataError as error:\n"
        "    print(int(error.exit_code), error)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stdout.startswith("4 allenai/c4 (en): cannot be read from the hub")
    assert "builtin" in done.stdout
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
    assert set(SHORTCUTS) == {"redpajama", "c4", "wikitext2", "slimpajama", "fineweb-edu"}
    wikitext = hub_source(DataConfig(source="wikitext2", split="test", column="page", revision="abc"))
    assert (wikitext.repo, wikitext.subset) == ("Salesforce/wikitext", "wikitext-2-raw-v1")
    assert (wikitext.split, wikitext.column, wikitext.revision) == ("test", "page", "abc")
    by_id = hub_source(DataConfig(source="allenai/C4", subset="de"))
    assert (by_id.repo, by_id.subset, by_id.splits) == ("allenai/c4", "de", {})
    assert hub_source(DataConfig(source="someone/text")).repo == "someone/text"


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
        "from engine.data.text import documents\n"
        "from engine.config.data import DataConfig\n"
        "next(documents(DataConfig(), 'train'))\n"
        "assert not {'torch', 'datasets', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True, timeout=60)


# --- odd texts ----------------------------------------------------------------------------------------

NEVER: dict[str, tuple[str, bytes, str]] = {
    "half a character": ("a.jsonl", b'{"text": "x"}\n{"text": "\\ud83d"}\n', "a.jsonl:2"),
    "nesting": ("a.jsonl", b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "a.jsonl:1"),
    "a number of 5000 digits": ("a.jsonl", b'{"text": "x", "n": ' + b"9" * 5000 + b"}", "a.jsonl:1"),
    "a list": ("a.jsonl", b'{"text": ["x"]}', "a.jsonl:1"),
    "no UTF-8": ("a.jsonl", b'{"text": "\xff"}', "UTF-8"),
    "UTF-16": ("a.txt", "text".encode("utf-16"), "UTF-8"),
    "a wrong name": ("a.jsonl.gz", b'{"text": "x"}', "a.jsonl.gz"),
    "half an archive": ("a.txt.gz", gzip.compress(b"text " * 1000, mtime=0)[:30], "a.txt.gz"),
    "a damaged archive": (
        "a.txt.gz",
        gzip.compress(random.Random(0).randbytes(5000).hex().encode(), mtime=0)[:40] + b"\xff" * 2000,
        "a.txt.gz",
    ),
    "half a parquet file": ("a.parquet", b"PAR1" + bytes(200) + b"\xff\xff\xff\x7fPAR1", "a.parquet"),
    "an arrow file of zeros": ("a.arrow", bytes(1000), "a.arrow"),
    "an arrow file that announces too much": ("a.arrow", b"\xff\xff\xff\xff\xff\xff\xff\x7f", "a.arrow"),
    "columns without end": (
        "a.jsonl",
        json.dumps({f"column {n} \ud83d\n": n for n in range(10_000)}).encode(),
        "a.jsonl:1",
    ),
}


@pytest.mark.parametrize("name", NEVER)
def test_whatever_is_wrong_in_a_text_is_one_line_with_the_files_name(name: str, tmp_path: Path) -> None:
    file, content, says = NEVER[name]
    (tmp_path / file).write_bytes(content)
    for part in ("train", "evaluation"):
        error = failure(DataConfig(source=str(tmp_path / file)), part)
        assert says in str(error)
        assert len(str(error).encode()) < 3000


@pytest.mark.parametrize("kind", ["struct", "binary", "twice", "integers"])
def test_columns_that_are_no_text_are_refused(kind: str, tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    column = {
        "struct": pyarrow.array([{"en": "x"}]),
        "binary": pyarrow.array([b"x"]),
        "integers": pyarrow.array([1 << 62]),
        "twice": pyarrow.array(["x"]),
    }[kind]
    columns = [column] * (2 if kind == "twice" else 1)
    parquet.write_table(pyarrow.table(columns, names=["text"] * len(columns)), tmp_path / "a.parquet")
    assert "a.parquet" in str(failure(DataConfig(source=str(tmp_path / "a.parquet"))))


def test_a_mark_at_the_beginning_and_odd_line_ends_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(
        b'\xef\xbb\xbf{"text": "one\\u0000"}\r\n\r\n{"text": null}\n{"text": "two"}'
    )
    assert text_of(tmp_path / "a.jsonl") == ["one\0", "two"]


def test_a_line_without_end_is_refused_before_memory_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty kilobytes stand for twenty megabytes."""
    from engine.data import lines

    monkeypatch.setattr(lines, "LONGEST_LINE", 1 << 20)
    path = tmp_path / "bomb.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "x"}\n' + b" " * (20 << 20), mtime=0))
    assert path.stat().st_size < 100_000
    assert "bomb.jsonl.gz:2" in str(failure(DataConfig(source=str(path))))


@pytest.mark.parametrize("kind", ["fifo", "device", "nothing"])
def test_what_is_no_regular_file_is_refused_at_once(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "texts" / "a.txt"
    path.parent.mkdir()
    if kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero" if kind == "device" else "absent")
    for source in (path, path.parent):
        assert "a.txt" in str(failure(DataConfig(source=str(source))))


def test_a_text_may_be_linked_in(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "elsewhere.jsonl", DOCUMENTS)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.jsonl").symlink_to(tmp_path / "elsewhere.jsonl")
    assert text_of(tmp_path / "texts") == text_of(tmp_path / "texts" / "a.jsonl") == DOCUMENTS


@pytest.mark.parametrize("source", ["~nobody-of-this-name/a.txt", "/a\0b.txt", "/" + "x" * 5000 + ".txt"])
def test_a_name_that_no_text_can_have_is_one_line(source: str) -> None:
    failure(DataConfig(source=source))
