"""Whole runs in which the answers of conversations are learned after the blocks."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engine_runs import Child, exported, failure, of, output, run_here

from engine.config.instructions import InstructionsConfig
from engine.config.loading import load
from engine.config.overrides import apply_overrides
from engine.config.validation import validate
from engine.config.writing import essential
from engine.data.encoding import Encoder
from engine.data.parts import Part
from engine.errors import DataError, UsageError
from engine.models.tokenizer import byte_tokenizer
from engine.phases.instructions import Conversations, InstructionWindows
from engine.run import events
from engine.run.directory import RunDirectory
from engine.run.shown import show_run

PAIR = {"prompt": "a", "response": "b"}
Make = Callable[..., RunDirectory]


@pytest.fixture(scope="session")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions with short answers; a system turn takes the place of Alpaca's preamble."""
    shared = tmp_path_factory.getbasetemp()
    path = (shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared) / "conversations.jsonl"
    rows = [
        {"system": "S", "instruction": f"Twice {n}?", "output": f"It is {2 * n}" + "!" * (n % 40)}
        for n in range(150)
    ]
    rows.append({"system": "S", "instruction": "Unanswered?", "output": ""})
    made = path.with_suffix(f".{os.getpid()}")
    made.write_text("\n".join(map(json.dumps, rows)))
    made.rename(path)
    return path


def settings(conversations: Path, **changes: object) -> dict[str, object]:
    return {
        "instructions.source": str(conversations),
        "instructions.template": "alpaca",
        "instructions.evaluation_sequences": 3,
        "e2e_qp.sequences": 8,
        "e2e_qp.val_sequences": 2,
        "e2e_qp.sequence_length": 128,
        "e2e_qp.batch_size": 4,
        "e2e_qp.micro_batch_size": 2,
        "e2e_qp.epochs": 3,
        "e2e_qp.text_weight": 0.1,
        "e2e_qp.lr": 0.05,
    } | changes


def test_answers_are_learned_and_measured_and_told(finished_once: Make, conversations: Path) -> None:
    run = finished_once(**settings(conversations))
    measured = {event.stage: event for event in of(run, events.Eval)}
    assert list(measured) == ["fp", "rtn", "block_ap", "e2e_qp"]
    assert len({event.answer_tokens for event in measured.values()}) == 1
    assert measured["fp"].answer_tokens > 50
    answers = {stage: event.answer_perplexity or 0.0 for stage, event in measured.items()}
    assert 1 < answers["e2e_qp"] < answers["block_ap"]
    codes = {event.code: event.message for event in of(run, events.Warning)}
    assert "1 of 151 rows are no conversations (1 without an answer)" in codes["instructions-rows"]
    shown = show_run(run)
    assert shown["answer_perplexity"] == answers
    assert shown["calibration"] == f"builtin, then answers of {conversations} (E2E-QP)"
    card = (run.path / "export" / "gptq_v2" / "README.md").read_text()
    assert f"| after E2E-QP | {answers['e2e_qp']:,.3f} |" in card
    assert "answer tokens of conversations held out of" in card


def test_killed_while_it_learns_answers_a_run_ends_with_the_same_bytes(
    make: Make, engine: Callable[..., Child], finished_once: Make, conversations: Path
) -> None:
    run = make(**settings(conversations))
    child = engine(run)
    child.until(lambda: any(e.phase == "e2e_qp" for e in of(run, events.Metric)))
    child.send(signal.SIGKILL)
    assert child.code() == -signal.SIGKILL
    assert run_here(run) == 0, output(run)
    assert exported(run) == exported(finished_once(**settings(conversations)))


def test_apart_and_by_weights_answers_are_learned_as_well(make: Make, conversations: Path) -> None:
    """Every conversation in a sequence of its own, integers moved, and no validation."""
    run = make(
        **{
            **settings(conversations),
            "e2e_qp.enabled": False,
            "e2e_qat.enabled": True,
            "e2e_qat.sequences": 8,
            "e2e_qat.val_sequences": 0,
            "e2e_qat.sequence_length": 128,
            "e2e_qat.batch_size": 4,
            "e2e_qat.micro_batch_size": 2,
            "e2e_qat.epochs": 2,
            "instructions.packing": False,
        }
    )
    assert run_here(run) == 0, output(run)
    answers = {event.stage: event.answer_perplexity or 0.0 for event in of(run, events.Eval)}
    assert 1 < answers["e2e_qat"] < answers["block_ap"]
    assert all(export.verified for export in of(run, events.Export))


