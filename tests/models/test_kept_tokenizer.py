"""A GGUF file's tokenizer is made once and kept: the same tokens, and never of another file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf_files
import pytest
from transformers import AutoTokenizer

from engine.config.model import ModelConfig
from engine.models import kept_tokenizer as kept
from engine.models.source import ModelSource
from engine.run.contents import is_cached_text
from engine.system.user_cache import token_cache

TEXTS = ["the quick brown fox", " a  b\n", "", "<s> x"]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EQAT_CACHE_DIR", str(tmp_path / "cache"))
    return gguf_files.write(tmp_path / "model.gguf", "llama2", merges=["t h", "th e"])


class Reading:
    """How often transformers reads a GGUF file."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.times = 0
        real = AutoTokenizer.from_pretrained

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.times += "gguf_file" in kwargs
            return real(*args, **kwargs)

        monkeypatch.setattr(AutoTokenizer, "from_pretrained", counted)


@pytest.fixture
def reading(monkeypatch: pytest.MonkeyPatch) -> Reading:
    return Reading(monkeypatch)


def read(file: Path) -> Any:
    return ModelSource.open(ModelConfig(source=str(file))).tokenizer()


def ids(tokenizer: Any) -> list[list[int]]:
    return [tokenizer(text)["input_ids"] for text in TEXTS]


def entries() -> list[Path]:
    return sorted(token_cache().iterdir()) if token_cache().is_dir() else []


def test_it_is_made_once_and_reads_text_alike(file: Path, reading: Reading) -> None:
    first, again = read(file), read(file)
    assert reading.times == 1
    assert ids(first) == ids(again)
    assert first.backend_tokenizer.to_str() == again.backend_tokenizer.to_str()
    assert (first.bos_token_id, first.eos_token_id) == (again.bos_token_id, again.eos_token_id)
    (entry,) = entries()
    assert is_cached_text(entry.name), "eqat gc removes it"


def test_another_file_has_another(file: Path, tmp_path: Path, reading: Reading) -> None:
    read(file)
    read(gguf_files.write(tmp_path / "other.gguf", "llama2", merges=["q u"]))
    assert reading.times == 2
    assert len(entries()) == 2


@pytest.mark.parametrize("damage", [b"", b"{", b'{"files": {}, "sha256": "x"}'])
def test_a_damaged_one_is_made_anew(file: Path, reading: Reading, damage: bytes) -> None:
    good = ids(read(file))
    (entry,) = entries()
    whole = entry.read_bytes()
    entry.write_bytes(damage)
    assert ids(read(file)) == good
    assert reading.times == 2
    assert entry.read_bytes() == whole


def test_an_edited_one_is_not_believed(file: Path, reading: Reading) -> None:
    read(file)
    (entry,) = entries()
    entry.write_bytes(entry.read_bytes().replace(b"bos_token", b"eos_token", 1))
    read(file)
    assert reading.times == 2


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(file: Path, reading: Reading) -> None:
    token_cache().parent.mkdir(parents=True)
    token_cache().write_text("no folder")
    assert ids(read(file)) == ids(read(file))
    assert reading.times == 2


def test_one_that_would_load_otherwise_is_not_kept(
    file: Path, reading: Reading, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(files: dict[str, str]) -> Any:
        tokenizer = whole(files)
        tokenizer.add_special_tokens({"additional_special_tokens": ["<new>"]})
        return tokenizer

    whole = kept._of_files
    monkeypatch.setattr(kept, "_of_files", other)
    read(file)
    assert entries() == []
