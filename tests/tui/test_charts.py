"""Charts of anything a loss can be, in any size."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from eqat_tui.charts import Series, chart, legend
from eqat_tui.lines import beside, columns, cut, fit, plain, width_of, wrap

NUMBERS = st.none() | st.floats(allow_nan=True, allow_infinity=True)


@example([[(0, 1.7976931348623157e308), (1, 1e307)]], 30, 5, False, False)
@example([[(0, -1.7976931348623157e308), (1, 1.7976931348623157e308)]], 30, 5, True, True)
@given(
    st.lists(st.lists(st.tuples(st.integers(0, 10_000), NUMBERS), max_size=60), max_size=3),
    st.integers(0, 90),
    st.integers(0, 30),
    st.booleans(),
    st.booleans(),
)
def test_any_numbers_fit_any_size(
    lists: list[list[tuple[int, float | None]]], width: int, height: int, log: bool, ascii_only: bool
) -> None:
    series = [Series(f"s{i}", sorted(points, key=lambda p: p[0])) for i, points in enumerate(lists)]
    made = chart(series, width, height, log=log, ascii_only=ascii_only)
    assert len(made) == height
    assert all(width_of(row) <= max(width, 0) for row in made)


def test_a_falling_loss_falls_on_the_screen_too() -> None:
    made = chart([Series("loss", [(x, 1.0 - x / 40) for x in range(41)])], 50, 12, ascii_only=True)
    columns_of = [plain(row).find("*") for row in made[:-1]]
    assert columns_of == sorted(columns_of)
    assert columns_of[0] < columns_of[-1]


def test_a_logarithmic_scale_makes_an_exponential_straight() -> None:
    points = [(float(x), math.exp(-x / 5)) for x in range(40)]
    rows = [plain(row) for row in chart([Series("loss", points)], 49, 21, log=True, ascii_only=True)[:-1]]
    first = [row.find("*") for row in rows if "*" in row]
    steps = [after - before for before, after in itertools.pairwise(first)]
    assert max(steps) - min(steps) <= 1


@pytest.mark.parametrize("width", [24, 40, 60])
@pytest.mark.parametrize(
    "scale", [1.0, 2.7391e-5, -2.7391e-5, 1.8702e-120, -9.9999e-250, 4.5678e12, -3.21e280]
)
def test_labels_of_an_axis_are_whole_numbers_with_their_exponent(scale: float, width: int) -> None:
    made = [plain(row) for row in chart([Series("loss", [(1, scale), (9, scale * 3)])], width, 10)]
    labels = [float(row.split("┤")[0]) for row in made if "┤" in row]
    assert labels == pytest.approx(sorted([scale, 2 * scale, 3 * scale], reverse=True), rel=0.1)


def test_an_x_axis_without_room_has_no_half_numbers() -> None:
    points: list[tuple[float, float | None]] = [(1_234_567.0, 1.0), (7_654_321.0, 2.0)]
    for width in range(14, 60):
        words = plain(chart([Series("loss", points)], width, 5)[-1]).split()
        assert set(words) <= {"1234567", "7654321"}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_marked_on_the_axis(value: float) -> None:
    points = [(0.0, 1.0), (1.0, 0.9), (2.0, value), (3.0, 0.7), (4.0, 0.6)]
    axis = chart([Series("loss", points)], 60, 8)[-1]
    assert "!" in plain(axis)
    assert ("!", "bad") in axis
    assert "!" not in plain(chart([Series("loss", [(x, y) for x, y in points if x != 2])], 60, 8)[-1])


def test_a_gap_breaks_the_line() -> None:
    def stars(points: list[tuple[float, float | None]]) -> int:
        made = chart([Series("loss", points)], 60, 8, ascii_only=True, x_range=(0, 10))
        return sum(plain(row).count("*") for row in made[:-1])

    whole: list[tuple[float, float | None]] = [(0, 0.5), (4, 0.5), (6, 0.5), (10, 0.5)]
    assert stars([*whole[:2], (5, None), *whole[2:]]) < stars(whole)


def test_nothing_finite_says_so() -> None:
    words = "\n".join(map(plain, chart([Series("loss", [(1, math.nan)])], 40, 9)))
    assert "not a finite number yet" in words
    assert "nothing to draw yet" in "\n".join(map(plain, chart([Series("loss", [])], 40, 9)))


def test_series_are_told_apart_without_colour() -> None:
    series = [Series("one", [(0, 1.0), (9, 1.0)]), Series("two", [(0, 2.0), (9, 2.0)])]
    words = "\n".join(map(plain, chart(series, 40, 9, marks=True)))
    assert "*" in words
    assert "o" in words
    assert plain(legend(series, marks=True)) == "* one   o two"


# -- lines ---------------------------------------------------------------------------------------------

TEXT = st.text(st.characters(blacklist_categories=("Cc", "Cs", "Mn", "Me", "Cf")), max_size=40)
SPANS = st.lists(st.tuples(TEXT, st.just("")), max_size=5)


@given(SPANS, st.integers(0, 50))
@example([("🏻", "")], 0)  # takes no cell of its own
def test_cut_and_fit_keep_to_the_width(spans: list[tuple[str, str]], width: int) -> None:
    assert width_of(cut(spans, width)) <= width
    assert width_of(fit(spans, width)) == width
    if width_of(spans) <= width:
        assert plain(cut(spans, width)) == plain(spans)


@given(SPANS, SPANS, st.integers(1, 60))
def test_beside_keeps_to_the_width(
    left: list[tuple[str, str]], right: list[tuple[str, str]], width: int
) -> None:
    assert width_of(beside(left, right, width)) <= width


@given(st.text(st.sampled_from("ab c\n"), max_size=80), st.integers(4, 30))
def test_wrapping_loses_no_word(text: str, width: int) -> None:
    lines = wrap(text, width)
    assert all(width_of(row) <= width for row in lines)
    assert "".join("".join(map(plain, lines)).split()) == "".join(text.split())


def test_columns_are_aligned() -> None:
    rows = columns([["a", "1"], ["bbb", "22"]], [3, 4], right="lr", gap="|")
    assert [plain(row) for row in rows] == ["a  |   1", "bbb|  22"]


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("y", [2.2e-308, 5e-324, 9e299, -9e299, 0.0])
@pytest.mark.parametrize("x", [0, -(10**30), 10**300, 10**400, 5e-324, math.nan, math.inf])
def test_numbers_at_the_ends_of_all_numbers_are_drawn_or_left_out(x: float, y: float, log: bool) -> None:
    for points in ([(x, y)], [(x, y), (0, 1.0)], [(x, y), (x, math.nan), (x, None)]):
        for x_range in (None, (1, x), (x, 10**400)):
            made = chart([Series("loss", points)], 60, 8, log=log, x_range=x_range, x_name="step")
            assert [width_of(row) <= 60 for row in made] == [True] * 8