@pytest.mark.parametrize(
    ("row", "changes", "code", "says"),
    [
        ({"text": "once"}, {}, 4, "has the columns text"),
        (PAIR, {"instructions.template": "model"}, 3, "no chat template"),
        (PAIR, {"instructions.template": "chatml"}, 3, "no token <|im_start|>"),
        (
            {"prompt": "a", "response": "b"},
            {"e2e_qp.sequence_length": 16},
            4,
            "too few conversations, training",
        ),
    ],
)
def test_what_cannot_be_learned_is_one_line(
    make: Make, tmp_path: Path, row: dict[str, str], changes: dict[str, object], code: int, says: str
) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    run = make(**settings(tmp_path / "rows.jsonl", **changes))
    assert run_here(run) == code
    assert says in failure(run, code).message


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"instructions.source": "a/b", "e2e_qp.enabled": "false"},
            "neither E2E-QP nor E2E-QAT nor LR-QAT is made",
        ),
        ({"instructions.source": "builtin"}, "is plain text, and instructions are conversations"),
        ({"instructions.source": "c4"}, "is plain text"),
        ({"instructions.split": "train"}, "instructions.source, which is not given"),
        ({"e2e_qp.text_weight": "-1"}, "e2e_qp.text_weight"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(changes: dict[str, object], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        validate(apply_overrides(load("smoke"), changes))


def test_a_run_without_instructions_says_nothing_of_them() -> None:
    tree = essential(load("smoke"))
    assert "instructions" not in tree
    assert "text_weight" not in tree["e2e_qp"]


def test_windows_are_drawn_once_and_what_was_said_is_said_again(conversations: Path) -> None:
    config = InstructionsConfig(source=str(conversations), template="alpaca")
    said: list[str] = []

    def drawn(part: Part, sequences: int, seed: int = 1) -> Conversations:
        windows = InstructionWindows(
            config, Encoder(byte_tokenizer(300)), seed, lambda code, text: said.append(code)
        )
        return windows.draw(part, sequences, 80)

    first = drawn("train", 150)
    assert sorted(set(said)) == ["instructions-cut", "instructions-rows", "text-repeated"]
    said.clear()
    again = drawn("train", 150)
    assert sorted(set(said)) == ["instructions-cut", "instructions-rows", "text-repeated"]
    assert torch.equal(first.tokens_NT, again.tokens_NT)
    assert torch.equal(first.answers.learned_NT, again.answers.learned_NT)
    assert torch.equal(first.answers.segments_NT, again.answers.segments_NT)
    assert not torch.equal(first.tokens_NT, drawn("train", 150, seed=2).tokens_NT)
    one, other = drawn("evaluation", 5, seed=1), drawn("evaluation", 5, seed=2)
    assert torch.equal(one.tokens_NT, other.tokens_NT), "what is reported does not depend on the seed"
    assert int(one.answers.counts_N.min()) > 0


def test_a_set_of_which_nothing_is_held_out_has_nothing_to_report(tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text(json.dumps({"system": "S", "instruction": "q", "output": "b"}))
    config = InstructionsConfig(source=str(tmp_path / "one.jsonl"), template="alpaca")
    windows = InstructionWindows(config, Encoder(byte_tokenizer(300)), 0, lambda code, text: None)
    for _ in range(2):  # read, and from the cache
        assert windows.draw("evaluation", 4, 96).tokens_NT.shape == (0, 96)
    assert windows.draw("train", 1, 96).tokens_NT.shape == (1, 96)


def test_too_few_conversations_are_refused_after_it_was_told_why(conversations: Path) -> None:
    said: list[str] = []
    config = InstructionsConfig(source=str(conversations), template="alpaca")
    windows = InstructionWindows(
        config, Encoder(byte_tokenizer(300)), 0, lambda code, text: said.append(text)
    )
    with pytest.raises(DataError, match=r"too few conversations, training: .* give 0 sequences of 32 tokens"):
        windows.draw("train", 4, 32)
    assert any("had no answer left and were left out" in text for text in said)
