"""Whatever is wrong with a text is one line with the name of its file."""

from __future__ import annotations

import gzip
import json
import os
import random
import sys
from pathlib import Path

import pytest
from text_files import (
    DOCUMENTS,
    failure,
    text_of,
    write_jsonl,
)

from engine.config.data import DataConfig

RANDOM = random.Random(5).randbytes(5000)
NEVER: dict[str, tuple[str, bytes, str]] = {
    "half a character": ("a.jsonl", b'{"text": "\\ud83d"}\n', "a.jsonl:1"),
    "nesting": ("a.jsonl", b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "a.jsonl:1"),
    "a number of 5000 digits": ("a.jsonl", b'{"text": ' + b"9" * 5000 + b"}", "a.jsonl:1"),
    "a list": ("a.jsonl", b'{"text": ["x"]}', "a.jsonl:1"),
    "no UTF-8": ("a.jsonl", b'{"text": "\xff"}', "UTF-8"),
    "Latin-1": ("a.txt", "caf\xe9".encode("latin-1"), "byte 0xe9, as Latin-1"),
    "UTF-16": ("a.txt", "text".encode("utf-16"), "is UTF-16 text, not UTF-8"),
    "UTF-16, compressed": ("a.txt.gz", gzip.compress("text".encode("utf-16"), mtime=0), "is UTF-16 text"),
    "UTF-16 without a mark": ("a.jsonl", '{"text": "some text"}'.encode("utf-16-le"), "UTF-16 text without"),
    "UTF-32": ("a.txt", "text".encode("utf-32"), "is UTF-32 text, not UTF-8"),
    "an archive called text": ("a.txt", gzip.compress(b"text", mtime=0), "is a gzip file"),
    "a table called text": ("a.jsonl", b"PAR1" + bytes(40), "is a Parquet file"),
    "zeros": ("a.txt", bytes(5000), "no text"),
    "bytes drawn by lot": ("a.txt", RANDOM, "a.txt: is binary data and no text"),
    "a few of them": ("a.txt", RANDOM[:100], "is binary data and no text"),
    "the same, called rows": ("a.jsonl", RANDOM, "is binary data and no text"),
    "the same, compressed": ("a.txt.gz", gzip.compress(RANDOM, mtime=0), "is binary data and no text"),
    "the same, converted to UTF-8": (
        "a.txt",
        RANDOM.decode("latin-1").encode(),
        "is binary data and no text",
    ),
    "a program": ("a.txt", Path(sys.executable).resolve().read_bytes()[:50_000], "is binary data"),
    "UTF-16 without a mark or zeros": ("a.txt", "Привет".encode("utf-16-le") * 9, "if it is UTF-16 in truth"),
    "text with bytes drawn by lot behind it": ("a.txt", b"text " * 2000 + RANDOM, "is binary data"),
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


def test_text_with_a_few_control_characters_is_text(tmp_path: Path) -> None:
    """Colours of a terminal, bold print of an old manual, ends of pages, and an odd letter now and then."""
    text = "\x1b[1mNAME\x1b[0m\n" * 50 + "l\bls\bs lists\f\n" * 50 + "word " * 200 + "\x01\x02 one more\x7f"
    (tmp_path / "a.txt").write_text(text)
    assert text_of(tmp_path / "a.txt") == [text]
    (tmp_path / "b.txt").write_bytes("Caf\xe9 \x93quoted\x94 ".encode("latin-1") * 100)
    assert "as Latin-1 and Windows-1252 have it" in str(failure(DataConfig(source=str(tmp_path / "b.txt"))))


@pytest.mark.parametrize("kind", ["struct", "bytes", "twice", "integers"])
def test_columns_that_are_no_text_are_refused(kind: str, tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    column = {
        "struct": pyarrow.array([{"en": "x"}]),
        "bytes": pyarrow.array([b"\xff\xfe"]),
        "integers": pyarrow.array([1 << 62]),
        "twice": pyarrow.array(["x"]),
    }[kind]
    columns = [column] * (2 if kind == "twice" else 1)
    parquet.write_table(pyarrow.table(columns, names=["text"] * len(columns)), tmp_path / "a.parquet")
    assert "a.parquet" in str(failure(DataConfig(source=str(tmp_path / "a.parquet"))))


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl", "a.json", "b.json"])
def test_a_mark_at_the_beginning_of_a_file_is_no_text(name: str, tmp_path: Path) -> None:
    content = {".txt": "one", ".gz": "one", ".jsonl": '{"text": "one"}', ".json": '[{"text": "one"}]'}
    text = content[Path(name).suffix] if name[0] == "a" else '{"text": "one"}\n'
    raw = b"\xef\xbb\xbf" + text.encode()
    (tmp_path / name).write_bytes(gzip.compress(raw, mtime=0) if name.endswith(".gz") else raw)
    assert text_of(tmp_path / name) == ["one"]


def test_files_with_marks_one_behind_the_other_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\n\xef\xbb\xbf{"text": "two"}\n')
    assert text_of(tmp_path / "a.jsonl") == ["one", "two"]


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
