"""A run of a model whose tokenizer begins texts with a token: what it reads, what it says, how it goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
from engine_runs import change, exported, failure, of, run_here
from tokenizers import processors

from engine.config.loading import load
from engine.models.tokenizer import SPECIAL, byte_tokenizer
from engine.run import events, generations
from engine.run.directory import RunDirectory
from engine.run.redo import make_redo
from engine.run.shown import show_run
from engine.run.state import load_state
from eqat_tui.run_text import report
from eqat_tui.views.result import perplexities

Make = Callable[..., RunDirectory]
BEGIN = SPECIAL[1]


@pytest.fixture
def begins(tmp_path: Path) -> str:
    """A tiny model whose tokenizer writes a begin-of-text token."""
    folder = tiny.build(tmp_path / "model", "llama2")
    tokenizer = byte_tokenizer(tiny.SIZES["vocab_size"])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, 1)]
    )
    tokenizer.save_pretrained(folder)
    return str(folder)


def from_before(run: RunDirectory) -> None:
    """Make the run one of a version that did not know how sequences can begin."""
    text = run.config_toml.read_text()
    kept = [line for line in text.splitlines() if not line.startswith("bos = ")]
    assert len(kept) == len(text.splitlines()) - 1
    run.config_toml.write_text("\n".join(kept))
    place = run.checkpoints_dir
    found = generations.read_generation(place, generations.newest(place))
    identity = {name: value for name, value in found.identity.items() if name != "model.bos"}
    assert len(identity) == len(found.identity) - 1
    older = replace(found, number=found.number + 1, identity=identity)
    older.entries = {name: value for name, value in found.entries.items() if name == "block-000"}
    older.facts = {name: value for name, value in found.facts.items() if name in ("eval_fp", "eval_rtn")}
    for path in place.glob("generation-*"):
        path.unlink()
    generations.publish(place, older)


def test_how_sequences_begin_is_said_and_a_run_from_before_goes_on_as_it_began(
    begins: str, make: Make
) -> None:
    now = make(**{"model.source": begins, "grid.group_size": 32})
    assert run_here(now) == 0
    said = f"each sequence begins with {BEGIN}"
    assert {e.begin for e in of(now, events.Eval)} == {said}
    assert show_run(now)["evaluation"]["begin"] == said
    assert said in report(show_run(now))
    shown = perplexities(load_state(now), 80)
    assert any(said in "".join(text for text, _ in words) for words in shown)
    assert said in (now.export_dir / "gptq_v2" / "README.md").read_text()
    assert (now.manifest() or {})["data"]["begin"] == said

    before = make(**{"model.source": begins, "grid.group_size": 32, "model.bos": "text"})
    assert run_here(before) == 0
    whole = exported(before)
    assert {e.begin for e in of(before, events.Eval)} == {f"{BEGIN} begins the text, not each sequence"}
    assert whole["model.safetensors"] != exported(now)["model.safetensors"], "the windows are others"
    from_before(before)
    assert before.config().model.bos == "text"
    assert run_here(before) == 0
    assert exported(before) == whole
    redone = make_redo(before, 1, {})
    assert redone.config().model.bos == "text"

    # Whoever edits the setting into such a run is told that it decides.
    change(before, **{"model.bos": "auto"})
    assert run_here(before) == 8
    assert failure(before, 8).where in ("model.bos", "data")


def test_a_run_directory_from_before_starts_again_as_it_was(make: Make) -> None:
    run = make()
    run.config_toml.write_text(run.config_toml.read_text().replace('bos = "auto"\n', ""))
    assert load(str(run.path)).model.bos == run.config().model.bos == "text"
    assert load("smoke").model.bos == "auto"
    assert load("paper").model.bos == load("llama-3-8b-w2g64").model.bos == "text"


def test_tokens_without_a_row_end_only_what_uses_them(make: Make, tmp_path: Path) -> None:
    folder = tiny.build(tmp_path / "model", "llama2")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "pad_token_id": settings["vocab_size"]}))
    tokenizer = byte_tokenizer(tiny.SIZES["vocab_size"])
    tokenizer.add_tokens(["<image>"])
    tokenizer.add_special_tokens({"pad_token": "<|padding|>"})
    tokenizer.save_pretrained(folder)
    options = {"model.source": str(folder), "grid.group_size": 32, "e2e_qp.enabled": False}
    run = make(**options)
    assert run_here(run) == 0
    assert run_here(run, "--task", "generate", "--new-tokens", "2", "--prompt=an image") == 0
    assert len(of(run, events.Sample)) == 2
    assert run_here(run, "--task", "generate", "--new-tokens", "2", "--prompt=an <image>") == 4
    assert "<image>" in of(run, events.Error)[-1].message

    (tmp_path / "a.txt").write_text("a text with an <image> in it\n" * 500)
    refused = make(**options, **{"data.source": str(tmp_path / "a.txt")})
    assert run_here(refused) == 4
    error = failure(refused, 4)
    assert "<image>" in error.message
    assert error.where == f"data.source: {tmp_path / 'a.txt'}"
    assert not of(refused, events.BlockStarted)
