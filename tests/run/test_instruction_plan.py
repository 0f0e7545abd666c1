"""What conversations change in a plan, and what they leave as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.architecture.description import describe
from engine.config.learning import learned_words
from engine.config.loading import load
from engine.config.run import RunConfig
from engine.config.sameness import config_hash
from engine.config.stages import STAGES, answer_length, learns_answers
from engine.errors import DataError
from engine.offline import everything_is_local
from engine.plan.estimate import Workload
from engine.plan.memory_model import phase_memory
from engine.plan.own_text import own_text_windows
from engine.plan.plan import make_plan
from engine.plan.streams import may_share_teacher


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "a", "response": "b"}))
    return path


def config(rows: Path, **changes: Any) -> RunConfig:
    return load("smoke", overrides={"instructions.source": str(rows), **changes})


def work(config: RunConfig) -> Workload:
    return Workload(arch=describe(config.model.source).architecture, config=config, cuda=False, windows=4)


def masks(config: RunConfig) -> int:
    return phase_memory(work(config), "e2e_qp").device.get("masks of packed conversations", 0)


def test_masks_of_packed_conversations_grow_with_the_square_of_their_length(rows: Path) -> None:
    short, long = (masks(config(rows, **{"e2e_qp.sequence_length": length})) for length in (64, 128))
    assert 0 < 4 * short == long
    assert masks(config(rows, **{"instructions.packing": False})) == 0
    assert masks(load("smoke")) == 0


def test_measuring_answers_takes_time_and_room(rows: Path) -> None:
    changes = {"e2e_qp.sequence_length": 512, "instructions.evaluation_sequences": 500}
    many, none = config(rows, **changes), config(rows, **{**changes, "instructions.evaluation_sequences": 0})
    assert phase_memory(work(many), "evaluate_fp").stored > phase_memory(work(none), "evaluate_fp").stored

    def seconds(of: RunConfig) -> float:
        return next(phase.seconds for phase in make_plan(of).phases if phase.name == "evaluate_e2e_qp")

    assert seconds(many) > seconds(none)


def test_conversations_are_no_calibration_text(rows: Path) -> None:
    own = config(rows, **{"data.source": "self", "e2e_qp.sequence_length": 100})
    assert set(own_text_windows(own)) == {own.block_ap.sequence_length}
    same = config(rows)
    assert may_share_teacher(load("smoke"), cuda=False)
    assert not may_share_teacher(same, cuda=False)
    assert learned_words(same) == f"builtin, then answers of {rows} (E2E-QP)"
    assert make_plan(same).calibration == learned_words(same)
    assert learned_words(load("smoke")) == "builtin"


def test_a_file_of_conversations_is_local_and_has_to_be_there(rows: Path) -> None:
    assert everything_is_local(config(rows))
    assert not everything_is_local(config(rows, **{"instructions.source": "tatsu-lab/alpaca"}))
    # Nobody reads the text of data where no block is trained.
    assert everything_is_local(config(rows, **{"data.source": "c4", "block_ap.enabled": False}))
    with pytest.raises(DataError, match=r"no such file.*instructions.source"):
        make_plan(config(rows, **{"instructions.source": "./gone.jsonl"}))


def test_a_run_without_conversations_is_the_run_that_it_was(rows: Path) -> None:
    plain = load("smoke")
    assert config_hash(plain) == config_hash(load("smoke", overrides={"e2e_qp.text_weight": 0.0}))
    assert config_hash(plain) != config_hash(config(rows))
    assert answer_length(plain) == 0
    assert not any(learns_answers(plain, stage) for stage in STAGES)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_published_set_up_takes_ten_thousand_steps_of_sixteen(bits: int) -> None:
    made = load(f"llama-7b-w{bits}g64-alpaca")
    assert made.grid.bits == bits
    assert (made.instructions.source, made.instructions.template) == ("tatsu-lab/alpaca", "alpaca")
    section = made.e2e_qp
    assert section.epochs * section.sequences // section.batch_size == 10_000
    assert (section.batch_size, section.sequence_length, section.loss) == (16, 384 + 128, "cross_entropy")
    assert made.block_ap == load("paper").block_ap
