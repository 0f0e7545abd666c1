"""An export names code only where that code lies in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from packed_models import open_model, packed_blocks, save_model, write

from engine.export.named_code import drop_missing_code, without_missing
from engine.export.result import ExportResult

AUTO_MAP = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "other/repo--theirs.Model"}
TOKENIZER_MAP = {"AutoTokenizer": ["mine.Slow", None], "AutoProcessor": ["absent.A", "other/repo--b.B"]}


@pytest.mark.parametrize(
    ("value", "kept", "dropped"),
    [
        ({"a": 1}, {"a": 1}, []),
        ({"auto_map": {"A": "mine.C"}}, {"auto_map": {"A": "mine.C"}}, []),
        ({"auto_map": {"A": "o/r--mine.C", "B": "mine.C"}}, {"auto_map": {"B": "mine.C"}}, ["o/r--mine.C"]),
        ({"auto_map": {"A": "gone.C"}, "b": 2}, {"b": 2}, ["gone.C"]),
        ({"auto_map": {"A": ["mine.S", None]}}, {"auto_map": {"A": ["mine.S", None]}}, []),
        ({"auto_map": {"A": ["x.S", "mine.F"]}}, {"auto_map": {"A": [None, "mine.F"]}}, ["x.S"]),
        ({"auto_map": ["x.S", None]}, {}, ["x.S"]),
        ({"auto_map": "x.S"}, {}, ["x.S"]),
        ({"auto_map": {"A": "mine.sub.C", "B": "mine", "C": 7}}, {}, ["mine.sub.C", "mine"]),
        ({"auto_map": None, "b": {"auto_map": {}}}, {"b": {}}, []),
        (
            {"text_config": {"auto_map": {"A": "o/r--m.C"}, "x": [{"auto_map": {"A": "gone.C"}}]}},
            {"text_config": {"x": [{}]}},
            ["o/r--m.C", "gone.C"],
        ),
        (
            {"custom_pipelines": {"p": {"impl": "mine.P", "pt": ["AutoModel"]}, "q": {"impl": "o/r--q.Q"}}},
            {"custom_pipelines": {"p": {"impl": "mine.P", "pt": ["AutoModel"]}}},
            ["o/r--q.Q"],
        ),
        ({"custom_pipelines": ["q.Q"]}, {}, []),
        ({"attn_implementation": "sdpa"}, {"attn_implementation": "sdpa"}, []),
        ({"_attn_implementation": "evil/kernels"}, {}, ["evil/kernels"]),
    ],
)
def test_only_names_whose_module_is_there_are_kept(value: Any, kept: Any, dropped: list[str]) -> None:
    told: list[str] = []
    assert without_missing(value, {"mine"}, told) == kept
    assert told == dropped


def test_files_without_such_names_stay_as_they_are_byte_for_byte(tmp_path: Path) -> None:
    contents = {
        "generation_config.json": b'{"a":1,\n\n "b": NaN , "c": 1.50}',
        "special_tokens_map.json": b"[1, 2 ]",
        "chat_template.json": b"not json at all",
        "tokenizer.json": b'{"model": {"vocab": {"auto_map": 3, "custom_pipelines": 4}}}',
        "vocab.json": b'{"auto_map": 3}',
        "added_tokens.json": b'{"auto_map": 3}',
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    assert drop_missing_code(tmp_path, set()) == []
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == contents


def test_only_the_key_goes_where_one_has_to(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"x": NaN, "auto_map": {"A": "m.C"}, "y": "\\ud800", "z": [1.5, "ü"]}')
    assert drop_missing_code(tmp_path, set()) == ["m.C"]
    found = json.loads((tmp_path / "a.json").read_bytes())
    assert list(found) == ["x", "y", "z"]
    assert (found["y"], found["z"]) == ("\ud800", [1.5, "ü"])


def exported(folder: Path, out: Path, trusted: bool) -> ExportResult:
    """An export of the model in ``folder``, whose own code is copied with it where it is trusted."""
    source, lm = open_model(folder)
    source.trust_remote_code = trusted
    return write(out, lm, source, packed_blocks(lm, 4, 64).__getitem__)


@pytest.mark.parametrize("trusted", [False, True])
def test_an_export_carries_no_name_of_code_that_does_not_come_with_it(tmp_path: Path, trusted: bool) -> None:
    folder = save_model(tmp_path / "fp")
    (folder / "mine.py").write_text("raise AssertionError('this is never run here')\n")
    for name, added in {
        "config.json": {"auto_map": AUTO_MAP, "custom_pipelines": {"p": {"impl": "absent.P"}}},
        "tokenizer_config.json": {"auto_map": TOKENIZER_MAP},
        "generation_config.json": {"inner": {"auto_map": {"A": "absent.G"}}},
    }.items():
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, **added}))
    result = exported(folder, tmp_path / "out", trusted)
    read = {path.name: json.loads(path.read_text()) for path in result.path.glob("*config.json")}
    assert (result.path / "mine.py").exists() == trusted
    if trusted:
        assert read["config.json"]["auto_map"] == {"AutoConfig": "mine.Config"}
        assert read["tokenizer_config.json"]["auto_map"] == {"AutoTokenizer": ["mine.Slow", None]}
    text = "".join(path.read_text() for path in result.path.glob("*.json"))
    for word in ("custom_pipelines", "other/repo", "absent", *([] if trusted else ["auto_map", "mine"])):
        assert word not in text
    missing = {"other/repo--theirs.Model", "other/repo--b.B", "absent.A", "absent.P", "absent.G"}
    assert missing <= set(result.dropped_code)
    plain = exported(save_model(tmp_path / "plain"), tmp_path / "plain-out", trusted)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (plain.path / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
