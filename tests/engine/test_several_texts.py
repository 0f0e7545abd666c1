"""Runs that are measured on several texts and beside full precision: the numbers of plain transformers, kept
through a kill, shown everywhere, and runs from before them."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import Child, local_model, make_run, of, output, run_here
from transformers import AutoModelForCausalLM

from engine.config.data import DataConfig
from engine.config.formats import FORMATS
from engine.config.model import ModelConfig
from engine.data.encoding import Encoder
from engine.data.tokens import token_windows
from engine.errors import PreflightError, UsageError
from engine.export.measuring import measure
from engine.models.source import ModelSource
from engine.run import events
from engine.run.comparison import compared
from engine.run.directory import RunDirectory
from engine.run.housekeeping import clean_run
from engine.run.measured import How, MeasureRequest, measured
from engine.run.shown import show_run
from eqat_tui.compare_text import compare_text
from eqat_tui.report.page import report_page
from eqat_tui.run_text import report

Make = Callable[..., RunDirectory]
OTHERS = ("hf", "gguf", "mlx", "compressed-tensors", "auto-round")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of files, and a text of our own."""
    folder = tmp_path_factory.mktemp("several")
    local_model(folder / "model")
    lines = (
        f"Line {n}: the brown fox number {n * 7 % 31} sleeps for {n * n % 17} hours.\n" for n in range(60)
    )
    (folder / "own.txt").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def settings(place: Path) -> dict[str, object]:
    """Only rounded, so that it is quick."""
    return {
        "model.source": str(place / "model"),
        "block_ap.enabled": False,
        "e2e_qp.enabled": False,
        "grid.bits": 4,
        "grid.range": "minmax",  # as the baseline that is measured is rounded
        "export.dtype": "float32",
        "evaluation.data": ["builtin", str(place / "own.txt")],
    }


@pytest.fixture(scope="module")
def run(place: Path, settings: dict[str, object]) -> RunDirectory:
    made = make_run(place / "runs", {**settings, "export.formats": list(OTHERS)})
    assert run_here(made) == 0, output(made)
    return made


@pytest.fixture
def copied(run: RunDirectory, tmp_path: Path) -> RunDirectory:
    return RunDirectory.open(shutil.copytree(run.path, tmp_path / "runs" / run.id))


def windows_of(place: Path, source: str, count: int = 4, length: int = 16) -> torch.Tensor:
    model = ModelSource.open(ModelConfig(source=str(place / "model")))
    return token_windows(
        Encoder(model.tokenizer()), DataConfig(source=source), "evaluation", sequences=count, length=length
    )


def plain(full: Path, other: Path, ids_NT: torch.Tensor) -> dict[str, float]:
    """By the definitions, with the models as transformers loads them."""
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (full, other)]
    with torch.no_grad():
        z, y = (model(ids_NT).logits[:, :-1].double() for model in models)
        states = [model.model(ids_NT, output_hidden_states=True).hidden_states for model in models]
    p, q = z.log_softmax(-1), y.log_softmax(-1)
    labels = ids_NT[:, 1:, None]
    error = (states[1][1] - states[0][1]).norm(dim=-1) / states[0][1].norm(dim=-1)
    return {
        "fp": math.exp(-p.gather(-1, labels).mean().item()),
        "rtn": math.exp(-q.gather(-1, labels).mean().item()),
        "kl": (p.exp() * (p - q)).sum(-1).mean().item(),
        "top1": (z.argmax(-1) == y.argmax(-1)).double().mean().item(),
        "logit_error": (z - y).abs().amax(-1).mean().item(),
        "largest_logit_error": (z - y).abs().max().item(),
        "first_block": error.mean().item(),
    }


