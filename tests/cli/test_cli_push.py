"""``eqat push``: what is sent is shown first, is the export and nothing else, and refusals are one line."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_tools import Eqat
from hub_upload import TOKEN, UploadHub, upload_hub

from engine.config.loading import load
from engine.errors import IdentityError, PreflightError, UsageError
from engine.run import events
from engine.run.directory import RunDirectory
from engine.run.event_log import EventWriter
from eqat_tui.pushing import carded, chosen, push

CARD = """---
library_name: transformers
pipeline_tag: text-generation
license: apache-2.0
tags:
- eqat
---

# A model
"""
FILES = {
    "README.md": CARD.encode(),
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": b"0123456789" * 1000,
    "nested/extra.json": b"{}",
}


@pytest.fixture
def hub() -> Iterator[UploadHub]:
    with upload_hub() as server:
        yield server


@pytest.fixture
def given(hub: UploadHub, tmp_path: Path) -> dict[str, str]:
    """The environment of somebody who is logged in to it."""
    return {
        "HF_ENDPOINT": hub.address,
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "no_proxy": "127.0.0.1",
    }


def exported(where: Path, *formats: str, verified: bool = True) -> RunDirectory:
    """A finished run with exports of a few small files."""
    run = RunDirectory.create(where / "runs", load("smoke"))
    with EventWriter(run.events_path, 1) as writer:
        for name in formats:
            for path, content in FILES.items():
                place = run.path / "export" / name / path
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(content)
            writer.emit(
                events.Export(
                    format=name,
                    path=f"export/{name}",
                    verified=verified,
                    bytes=9,
                    fp_bytes=9,
                    bits_per_weight=4.5,
                    files={path: hashlib.sha256(content).hexdigest() for path, content in FILES.items()},
                )
            )
        writer.emit(events.RunFinished(outcome="done", exit_code=0, seconds=5.5))
    return run


def test_the_export_and_nothing_else_is_sent(
    eqat: Eqat, tmp_path: Path, hub: UploadHub, given: dict[str, str]
) -> None:
    exported(tmp_path, "gptq_v2")
    sent = eqat("push", "latest", "somebody/model", "--yes", "--base-model", "maker/base", **given)
    assert sent.returncode == 0, sent.stderr
    assert sent.stdout.strip() == f"{hub.address}/somebody/model/commit/1"
    card = hub.files.pop("README.md").decode()
    assert card == carded(CARD, "maker/base")
    assert hub.files == {name: content for name, content in FILES.items() if name != "README.md"}
    assert hub.commits == ["main"]
    for words in (
        f"{hub.address}/somebody/model",
        "maker/base",
        "apache-2.0",
        "4 files, ",
        "nested/extra.json",
    ):
        assert words in sent.stderr


def test_a_private_repository_and_a_branch(
    eqat: Eqat, tmp_path: Path, hub: UploadHub, given: dict[str, str]
) -> None:
    exported(tmp_path, "gptq_v2", "mlx")
    refused = eqat("push", "latest", "somebody/model", "--yes", **given)
    assert (refused.returncode, hub.made) == (2, [])
    assert "has exports in 2 formats (--format: gptq_v2, mlx)" in refused.stderr
    options = ("--format", "mlx", "--revision", "w4", "--private", "--yes")
    sent = eqat("push", "latest", "somebody/model", *options, **given)
    assert sent.returncode == 0, sent.stderr
    made = hub.made[0]  # which way it says so depends on the library's release
    assert made.get("visibility") == "private" or made.get("private") is True
    assert (hub.branches, hub.commits) == (["w4"], ["w4"])
    assert hub.files == FILES


def test_without_a_yes_nothing_is_sent(
    eqat: Eqat, tmp_path: Path, hub: UploadHub, given: dict[str, str]
) -> None:
    exported(tmp_path, "gptq_v2")
    refused = eqat("push", "latest", "somebody/model", **given)
    assert (refused.returncode, hub.made) == (2, [])
    assert "there is no terminal to ask on (--yes sends it without asking)" in refused.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("change", "refuse", "code", "words"),
    [
        ({"HF_TOKEN": "hf_wrong"}, 0, 3, "does not let this account write there (`hf auth login`"),
        ({"HF_TOKEN": ""}, 0, 3, "hf auth login"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, 0, 3, "the hub cannot be reached"),
        ({"HF_HUB_OFFLINE": "1"}, 0, 3, "HF_HUB_OFFLINE is set"),
        ({}, 403, 3, "does not let this account write there"),
        ({}, 500, 3, "the hub answers 500"),
    ],
)
def test_a_refusal_is_one_line(
    eqat: Eqat,
    tmp_path: Path,
    hub: UploadHub,
    given: dict[str, str],
    change: dict[str, str],
    refuse: int,
    code: int,
    words: str,
) -> None:
    exported(tmp_path, "gptq_v2")
    hub.refuse = refuse
    refused = eqat("push", "latest", "somebody/model", "--yes", **{**given, **change})
    last = refused.stderr.splitlines()[-1]
    assert (refused.returncode, hub.files) == (code, {})
    assert last.startswith("error: somebody/model: ")
    assert words in last
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize(
    ("repo", "formats", "verified", "words"),
    [
        ("somebody/model", (), True, "has no export"),
        ("somebody/model", ("gptq_v2",), False, "was not verified"),
        ("some body/model", ("gptq_v2",), True, "is no name of a repository"),
    ],
)
def test_what_cannot_be_sent_is_refused(
    eqat: Eqat,
    tmp_path: Path,
    given: dict[str, str],
    repo: str,
    formats: tuple[str, ...],
    verified: bool,
    words: str,
) -> None:
    exported(tmp_path, *formats, verified=verified)
    refused = eqat("push", "latest", repo, "--yes", **given)
    assert refused.returncode == 2
    assert words in refused.stderr.splitlines()[-1]


def test_what_was_changed_since_it_was_verified_is_not_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = exported(tmp_path, "gptq_v2")
    folder = run.path / "export" / "gptq_v2"
    ask = {"format": None, "base": None, "revision": None, "private": False, "yes": False}
    monkeypatch.setattr("sys.stdin", io.StringIO())
    with pytest.raises(UsageError, match="no terminal to ask on"):
        push(run, "somebody/model", **ask)  # type: ignore[arg-type]
    (folder / "model.safetensors").write_bytes(b"0123456780" * 1000)
    with pytest.raises(IdentityError, match=r"model\.safetensors: is not what was verified \(eqat export "):
        push(run, "somebody/model", **ask)  # type: ignore[arg-type]
    (folder / "model.safetensors").write_bytes(FILES["model.safetensors"])
    for spoil in (lambda card: card.write_bytes(b"\xff"), lambda card: card.unlink()):
        spoil(folder / "README.md")
        with pytest.raises(PreflightError, match=r"README\.md: cannot be read: .* \(eqat export "):
            push(run, "somebody/model", **ask)  # type: ignore[arg-type]


@pytest.mark.parametrize("path", ["{}", "../../mine", "export/../../../mine"])
def test_a_log_that_somebody_made_up_sends_nothing_but_exports(tmp_path: Path, path: str) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "README.md").write_text(CARD)
    run = exported(tmp_path, "gptq_v2")
    (run.path / "export" / "linked").symlink_to(mine)
    with EventWriter(run.events_path, 2) as writer:
        for name, place in (("gptq_v2", path.format(mine)), ("linked", "export/linked")):
            writer.emit(
                events.Export(
                    format=name, path=place, verified=True, bytes=9, fp_bytes=9, bits_per_weight=4.5
                )
            )
    with pytest.raises(UsageError, match="has no export"):
        chosen(run, None)


def test_a_card_names_one_base_model() -> None:
    named = carded(CARD, "maker/base")
    lines = named.splitlines()
    assert lines[2:6] == [
        "pipeline_tag: text-generation",
        "base_model: maker/base",
        "base_model_relation: quantized",
        "license: apache-2.0",
    ]
    assert carded(named, "maker/other") == carded(CARD, "maker/other")
    assert carded(CARD, None) == CARD
    for wrong in ("base", "a/b/c", "/models/x", "a/b\nlicense: mit"):
        with pytest.raises(UsageError, match="is no hub id"):
            carded(CARD, wrong)
