"""A measurement in which a quantized model beats full precision by more than noise is doubted."""

from __future__ import annotations

import math
import random
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from engine.evaluation.plausible import MOST, doubt, grouped


def measured(nll: list[float]) -> dict[str, Any]:
    return {"perplexity": math.exp(sum(nll) / len(nll)), "nll": grouped(nll)}


def texts(windows: int, spread: float, gain: float, seed: int = 0) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two models on windows of which some are much harder: one reads each better by about ``gain``."""
    draw = random.Random(seed)
    full = [3 + draw.gauss(0, 1) for _ in range(windows)]
    return measured(full), measured([value - gain + draw.gauss(0, spread) for value in full])


def test_a_model_that_is_worse_or_as_good_is_believed() -> None:
    for gain in (-2.0, -0.01, 0.0, 0.009):
        assert doubt("Block-AP", *texts(100, 0.001, gain)) == ""


def test_a_gain_beyond_noise_is_told_and_one_within_it_is_not() -> None:
    said = doubt("E2E-QP", *texts(100, 0.05, 0.05))
    assert said.startswith("E2E-QP is better than full precision (")
    assert "more than the" in said
    assert "measurement is wrong" in said
    # The same gain on few windows, of which each says something else.
    apart = measured([3.0, 3.0, 3.0, 3.0]), measured([2.0, 3.4, 2.6, 3.6])
    assert apart[0]["perplexity"] > 1.1 * apart[1]["perplexity"]
    assert doubt("E2E-QP", *apart) == ""
    # How differently hard the windows are is no noise of the difference.
    assert doubt("E2E-QP", *texts(16, 0.01, 0.05))


def test_what_versions_before_measured_has_a_margin() -> None:
    full, better = {"perplexity": 225.0}, {"perplexity": 180.0}
    assert "(180 against 225) by more than the 5.0 %" in doubt("Block-AP", full, better)
    assert doubt("Block-AP", full, {"perplexity": 220.0}) == ""
    assert doubt("Block-AP", full, {"perplexity": None}) == doubt("Block-AP", None, better) == ""
    assert doubt("Block-AP", {"perplexity": "x", "nll": 3}, better) == ""
    assert doubt("Block-AP", {**full, "nll": [1.0, 2.0]}, {**better, "nll": [1.0]})


@given(st.lists(st.floats(0, 20), max_size=300))
def test_groups_are_few_and_have_the_mean_of_all(nll: list[float]) -> None:
    groups = grouped(nll)
    assert len(groups) == min(MOST, len(nll))
    if nll:
        assert min(nll) - 1e-6 <= min(groups) <= max(groups) <= max(nll) + 1e-6
        if len(nll) % len(groups) == 0:
            assert math.isclose(sum(groups) / len(groups), sum(nll) / len(nll), abs_tol=1e-6)
