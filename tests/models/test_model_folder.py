"""What a model's folder holds is judged before anything reads it: links, FIFOs, devices, sizes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from odd_files import make_socket

from engine.architecture.description import describe, resolve_source
from engine.architecture.model_folder import ASSETS, ModelFolder, copied_bytes
from engine.config.model import ModelConfig
from engine.errors import PreflightError
from engine.models.causal_lm import CausalLM
from engine.models.source import ModelSource

NAMES = [
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
    "tokenizer.model",
    "merges.txt",
    "vocab.tiktoken",
    "modeling.py",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.build(tmp_path / "model", "llama2")


def refusal(folder: Path) -> str:
    """The plan and the engine refuse it in the same words, at once."""
    said = []
    began = time.monotonic()
    for read in (describe, lambda source: ModelSource.open(ModelConfig(source=source))):
        with pytest.raises(PreflightError) as caught:
            read(str(folder))
        assert "\n" not in str(caught.value)
        said.append(str(caught.value))
    assert time.monotonic() - began < 30
    assert said[0] == said[1]
    return said[0]


def put(folder: Path, name: str, make: Callable[[Path], object]) -> None:
    (folder / name).unlink(missing_ok=True)
    make(folder / name)


def private_key(path: Path) -> None:
    secret = path.parent.parent / "id_ed25519"
    secret.write_text("private")
    path.symlink_to(secret)


def by_way_of_the_folder(path: Path) -> None:
    """A link inside the folder that leads to one that leaves it."""
    private_key(path.parent / "step.json")
    path.symlink_to("step.json")


def a_loop(path: Path) -> None:
    path.symlink_to(path.name)


def a_false_blob(path: Path) -> None:
    """A place that is called like a hub's cache, and leads out of it."""
    blobs = path.parent.parent / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    secret = path.parent.parent / "id_rsa"
    secret.write_text("private")
    (blobs / "0123").symlink_to(secret)
    path.symlink_to(blobs / "0123")


ODD: dict[str, Callable[[Path], object]] = {
    "private key": private_key,
    "two steps": by_way_of_the_folder,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "memory": lambda path: path.symlink_to("/proc/self/mem"),
    "fifo": os.mkfifo,
    "socket": make_socket,
    "nothing": lambda path: path.symlink_to("absent"),
    "loop": a_loop,
    "folder": lambda path: path.symlink_to(path.parent),
    "false blob": a_false_blob,
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ODD)
def test_an_entry_that_may_not_be_read_is_refused_by_name(folder: Path, name: str, kind: str) -> None:
    put(folder, name, ODD[kind])
    assert name in refusal(folder) or "step.json" in refusal(folder)


def test_a_refused_link_comes_with_what_to_do(folder: Path) -> None:
    put(folder, "chat_template.jinja", private_key)
    assert "copy the file itself into the folder" in refusal(folder)


def test_links_inside_the_folder_and_into_a_hub_cache_are_followed(folder: Path, tmp_path: Path) -> None:
    expected = ModelSource.open(ModelConfig(source=str(folder))).identity()["sha256"]
    blobs = tmp_path / "hub" / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    for number, name in enumerate(("config.json", "model.safetensors", "tokenizer.json")):
        (folder / name).rename(blobs / f"{number:040}")
        (folder / name).symlink_to(blobs / f"{number:040}")
    (folder / "chat.txt").write_text("{{ messages }}")
    (folder / "chat_template.jinja").symlink_to("chat.txt")
    describe(str(folder))
    source = ModelSource.open(ModelConfig(source=str(folder)))
    assert source.identity()["sha256"] == expected
    assert source.tokenizer().chat_template == "{{ messages }}"
    CausalLM(source, torch.device("cpu"), torch.float32)


def test_a_snapshot_may_lead_to_another_one_of_its_own_repository_only(tmp_path: Path) -> None:
    for owner in ("a", "b"):
        tiny.build(tmp_path / f"models--{owner}--m" / "snapshots" / "1", "llama2")
    snapshot = tmp_path / "models--a--m" / "snapshots" / "2"
    snapshot.mkdir()
    for file in sorted((tmp_path / "models--a--m" / "snapshots" / "1").iterdir()):
        (snapshot / file.name).symlink_to(f"../1/{file.name}")
    describe(str(snapshot))
    ModelSource.open(ModelConfig(source=str(snapshot)))
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(tmp_path / "models--b--m" / "snapshots" / "1" / "config.json")
    assert "config.json" in refusal(snapshot)


