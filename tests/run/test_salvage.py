"""What is left of a generation without some of its objects: a table."""

from __future__ import annotations

from typing import Any

import pytest

from engine.run.generations import Generation
from engine.run.salvage import leading_blocks, progress, salvage

TRAINING = {
    "phase": "block_ap",
    "block": 3,
    "steps_done": 7,
    "epochs_done": 1,
}
EVALS = {f"eval_{stage}": {"perplexity": 9.0} for stage in ("fp", "rtn", "block_ap", "e2e_qp")}


def generation(
    blocks: int, *, done: bool = False, facts: dict[str, Any] | None = None, training: bool = False
) -> Generation:
    entries = {f"block-{index:03d}": f"{index}" for index in range(blocks)}
    known: dict[str, Any] = {f"losses-{index:03d}": {"final_loss": index} for index in range(blocks)}
    if done:
        entries |= {f"scales-{index:03d}": f"s{index}" for index in range(blocks)}
        known["e2e_qp_done"] = True
    if training:
        entries["training"] = "t"
    return Generation(5, entries, {**known, **(facts or {})}, {"model": "m"})


INSIDE_BLOCK = generation(3, facts={"training": TRAINING, "eval_fp": 1}, training=True)
INSIDE_E2E = generation(
    4,
    facts={"training": {**TRAINING, "phase": "e2e_qp", "block": None}, "eval_block_ap": 1, "eval_rtn": 1},
    training=True,
)
DONE = generation(4, done=True, facts=EVALS)


def left(found: Generation) -> set[str]:
    return {*found.entries, *found.facts}


def names(text: str) -> set[str]:
    """``block-0 losses-0`` with the digits in full."""
    return {f"{w[:-1]}00{w[-1]}" if w[-1].isdigit() else w for w in text.split()}


BLOCKS_01 = "block-0 block-1 losses-0 losses-1"
BLOCKS = BLOCKS_01 + " block-2 block-3 losses-2 losses-3"

CASES: dict[str, tuple[Generation, str, bool, str, str]] = {
    # generation, damaged, chained: left, words
    "a block takes those after it": (
        INSIDE_BLOCK,
        "block-1",
        True,
        "block-0 losses-0 eval_fp",
        "blocks 1 to 2 and what was trained of block 3 so far",
    ),
    "the last block takes the state of the next": (
        INSIDE_BLOCK,
        "block-2",
        True,
        BLOCKS_01 + " eval_fp",
        "block 2 and what was trained of block 3 so far",
    ),
    "the state of a training takes nothing": (
        INSIDE_BLOCK,
        "training",
        True,
        BLOCKS_01 + " block-2 losses-2 eval_fp",
        "what was trained of block 3 so far",
    ),
    "end-to-end training depends on every block": (
        INSIDE_E2E,
        "block-3",
        True,
        BLOCKS_01 + " block-2 losses-2 eval_rtn",
        "block 3 and what was trained of the end-to-end training so far",
    ),
    "its state takes no block": (
        INSIDE_E2E,
        "training",
        True,
        BLOCKS + " eval_block_ap eval_rtn",
        "what was trained of the end-to-end training so far",
    ),
    "scales depend on each other": (
        DONE,
        "scales-2",
        True,
        BLOCKS + " eval_fp eval_rtn eval_block_ap",
        "the end-to-end training",
    ),
    "scales depend on every block": (
        DONE,
        "block-2",
        True,
        BLOCKS_01 + " eval_fp eval_rtn",
        "blocks 2 to 3 and the end-to-end training",
    ),
    "the first block takes everything that was trained": (
        DONE,
        "block-0 block-3",
        True,
        "eval_fp eval_rtn",
        "blocks 0 to 3 and the end-to-end training",
    ),
    "rounded blocks stand alone": (
        generation(4),
        "block-1 block-3",
        False,
        "block-0 losses-0 block-2 losses-2",
        "blocks 1, 3",
    ),
    "nothing is damaged": (DONE, "", True, BLOCKS + " scales-0 scales-1 scales-2 scales-3 e2e_qp_done", ""),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_damaged_goes_with_what_depends_on_it_and_nothing_else(case: str) -> None:
    found, damaged, chained, expected, words = CASES[case]
    before = repr(found)
    salvaged = salvage(found, names(damaged), chained)
    kept = names(expected) | (set(EVALS) if case == "nothing is damaged" else set())
    assert left(salvaged.generation) == kept
    assert salvaged.lost == words
    assert repr(found) == before, "it is another one"
    assert salvaged.generation.identity == found.identity
    assert all(found.facts[name] == value for name, value in salvaged.generation.facts.items())


@pytest.mark.parametrize(("damaged", "kept"), [(1, False), (2, True), (3, True)])
def test_streams_stay_as_long_as_the_blocks_that_they_have_passed(damaged: int, kept: bool) -> None:
    found = generation(4, facts={"streams": {"border": 2}})
    salvaged = salvage(found, {f"block-{damaged:03d}"}, True)
    assert ("streams" in salvaged.generation.facts) == kept


@pytest.mark.parametrize(("damaged", "left_of_it"), [(0, None), (2, [[1, 4]]), (3, [[1, 4], [2, 2]])])
def test_a_block_is_trained_again_with_as_many_sequences_at_a_time_as_at_first(
    damaged: int, left_of_it: list[list[int]] | None
) -> None:
    found = generation(4, facts={"block_ap_micro_batch": [[1, 4], [2, 2]], "halvings-full": [[3, 0]]})
    facts = salvage(found, {f"block-{damaged:03d}"}, True).generation.facts
    assert facts.get("block_ap_micro_batch") == left_of_it
    assert facts["halvings-full"] == [[3, 0]], "it says itself where it begins"


def test_blocks_count_up_to_the_first_gap() -> None:
    for entries, count in (([], 0), ([1], 0), ([0], 1), ([0, 1, 3], 2), ([2, 1, 0], 3)):
        assert leading_blocks([f"block-{index:03d}" for index in entries]) == count


def test_the_one_with_the_least_left_to_do_is_ahead() -> None:
    order = [
        generation(0),
        generation(0, facts={"eval_fp": 1}),
        generation(2),
        generation(3),
        INSIDE_BLOCK,
        generation(4),
        generation(4, facts={"eval_block_ap": 1}),
        INSIDE_E2E,
        generation(4, done=True),
        DONE,
    ]
    ranks = [progress(found) for found in order]
    assert ranks == sorted(ranks)
    assert len(set(ranks)) == len(ranks)