def test_every_number_is_that_of_plain_transformers(run: RunDirectory, place: Path) -> None:
    full, rounded = of(run, events.Eval)
    assert (full.stage, rounded.stage) == ("fp", "rtn")
    assert full.divergence is None
    assert full.block_errors == ()
    want = plain(place / "model", run.export_dir / "hf", windows_of(place, "builtin"))
    assert full.perplexity == pytest.approx(want["fp"], rel=1e-5)
    assert rounded.perplexity == pytest.approx(want["rtn"], rel=1e-5)
    assert rounded.divergence is not None
    for name in ("kl", "top1", "logit_error", "largest_logit_error"):
        assert getattr(rounded.divergence, name) == pytest.approx(want[name], rel=1e-3), name
    assert len(rounded.block_errors) == 4
    assert rounded.block_errors[0] == pytest.approx(want["first_block"], rel=1e-3)
    (own,) = rounded.texts
    assert own.corpus == str(place / "own.txt")
    want = plain(place / "model", run.export_dir / "hf", windows_of(place, own.corpus))
    assert full.texts[0].perplexity == pytest.approx(want["fp"], rel=1e-5)
    assert own.perplexity == pytest.approx(want["rtn"], rel=1e-5)
    assert own.tokens == 4 * 15
    assert own.divergence is not None
    assert own.divergence.kl == pytest.approx(want["kl"], rel=1e-3)


def test_one_text_without_a_comparison_is_measured_as_it_was(
    make: Make, run: RunDirectory, settings: dict[str, object]
) -> None:
    alone = make(**{**settings, "evaluation.data": "builtin", "evaluation.divergence": False})
    assert run_here(alone) == 0, output(alone)
    for one, both in zip(of(alone, events.Eval), of(run, events.Eval), strict=True):
        assert one.perplexity == pytest.approx(both.perplexity, rel=1e-6)
        assert (one.tokens, one.texts, one.divergence, one.block_errors) == (both.tokens, (), None, ())


def test_they_are_shown_reported_compared_and_on_the_card(run: RunDirectory, copied: RunDirectory) -> None:
    shown, own = show_run(run), str(run.path.parents[1] / "own.txt")
    assert shown["divergence"]["rtn"]["kl"] > 0
    assert len(shown["block_errors"]["rtn"]) == 4
    assert set(shown["texts"][own]) == {"fp", "rtn"}
    assert json.loads(json.dumps(shown))["texts"][own]["rtn"]["divergence"]["top1"] <= 1
    words = report(shown)
    for part in ("from full precision", "KL, nats", f"perplexity on {own}"[:60]):
        assert part in words
    page = report_page([run])
    assert "same first token" in page
    assert "Error behind each block" in page
    card = (run.export_dir / "hf" / "README.md").read_text()
    assert "## Divergence from full precision" in card
    assert "## Perplexity on other texts" in card


def killed_in_the_second_evaluation() -> None:
    """In this process: it dies while the rounded model reads, with half of the blocks behind it."""
    from engine.phases import evaluation

    plainly = evaluation.read

    def read(version: Any, full: Any, *arguments: Any, **options: Any) -> Any:
        def on_progress(done: int, of: int) -> None:
            if full is not None and done > of // 2:
                os.kill(os.getpid(), signal.SIGKILL)

        return plainly(version, full, *arguments, **{**options, "on_progress": on_progress})

    evaluation.read = read


def test_a_run_killed_within_an_evaluation_goes_on_to_the_same_numbers(
    make: Make, engine: Callable[..., Child], run: RunDirectory, settings: dict[str, object]
) -> None:
    cut_off = make(**settings)
    child = engine(cut_off, before=killed_in_the_second_evaluation)
    assert child.code() == -signal.SIGKILL
    assert [event.stage for event in of(cut_off, events.Eval)] == ["fp"]
    assert run_here(cut_off) == 0, output(cut_off)
    again, whole = of(cut_off, events.Eval)[-1], of(run, events.Eval)[-1]
    assert (again.perplexity, again.divergence) == (whole.perplexity, whole.divergence)
    assert (again.texts, again.block_errors) == (whole.texts, whole.block_errors)


def test_a_log_from_before_is_shown_as_it_was(run: RunDirectory, copied: RunDirectory) -> None:
    lines = []
    for line in copied.events_path.read_text().splitlines():
        event = json.loads(line)
        for name in ("texts", "divergence", "block_errors"):
            event.pop(name, None)
        lines.append(json.dumps(event))
    copied.events_path.write_text("\n".join(lines) + "\n")
    older, newer = show_run(copied), show_run(run)
    assert older["perplexity"] == newer["perplexity"]
    assert (older["divergence"], older["block_errors"], older["texts"]) == ({}, {}, {})
    assert "KL" not in report(older)
    words = compare_text(compared([run, copied]))
    assert "KL from full precision" in words


