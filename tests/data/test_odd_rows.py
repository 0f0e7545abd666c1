"""Rows without text are left out and counted; columns are found where they are; JSON is read as it comes."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from text_files import DOCUMENTS, failure, text_of, write_jsonl

from engine.config.data import DataConfig
from engine.data.encoding import Encoder
from engine.data.text import open_source
from engine.data.tokens import token_windows
from engine.models.tokenizer import byte_tokenizer

WITHOUT = {
    "null": ('{"text": null}', "nothing (null)"),
    "a number": ('{"text": 12345}', "a number"),
    "true": ('{"text": true}', "true or false"),
    "a list": ('{"text": ["x"]}', "a list"),
    "no column": ('{"meta": "x"}', "no column 'text'"),
    "half a character": ('{"text": "broken \\ud83d emoji"}', "half a character"),
    "nesting": ('{"text": "x", "n": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
    "no object": ("3", "not a JSON object"),
}


def told(path: Path, column: str | None = None) -> tuple[list[str], list[str]]:
    """The documents of a text and what is told of its rows."""
    source = open_source(DataConfig(source=str(path), column=column))
    return list(source.documents("evaluation")), source.skipped()


@pytest.mark.parametrize("name", WITHOUT)
def test_a_row_without_text_is_left_out_and_counted(name: str, tmp_path: Path) -> None:
    row, says = WITHOUT[name]
    texts = [json.dumps({"text": text}) for text in DOCUMENTS]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([texts[0], row, *texts[1:], row]))
    found, (line,) = told(path)
    assert found == DOCUMENTS
    assert f"2 of {len(texts) + 2} rows had no text" in line
    assert says in line
    assert "a.jsonl:2)" in line


@pytest.mark.parametrize("name", WITHOUT)
def test_a_text_most_of_whose_rows_have_none_is_refused(name: str, tmp_path: Path) -> None:
    row, says = WITHOUT[name]
    good = '{"text": "good"}'
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([good, row, good, row]))
    assert told(path)[0] == ["good", "good"], "half of them are not most"
    path.write_text("\n".join([good, row, good, row, row]))
    refused = str(failure(DataConfig(source=str(path))))
    assert "3 of 5 rows have no text" in refused
    assert says in refused
    assert "a.jsonl:2" in refused


def test_most_rows_are_known_before_a_long_text_is_at_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine.data import columns

    monkeypatch.setattr(columns, "EARLY", 50)
    (tmp_path / "a.jsonl").write_text('{"text": null}\n' * 60 + "no JSON at all\n")
    assert "holds nothing" in str(failure(DataConfig(source=str(tmp_path / "a.jsonl"))))


def test_blank_rows_are_no_rows_without_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n' * 9 + '{"text": "x"}\n')
    assert told(tmp_path / "a.jsonl") == (["x"], [])


def test_what_a_text_lacks_is_told_again_when_its_tokens_come_from_the_cache(tmp_path: Path) -> None:
    rows = [{"text": None}, *({"text": text} for text in DOCUMENTS)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    said: list[tuple[str, str]] = []
    for _ in range(2):
        token_windows(
            Encoder(byte_tokenizer(300)),
            DataConfig(source=str(tmp_path / "a.jsonl")),
            "evaluation",
            sequences=0,
            length=32,
            cache_dir=tmp_path / "cache",
            warn=lambda code, message: said.append((code, message)),
        )
    assert len(said) == 2
    assert said[0] == said[1]
    assert said[0][0] == "text-rows"


# -- columns -------------------------------------------------------------------------------------------


def table(path: Path, **columns: object) -> Path:
    import pyarrow
    from pyarrow import ipc, parquet

    made = pyarrow.table(columns)
    if path.suffix == ".parquet":
        parquet.write_table(made, path)
        return path
    with pyarrow.OSFile(str(path), "wb") as file, ipc.new_file(file, made.schema) as writer:
        writer.write_table(made)
    return path


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.jsonl"])
def test_a_column_in_a_table_is_named_with_a_point(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    rows = [{"en": text, "de": "nein", "more": {"fr": "non", "n": 1}} for text in DOCUMENTS]
    if name == "a.jsonl":
        path.write_text("\n".join(json.dumps({"text": row, "n": 1}) for row in rows))
    else:
        table(path, text=rows, n=[1] * len(rows))
    assert told(path, "text.en") == (DOCUMENTS, [])
    assert set(told(path, "text.more.fr")[0]) == {"non"}
    for column in (None, "text.more", "en", "text.no"):
        refused = str(failure(DataConfig(source=str(path), column=column)))
        assert "set data.column to one of: text.en, text.de, text.more.fr" in refused


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl"])
def test_a_column_whose_own_name_has_a_point_is_found(name: str, tmp_path: Path) -> None:
    path, columns = tmp_path / name, {"a.b": ["whole"], "a": [{"b": "part"}]}
    if name == "a.parquet":
        table(path, **columns)
    else:
        path.write_text(json.dumps({key: value[0] for key, value in columns.items()}))
    assert text_of(path, column="a.b") == ["whole"]


def test_text_kept_as_bytes_or_in_a_dictionary_is_text(tmp_path: Path) -> None:
    import pyarrow

    table(tmp_path / "a.parquet", text=[text.encode() for text in DOCUMENTS])
    table(tmp_path / "b.parquet", text=pyarrow.array(DOCUMENTS).dictionary_encode())
    assert text_of(tmp_path / "a.parquet") == text_of(tmp_path / "b.parquet") == DOCUMENTS


def test_bytes_that_are_no_text_cost_their_row_only(tmp_path: Path) -> None:
    import pyarrow

    raw = [b"one", b"\xff\xfe", b"two"]
    table(tmp_path / "a.parquet", text=raw)
    # What others write as text is not always UTF-8.
    broken = pyarrow.Array.from_buffers(pyarrow.string(), 3, pyarrow.array(raw).buffers())
    table(tmp_path / "b.parquet", text=broken)
    for name in ("a.parquet", "b.parquet"):
        found, (line,) = told(tmp_path / name)
        assert found == ["one", "two"]
        assert "1 of 3 rows" in line
        assert "row 2" in line


TURNS = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "so."}]
OTHER_TURNS = [{"from": "human", "value": "why?"}, {"from": "gpt", "value": "so."}]


@pytest.mark.parametrize("turns", [TURNS, OTHER_TURNS])
@pytest.mark.parametrize("column", [None, "messages"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_conversations_are_refused_as_such(
    turns: list[dict[str, str]], column: str | None, name: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    if name == "a.jsonl":
        path.write_text((json.dumps({"messages": turns}) + "\n") * 5)
    else:
        table(path, messages=[turns] * 5)
    refused = str(failure(DataConfig(source=str(path), column=column)))
    assert "instructions.source" in refused
    assert "one of:" not in refused


def test_what_holds_no_text_is_said_with_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"n": 1, "on": true, "all": ["x"]}\n')
    refused = str(failure(DataConfig(source=str(tmp_path / "a.jsonl"))))
    assert "no column of this row holds text: n (a number), on (true or false), all (a list)" in refused


# -- JSON ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz"])
@pytest.mark.parametrize("indent", [None, 2])
def test_one_array_of_rows_is_read_whatever_it_is_called(
    name: str, indent: int | None, tmp_path: Path
) -> None:
    raw = ("\n" + json.dumps([{"text": text} for text in DOCUMENTS], indent=indent)).encode()
    (tmp_path / name).write_bytes(gzip.compress(raw, mtime=0) if name.endswith(".gz") else raw)
    assert text_of(tmp_path / name) == DOCUMENTS


def test_lines_may_be_called_json_and_lines_of_arrays_are_lines(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert text_of(tmp_path / "a.json") == ["one", "two"]
    (tmp_path / "b.jsonl").write_text('["no row"]\n{"text": "one"}\n{"text": "two"}\n')
    found, (line,) = told(tmp_path / "b.jsonl")
    assert found == ["one", "two"]
    assert "b.jsonl:1)" in line


def test_what_describes_a_folder_of_texts_is_none(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text('{"text": "no text"}')
    assert text_of(tmp_path) == ["no text"]
    write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    assert text_of(tmp_path) == DOCUMENTS


def test_numbers_that_python_does_not_read_and_names_twice_harm_no_row(tmp_path: Path) -> None:
    odd = [
        '{"text": "one", "n": ' + "9" * 5000 + "}",
        '{"n": -' + "9" * 5000 + ', "text": "two"}',
        '{"text": "three", "n": Infinity, "m": NaN, "k": 1e999}',
        '{"text": "never read", "text": "four"}',
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(odd))
    assert told(tmp_path / "a.jsonl") == (["one", "two", "three", "four"], [])


def test_an_array_that_memory_has_no_room_for_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine.data import lines

    monkeypatch.setattr(lines, "LONGEST_LINE", 1 << 16)
    for text in ("[" + " " * (1 << 17), '[\n{"text": "x"},' + "\n" * (1 << 17)):
        (tmp_path / "a.json.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
        assert "more than 65,536 characters" in str(failure(DataConfig(source=str(tmp_path / "a.json.gz"))))
