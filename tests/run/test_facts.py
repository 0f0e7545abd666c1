"""Every value that a checkpoint remembers has a type, and a bound where it counts something."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest

from engine.run import facts

SAMPLER = {"step": 3, "count": 4, "batch_size": 2, "epochs": 2, "seed": 5, "drop_last": 0}
TRAINING: dict[str, Any] = {
    "phase": "block_ap",
    "block": 2,
    "started": True,
    "epochs_done": 1,
    "stale": 0,
    "restarts": 0,
    "steps_done": 3,
    "micro_batch": 2,
    "initial_val": 0.5,
    "noted": {"initial_loss": 0.25},
    "sampler": SAMPLER,
    "step.steps": 3,
    "step.scaler": {"scale": 65536.0, "good_steps": 1.0},
    "best.val_loss": None,
}
STREAMS = {
    "border": 2,
    "shape": [6, 16, 64],
    "dtype": "torch.float32",
    "sha256": {"full": "a" * 64, "quantized": "b" * 64},
    "bytes": 100,
    "seconds": 0.5,
}
EVAL = {"perplexity": 12.5, "tokens": 60, "seconds": 0.1, "accuracy": {"piqa": 0.5}, "questions": {"piqa": 4}}
DIVERGENCE = {"kl": 0.1, "top1": 0.9, "logit_error": 0.5, "largest_logit_error": 2.0}
FURTHER = {
    "texts": [{"corpus": "c4", "perplexity": 8.5, "tokens": 60, "divergence": DIVERGENCE}],
    "divergence": DIVERGENCE,
    "block_errors": [0.1, None],
}

GOOD: list[tuple[str, Any]] = [
    ("losses-003", {"initial_loss": 1.0, "final_loss": 0.5, "val_loss": None}),
    ("eval_fp", EVAL),
    ("eval_e2e_qp", {"perplexity": None, "tokens": 60, "seconds": 0.1}),
    ("eval_rtn", {**EVAL, "further": FURTHER}),
    ("training", TRAINING),
    ("training", {**TRAINING, "phase": "e2e_qp", "block": None, "initial_val": math.nan}),
    ("streams", STREAMS),
    ("halvings-quantized", [[1, 0], [3, 12]]),
    ("block_ap_micro_batch", 2),
    ("block_ap_micro_batch", [[0, 4], [3, 2]]),
    ("numbers_together", 1 << 23),
    ("e2e_qp_done", True),
]
BAD: list[tuple[str, Any]] = [
    ("losses-003", None),
    ("losses-003", {"final_loss": "0.5"}),
    ("losses-003", {"finam_loss": 0.5}),
    *[("eval_fp", {**EVAL, "perplexity": wrong}) for wrong in (math.nan, math.inf, -1.0, 0.0, "12", [])],
    *[("eval_fp", {**EVAL, "tokens": wrong}) for wrong in (-1, 1.5, 1 << 70, None)],
    ("eval_fp", {**EVAL, "seconds": math.inf}),
    ("eval_fp", {**EVAL, "accuracy": {"piqa": 1.5}}),
    ("eval_fp", {**EVAL, "tokenr": 60}),
    ("eval_fp", {"perplexity": 12.5}),
    *[
        ("eval_rtn", {**EVAL, "further": {**FURTHER, "divergence": {**DIVERGENCE, name: wrong}}})
        for name, wrong in (("kl", -1.0), ("kl", math.inf), ("top1", 1.5), ("logit_error", "much"))
    ],
    ("eval_rtn", {**EVAL, "further": {**FURTHER, "block_errors": [math.nan]}}),
    ("eval_rtn", {**EVAL, "further": {**FURTHER, "text": []}}),
    *[("training", {**TRAINING, "block": wrong}) for wrong in (None, -1, 10**9, "2")],
    *[("training", {**TRAINING, "micro_batch": wrong}) for wrong in (0, -2, 1 << 40, 2.5)],
    *[("training", {name: v for name, v in TRAINING.items() if name != missing}) for missing in TRAINING],
    *[("training", {**TRAINING, "sampler": {**SAMPLER, "step": wrong}}) for wrong in (-1, 5, 10**12)],
    *[("training", {**TRAINING, "sampler": {**SAMPLER, "count": wrong}}) for wrong in (0, 10**12)],
    *[("streams", {**STREAMS, "border": wrong}) for wrong in (-1, "../../x", 10**6)],
    ("streams", {**STREAMS, "sha256": {"../../x": "a" * 64}}),
    ("streams", {**STREAMS, "sha256": {"full": "A" * 64}}),
    ("streams", {**STREAMS, "shape": [1, 2]}),
    *[("halvings-full", wrong) for wrong in (None, 3, [[1]], [[-1, 0]], [[1, 0, 0]])],
    *[("block_ap_micro_batch", wrong) for wrong in (0, -1, 1 << 40, True, "2", [[0, 0]])],
    *[("numbers_together", wrong) for wrong in (None, 0, -1, 1 << 50, 2.5, "8")],
    *[("e2e_qp_done", wrong) for wrong in (False, 1, "true", None)],
]


@pytest.mark.parametrize(("name", "value"), GOOD)
def test_what_the_engine_writes_is_accepted(name: str, value: Any) -> None:
    before = copy.deepcopy(value)
    assert facts.is_known(name)
    assert facts.problem_of(name, value) == ""
    assert repr(value) == repr(before)


@pytest.mark.parametrize(("name", "value"), BAD)
def test_what_has_another_type_or_counts_to_no_end_is_a_problem(name: str, value: Any) -> None:
    assert facts.problem_of(name, value)


def test_only_what_tells_or_saves_time_may_be_left_out_alone() -> None:
    assert {name for name, _ in GOOD if not facts.decides(name)} == {
        "losses-003",
        "eval_fp",
        "eval_e2e_qp",
        "eval_rtn",
        "streams",
    }


@pytest.mark.parametrize("name", ["losses-3", "eval_xx", "halvings-other", "e2e_qp_donf", "streamz", ""])
def test_other_names_are_unknown(name: str) -> None:
    assert not facts.is_known(name)


def test_the_number_of_sequences_at_a_time_is_the_last_that_was_noted() -> None:
    for value, expected in ((None, None), (4, 4), ([], None), ([[0, 4], [3, 2]], 2)):
        assert facts.micro_batch_after(value) == expected