def test_another_text_and_context_are_measured_later_and_kept_beside_the_run(
    run: RunDirectory, copied: RunDirectory, place: Path
) -> None:
    own = str(place / "own.txt")
    before, asked = show_run(copied), ("--text", own, "--context", "24", "--windows", "3")
    for _ in range(2):  # the second one replaces the first
        assert run_here(copied, "--task", "eval", *asked) == 0, output(copied)
    (kept,) = measured(copied)
    want = plain(place / "model", run.export_dir / "hf", windows_of(place, own, 3, 24))
    assert (kept.stage, kept.corpus, kept.sequence_length, kept.tokens) == ("rtn", own, 24, 3 * 23)
    assert kept.perplexity == pytest.approx(want["rtn"], rel=1e-5)
    assert kept.full_precision == pytest.approx(want["fp"], rel=1e-5)
    assert kept.divergence is not None
    assert kept.divergence.kl == pytest.approx(want["kl"], rel=1e-3)
    assert kept.block_errors[0] == pytest.approx(want["first_block"], rel=1e-3)
    after = show_run(copied)
    for name in ("perplexity", "divergence", "texts", "state", "exports", "phases"):
        assert after[name] == before[name], name
    assert after["measured"][0]["tokens"] == 69
    assert "measured on" in report(after)
    assert f"perplexity on {own} at context 24"[:60] in compare_text(compared([run, copied]))
    clean_run(copied)
    assert len(measured(copied)) == 1  # nothing that can be made again


@pytest.mark.parametrize("name", ["model", "gguf", "mlx", "auto-round"])
def test_every_kind_of_checkpoint_is_measured(run: RunDirectory, place: Path, name: str) -> None:
    folder = place / "model" if name == "model" else run.export_dir / name
    own = place / "own.txt"
    found = measure(
        MeasureRequest(
            source=str(folder),
            reference=str(place / "model"),
            how=How(texts=("builtin", str(own)), sequence_length=16, windows=4),
            device="cpu",
        )
    )
    assert found["format"] == ("hf" if name == "model" else name)
    assert found["label"] == FORMATS[found["format"]].label
    first, second = found["measured"]
    full, rounded = of(run, events.Eval)
    like = full if name == "model" else rounded
    # GGUF's 4-bit groups keep a rounded bias in the place of a zero point.
    near = 1e-2 if name == "gguf" else 1e-4
    assert first["perplexity"] == pytest.approx(like.perplexity, rel=near)
    assert second["perplexity"] == pytest.approx(like.texts[0].perplexity, rel=near)
    assert first["full_precision"] == pytest.approx(full.perplexity, rel=1e-5)
    if name == "model":
        assert first["divergence"]["kl"] == 0
    else:
        assert first["divergence"]["kl"] == pytest.approx(rounded.divergence.kl, rel=0.1)  # type: ignore[union-attr]


def test_what_cannot_be_measured_is_refused_in_a_line(
    run: RunDirectory, place: Path, tmp_path: Path, stories: Path
) -> None:
    def asked(source: Path, **options: Any) -> MeasureRequest:
        how = How(texts=("builtin",), sequence_length=16, windows=2)
        return MeasureRequest(source=str(source), **{"how": how, "device": "cpu", **options})

    with pytest.raises(PreflightError, match=r"config\.json is missing"):
        measure(asked(tmp_path))
    made = shutil.copytree(run.export_dir / "compressed-tensors", tmp_path / "packed")
    config = json.loads((made / "config.json").read_text())
    group = next(iter(config["quantization_config"]["config_groups"].values()))
    group["input_activations"] = {"num_bits": 8}
    (made / "config.json").write_text(json.dumps(config))
    with pytest.raises(PreflightError, match="cannot be measured: its activations are quantized as well"):
        measure(asked(made))
    with pytest.raises(PreflightError, match=r"it has \d+ \w+, and the checkpoint \d+"):
        measure(asked(place / "model", reference=str(stories)))


def test_a_context_is_at_most_what_the_model_was_made_for(place: Path) -> None:
    found = measure(
        MeasureRequest(source=str(place / "model"), how=How(texts=("builtin",), windows=1), device="cpu")
    )
    reach = json.loads((place / "model" / "config.json").read_text())["max_position_embeddings"]
    assert found["measured"][0]["sequence_length"] == min(2048, reach)
    with pytest.raises(UsageError):
        measure(MeasureRequest(source=str(place / "model"), how=How(sequence_length=1), device="cpu"))
