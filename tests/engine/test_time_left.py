"""The time left: the plan's until something is measured, then the recent pace, never a zero that stands."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from engine.time_left import Estimate, TimeLeft

PLAN = {"prepare": 10.0, "block_ap": 1000.0, "evaluate": 100.0, "export": 90.0}


def begun(phase: str, **plan: float) -> TimeLeft:
    """In ``phase`` since 0 s."""
    left = TimeLeft(list(PLAN), {**PLAN, **plan})
    left.phase_begins(phase, 0.0)
    return left


def test_before_anything_is_counted_it_is_the_plans() -> None:
    left = begun("block_ap")
    assert left.estimate(100.0) == Estimate(pytest.approx(900.0 + 190.0), measured=False)
    left.at(0.01, 120.0)
    assert not left.estimate(120.0).measured, "the first steps are no measurement"


def test_a_phase_that_outlasts_its_plan_says_so_and_counts_up() -> None:
    left = begun("export")
    assert left.estimate(80.0) == Estimate(pytest.approx(10.0), measured=False)
    for second in (100.0, 160.0, 1000.0):
        found = left.estimate(second)
        assert (found.seconds, found.over) == (0.0, pytest.approx(second - 90.0))


def test_what_comes_after_a_phase_that_outlasts_its_plan_is_still_left() -> None:
    found = begun("evaluate").estimate(130.0)
    assert found.over == pytest.approx(30.0)
    assert found.seconds == pytest.approx(90.0)


def test_a_phase_that_can_be_counted_goes_by_its_own_pace_also_beyond_its_plan() -> None:
    left = begun("export")
    for second in range(1, 301):
        left.at(second / 600, float(second))
    found = left.estimate(300.0)
    assert found.measured
    assert found.over is None, "its end is known"
    assert found.seconds == pytest.approx(300.0, rel=0.02)


def test_another_run_on_the_same_cores_shows_within_minutes() -> None:
    """Half of a phase at one pace, then three times slower: what is left takes three times as long."""
    left = begun("export")
    for second in range(1, 601):
        left.at(second / 1200, float(second))
    assert left.estimate(600.0).seconds == pytest.approx(600.0, rel=0.02)
    for second in range(603, 901, 3):
        left.at(0.5 + (second - 600) / 3600, float(second))
    done = 0.5 + 300 / 3600
    assert left.estimate(900.0).seconds == pytest.approx((1 - done) * 3600, rel=0.15)


def test_the_phases_to_come_are_slower_by_as_much_as_the_present_one() -> None:
    left = begun("block_ap")
    for second in range(1, 1501):
        left.at(second / 3000, float(second))
    # Half of it took 1500 s where 500 were planned; a tenth of the whole plan still speaks for the plan.
    pace = (1500 + 120) / (500 + 120)
    assert left.estimate(1500.0).seconds == pytest.approx(1500 + pace * 190, rel=0.02)


def test_a_count_that_does_not_come_makes_the_rest_longer_and_not_zero() -> None:
    left = begun("export")
    for second in range(0, 101, 10):
        left.at(second / 200, float(second))
    before = left.estimate(100.0).seconds
    assert before == pytest.approx(100.0, rel=0.05)
    later = [left.estimate(100.0 + more).seconds for more in (60.0, 120.0, 600.0)]
    assert later[-1] is not None
    assert before is not None
    assert later[-1] > before


def test_what_an_earlier_attempt_did_is_no_pace() -> None:
    left = begun("block_ap")
    for block in range(8):
        left.restored((block + 1) / 10, 0.1 * (block + 1))
    assert not left.estimate(1.0).measured
    left.at(0.9, 10.8)
    # A tenth took 10 s and not 100, with a tenth of the plan for the plan; the rest of the phase is as long.
    assert left.estimate(10.8).seconds == pytest.approx(10.0 + 190 * (10 + 120) / (100 + 120), rel=0.02)


def test_a_pause_is_no_part_of_a_phase_and_no_pace() -> None:
    left, undisturbed = begun("block_ap"), begun("block_ap")
    for now in range(0, 300, 10):
        left.at(now / 1000, float(now))
        undisturbed.at(now / 1000, float(now))
    left.paused(3600.0)
    assert left.estimate(3900.0).seconds == pytest.approx(undisturbed.estimate(300.0).seconds)
    unmeasured = begun("export")
    unmeasured.paused(3600.0)
    assert unmeasured.estimate(3640.0) == begun("export").estimate(40.0)


def test_without_a_plan_there_is_nothing_to_say_until_something_is_counted() -> None:
    left = TimeLeft(["generate"], {})
    left.phase_begins("generate", 0.0)
    assert left.estimate(5.0) == Estimate(None)
    left.at(0.25, 5.0)
    left.at(0.5, 10.0)
    assert left.estimate(10.0) == Estimate(pytest.approx(10.0), measured=True)


@example([(1.0, 1.0)], "prepare", {"prepare": 2.225073858507e-311})
@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1e6)), max_size=30),
    st.sampled_from([*PLAN, "unknown"]),
    st.dictionaries(st.sampled_from(list(PLAN)), st.floats(0, 1e9)),
)
def test_it_is_a_number_of_seconds_or_none_whatever_comes(
    counts: list[tuple[float, float]], phase: str, plan: dict[str, float]
) -> None:
    left = TimeLeft(list(PLAN), plan)
    now = 0.0
    assert left.estimate(now) == Estimate(None)
    left.phase_begins(phase, now)
    for fraction, more in counts:
        now += more
        left.at(fraction, now)
        found = left.estimate(now)
        assert found.seconds is None or 0 <= found.seconds < float("inf")
        assert found.over is None or found.over > 0
    left.phase_ends(now)
    assert left.estimate(now) == Estimate(None)