def test_the_folder_itself_may_be_named_by_a_link_and_so_may_a_text(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    assert resolve_source(str(tmp_path / "link")) == tmp_path / "link"
    ModelSource.open(ModelConfig(source=str(tmp_path / "link")))
    describe(str(tmp_path / "link"))


def test_additional_templates_are_judged_like_all_others(folder: Path, tmp_path: Path) -> None:
    templates = folder / "additional_chat_templates"
    templates.mkdir()
    (templates / "tools.jinja").write_text("{{ 1 }}")
    assert "additional_chat_templates/tools.jinja" in ModelFolder.judge(folder).assets()
    put(templates, "rag.jinja", lambda path: path.symlink_to(tmp_path / "model" / "tokenizer.json"))
    ModelFolder.judge(folder)
    os.mkfifo(templates / "fifo.jinja")
    assert "fifo.jinja" in refusal(folder)
    (templates / "fifo.jinja").unlink()
    templates.rename(tmp_path / "elsewhere")
    templates.symlink_to(tmp_path / "elsewhere")
    assert "no real folder" in refusal(folder)


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer_config.json", "tokenizer.json", "chat_template.jinja"]
)
def test_a_small_file_that_is_huge_is_refused_before_it_is_read(folder: Path, name: str) -> None:
    with (folder / name).open("ab") as file:
        file.truncate(1 << 40)
    assert name in refusal(folder)


def test_what_nobody_reads_may_be_anything(folder: Path) -> None:
    os.mkfifo(folder / "fifo")
    (folder / "README.md").symlink_to("/dev/zero")
    (folder / "original").mkdir()
    (folder / "original.json").mkdir()
    describe(str(folder))
    ModelSource.open(ModelConfig(source=str(folder)))


@pytest.mark.parametrize("kind", ["device", "fifo", "socket"])
def test_a_model_that_is_neither_file_nor_folder_is_refused(tmp_path: Path, kind: str) -> None:
    ODD[kind](tmp_path / "model.gguf")
    assert "model.gguf" in refusal(tmp_path / "model.gguf")


@pytest.mark.parametrize("source", ["~nobody-of-this-name/model", "a\0b", "/" + "x" * 5000, "x" * 5000])
def test_a_name_that_no_file_can_have_is_one_line(source: str) -> None:
    with pytest.raises(PreflightError):
        describe(source)


def test_the_identity_of_the_assets_covers_their_names_and_content(folder: Path) -> None:
    def identity() -> str:
        return ModelSource.open(ModelConfig(source=str(folder))).assets_identity()

    seen = {identity()}
    assert identity() in seen
    (folder / "notes.txt").write_text("no part of it")
    assert identity() in seen
    for name in ("generation_config.json", "chat_template.jinja", "tokenizer.model", "tokenizer.json"):
        content = (folder / name).read_bytes() if (folder / name).exists() else b"{}"
        (folder / name).write_bytes(content + b" ")
        assert identity() not in seen, name
        seen.add(identity())
    assert ModelSource.open(ModelConfig(source="random://tiny-llama")).assets_identity() not in seen
    assert any(pattern == "*.jinja" for pattern in ASSETS)


BESIDE = ("tokenizer.model.v3", "vocab.bpe2", "source.vocab", "merges.old", "encoder.json", "bpe.codes")


def test_an_export_copies_every_file_of_the_tokenizer_and_none_else(folder: Path, tmp_path: Path) -> None:
    """Whatever loads it: sentencepiece, tiktoken, mistral-common, templates by name."""
    of_the_tokenizer = (
        *(
            "tekken.json",
            "qwen.tiktoken",
            "spiece.model",
            "tokenizer.model",
            "added_tokens.json",
            "vocab.txt",
        ),
        *("merges.txt", "special_tokens_map.json", "chat_template.json", "chat_template.jinja"),
        *("additional_chat_templates/rag.jinja", "additional_chat_templates/tool_use.jinja"),
        *BESIDE,
    )
    (folder / "additional_chat_templates").mkdir()
    source_of = {name: f'{{"{name}": 1}}'.encode() for name in of_the_tokenizer}
    for name, content in source_of.items():
        (folder / name).write_bytes(content)
    others = ("notes.md", "vocab.bin", "optimizer.pt", "additional_chat_templates/notes.md", "training.log")
    for name in others:
        (folder / name).write_bytes(b"x")
    ModelSource.open(ModelConfig(source=str(folder))).save_assets(tmp_path / "out")
    copied = {
        str(path.relative_to(tmp_path / "out")): path.read_bytes()
        for path in (tmp_path / "out").rglob("*")
        if path.is_file()
    }
    assert source_of.items() <= copied.items()
    assert not copied.keys() & set(others)
    assert copied_bytes(folder) == sum(
        len(content) for name, content in copied.items() if name != "config.json"
    )


def test_a_file_beside_the_tokenizer_is_no_part_of_the_identity_but_is_judged(
    folder: Path, tmp_path: Path
) -> None:
    """A run from before such files were copied goes on; nothing from outside the folder is published."""
    before = ModelSource.open(ModelConfig(source=str(folder))).assets_identity()
    for name in BESIDE:
        (folder / name).write_text("{}")
    assert ModelSource.open(ModelConfig(source=str(folder))).assets_identity() == before
    (tmp_path / "secret").write_text("key")
    for name in BESIDE:
        (folder / name).unlink()
        (folder / name).symlink_to(tmp_path / "secret")
        assert name in refusal(folder)
        (folder / name).unlink()
