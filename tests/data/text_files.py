"""Text files of every format, and what is read of them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine.config.data import DataConfig
from engine.data.parts import Part
from engine.data.text import open_source
from engine.errors import DataError, ExitCode

DOCUMENTS = [f"Document {n} speaks.\n" + f"Line {n} of it.\n" * 20 for n in range(40)]


def documents(data: DataConfig, part: Part, seed: int = 0) -> Iterator[str]:
    """The documents of one part of a text."""
    return open_source(data).documents(part, seed)


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


def failure(data: DataConfig, part: str = "train") -> DataError:
    with pytest.raises(DataError) as caught:
        list(documents(data, part))
    assert caught.value.exit_code == ExitCode.DATA
    assert "\n" not in str(caught.value)
    return caught.value
