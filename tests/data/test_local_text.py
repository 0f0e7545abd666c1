"""What text from files promises: disjoint parts, every format, errors that say what to do."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from text_files import (
    DOCUMENTS,
    failure,
    text_of,
    write_arrow_file,
    write_arrow_stream,
    write_jsonl,
    write_jsonl_gz,
    write_jsonl_zst,
    write_parquet,
)

from engine.config.data import DataConfig
from engine.data import local
from engine.data.local import _split_by_position
from engine.data.text import open_source


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


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("empty.txt", b"", "no text"),
        ("blank.txt", b" \n\n ", "no text"),
        ("empty.jsonl", b"", "no text"),
        ("a.jsonl", b'{"content": "x"}\n', "no column 'text'"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "a.jsonl:2"),
        ("a.jsonl", b"[1, 2]\n", "not a JSON object"),
        ("a.jsonl", b'{"text": 3}\n', "holds a number, not text"),
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
