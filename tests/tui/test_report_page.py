"""The page of ``eqat report``: one well-formed file that shows foreign words as words and fetches nothing."""

from __future__ import annotations

import html
import math
import re
import struct
from collections.abc import Callable
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import msgspec
import pytest
from any_logs import LOGS, NASTY, as_written
from hypothesis import given, settings
from hypothesis import strategies as st
from logs import RECORDED, Log, finished, make_run, write_log

from engine.config.loading import load
from engine.config.sameness import config_hash
from engine.errors import EqatError, PreflightError, UsageError
from engine.run import events
from engine.run.directory import RunDirectory
from engine.run.measures import TaskScore
from engine.run.state import load_state
from engine.system.printable import hides
from eqat_tui.charts import Series
from eqat_tui.report.curves import training
from eqat_tui.report.markup import Html, tag
from eqat_tui.report.page import report_page
from eqat_tui.report.pictures import as_svg, pictures, write_pictures
from eqat_tui.report.style import _DARK, _LIGHT
from eqat_tui.report.svg import HEIGHT, LEFT, RIGHT, TOP, WIDTH, Mark, lines, marks

Recorded = Callable[[str], RunDirectory]

KNOWN = {
    *(
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "main",
        "section",
        "footer",
        "div",
        "span",
        "h1",
        "h2",
    ),
    *("h3", "h4", "p", "ul", "li", "strong", "code", "pre", "table", "thead", "tbody", "tr", "th", "td"),
    *("figure", "figcaption", "svg", "desc", "text", "line", "circle", "rect", "path"),
}
ATTRIBUTES = {
    *("lang", "charset", "http-equiv", "content", "name", "class", "scope", "role", "aria-label", "viewbox"),
    *("x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "r", "rx", "d", "width", "height", "text-anchor"),
    "stroke-dasharray",
}
MARKUP = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)>',
    "</title></style></pre><iframe src=//evil.example>",
    "' onmouseover='x",
    "<!-- ",
    "]]>",
    "&lt;&#x3c;script&gt;",
    "https://evil.example/a.png",
    "url(https://evil.example)",
)


class Page(HTMLParser):
    """What a page is made of, for whoever checks it: every element has to be closed in its turn."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.words: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(name)
        self.attributes += [(key, value or "") for key, value in attributes]
        if name != "meta":
            self.open.append(name)

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop() == name

    def handle_data(self, data: str) -> None:
        if self.open:
            self.words.setdefault(self.open[-1], []).append(data)

    def text(self, *names: str) -> str:
        return "\n".join(word for name in names for word in self.words.get(name, ()))


def check(page: str) -> Page:
    """The page, once nothing in it can fetch, run, or steer anything, and all its numbers are numbers."""
    found = Page(page)
    assert found.tags <= KNOWN
    assert {key for key, _ in found.attributes} <= ATTRIBUTES
    for key, value in found.attributes:
        if key in ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "r", "width", "height"):
            assert math.isfinite(float(value)), (key, value)
        if key == "d":
            assert not re.search("nan|inf", value), value
    style = "".join(found.words["style"])
    assert "url(" not in style
    assert "@import" not in style
    assert not any(hides(letter) for letter in html.unescape(page) if letter not in "\n\t")
    return found


@pytest.mark.parametrize("name", RECORDED)
def test_a_run_in_any_state_has_a_page(name: str, recorded: Recorded) -> None:
    run = recorded(name)
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    page = check(report_page([run]))
    assert run.id in page.text("h1")
    assert "eqat run smoke" in page.text("pre")
    assert ("halve block_ap.lr_weight" in page.text("p")) == (name == "failed")
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before


def test_a_page_is_ascii_so_that_nothing_can_mistake_its_encoding(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs", None)
    write_log(run, evil("größer als 中 👩\u200d🔬", run.id))
    made = report_page([run])
    for chart in pictures([run]).values():
        ElementTree.fromstring(as_svg(chart))
    assert made.isascii()
    assert "größer als 中 👩\u200d🔬 (größer" in check(made).text("li")


def test_a_page_has_every_chart_and_number_of_a_run(recorded: Recorded) -> None:
    page = check(report_page([recorded("finished")]))
    assert page.words["figcaption"] == [
        "Perplexity (logarithmic)",
        "Size of the weights",
        "Loss of each block",
        "Training loss of Block-AP",
        "Training loss of E2E-QP",
        "Memory, GiB",
    ]
    cells = page.text("td", "th")
    for word in ("17.44", "257 MiB → 96.5 MiB (2.66× smaller)", "torch", "2.13.0", "NVIDIA H200 of node7"):
        assert word in cells
    assert {"grid", "block_ap", "e2e_qp"} <= set(page.words["h4"])


def test_a_page_says_what_reading_each_checkpoint_back_found(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs", None)
    log = finished(run.id)
    (made,) = (event for event in log.events if isinstance(event, events.Export))
    rounds = {"format": "gguf", "rounded": "biases to float16", "perplexity": 21.23, "max_logit_diff": 0.25}
    log.add(msgspec.structs.replace(made, **rounds))
    log.add(msgspec.structs.replace(made, format="mlx", verified=False, perplexity=None, max_logit_diff=None))
    write_log(run, log.events)
    page = check(report_page([run]))
    assert "Checkpoints as they are read back" in page.words["h3"]
    cells = page.words["td"]
    for words in ("21.19, 21.19", "21.23, 21.19", "512", "biases to float16", "0.25", "yes"):
        assert words in cells, words
    assert "NO" in page.words["span"]


def test_several_runs_are_compared_and_then_told_of_one_by_one(recorded: Recorded) -> None:
    page = check(report_page([recorded("finished"), recorded("stopped")]))
    assert page.words["h1"] == ["2 runs side by side"]
    assert [words[:2] for words in page.words["h2"]] == ["A:", "B:"]
    assert "B is not finished: no time is marked." in page.text("p")
    assert page.words["figcaption"][:2] == ["Perplexity (logarithmic)", "Final loss of each block"]


def test_charts_are_pictures_of_their_own_that_need_nothing_else(recorded: Recorded, tmp_path: Path) -> None:
    runs = [recorded("finished"), recorded("stopped")]
    alone = pictures(runs[:1])
    assert [chart.caption for chart in alone.values()] == check(report_page(runs[:1])).words["figcaption"]
    both = pictures(runs)
    assert {name.partition("-")[0] for name in both} == {"all", "a", "b"}
    written = write_pictures(tmp_path / "charts", both)
    assert sorted(path.stem for path in written) == sorted(both)
    for file in written:
        text = file.read_text()
        root = ElementTree.fromstring(text)  # well-formed, as a program that knows no HTML reads it
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert root.get("viewBox") == f"0 0 {root.get('width')} {root.get('height')}"
        assert not re.search(r"var\(|url\(|@import|href", text)
        assert (both[file.stem].caption in text, "#" in text) == (True, True)
    assert len(write_pictures(tmp_path / "charts", both)) == len(both)  # newer ones take their place


def test_charts_are_written_over_nothing_of_anybody(recorded: Recorded, tmp_path: Path) -> None:
    run = recorded("finished")
    charts = pictures([run])
    name = next(iter(charts))
    for ending, png in ((".svg", False), (".png", True)):
        mine = tmp_path / f"{name}{ending}"
        mine.write_text("mine")
        if png and find_spec("resvg_py") is None:
            with pytest.raises(PreflightError, match="resvg-py is not installed"):
                write_pictures(tmp_path, charts, png=True)
        else:
            with pytest.raises(UsageError, match="is no chart of eqat"):
                write_pictures(tmp_path, charts, png=png)
        assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [mine.name]
        mine.unlink()
    with pytest.raises(UsageError, match="lies inside a run"):
        write_pictures(run.path / "charts", charts)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(EqatError):
        write_pictures(tmp_path / "file", charts)


@pytest.mark.skipif(find_spec("resvg_py") is None, reason="resvg-py is an extra: pip install 'eqat[png]'")
def test_a_png_shows_the_chart(recorded: Recorded, tmp_path: Path) -> None:
    charts = pictures([recorded("finished")])
    files = [file for file in write_pictures(tmp_path, charts, png=True) if file.suffix == ".png"]
    assert len(files) == len(charts)
    for file in files:
        content = file.read_bytes()
        wide, high = struct.unpack(">II", content[16:24])
        assert (content[:8], wide) == (b"\x89PNG\r\n\x1a\n", 2 * WIDTH)
        assert abs(high - 2 * (charts[file.stem].height + 38)) <= 2
        assert len(content) > 3000  # an empty picture is smaller


def test_tasks_are_drawn(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs", None)
    log = finished(run.id)
    log.events = [
        msgspec.structs.replace(
            event,
            accuracy={"piqa": 0.5},
            scores=(
                TaskScore(task="mmlu", metric="acc", value=0.25, shots=5),
                TaskScore(task="wikitext", metric="word_perplexity", value=0.9, better="smaller"),
            ),
        )
        if isinstance(event, events.Eval)
        else event
        for event in log.events
    ]
    write_log(run, log.events)
    drawn = pictures([run])["tasks"]
    assert "mmlu 5-shot, acc" in drawn.said
    assert "25.0" in drawn.said
    assert "wikitext" not in drawn.said
    assert "mmlu 5-shot, acc" in check(report_page([run])).text("th")


def evil(word: str, run_id: str) -> list[events.Event]:
    """A finished log in which every text is ``word``."""
    log: Log = finished(run_id)
    log.add(events.Warning(code=word, message=word, hint=word))
    log.add(events.Sample(stage=word, prompt=word, text=word))
    log.add(events.Sample(stage="fp", prompt=word, problem=word))
    log.add(events.Error(code=word, where=word, message=word, hint=word, exit_code=5))
    log.evaluation(word, 3.0)
    made: list[events.Event] = []
    for event in log.events:
        changes: dict[str, Any] = {}
        if isinstance(event, events.RunStarted):
            changes = {"device": word, "host": word, "versions": {word: word, "eqat": word}}
        if isinstance(event, events.Eval):
            changes = {"corpus": word, "begin": word, "accuracy": {word: 0.5}, "questions": {word: 3}}
        if isinstance(event, events.Export):
            changes = {"format": word, "path": word, "copied_to": word, "rounded": word}
        if isinstance(event, events.Metric) and event.block is None:
            changes = {"phase": word}
        made.append(msgspec.structs.replace(event, **changes))
    return made


@pytest.mark.parametrize("word", [*MARKUP, *NASTY])
def test_foreign_words_are_words(word: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs", None)
    write_log(run, evil(word, run.id))
    text = run.config_toml.read_text()
    quoted = msgspec.json.encode(word.replace("\x7f", "")[:200]).decode()
    run.config_toml.write_text(re.sub(r'(?m)^source = "random.*$', lambda _: f"source = {quoted}", text))
    check(report_page([run]))
    check(report_page([run, make_run(tmp_path / "runs", finished)]))


def test_markup_in_a_warning_is_read_as_it_was_written(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs", None)
    write_log(run, evil(MARKUP[0], run.id))
    page = check(report_page([run]))
    assert f"{MARKUP[0]} ({MARKUP[0]})" in page.text("li")
    assert MARKUP[0] in page.text("td")


@settings(max_examples=25, deadline=None)
@given(LOGS)
def test_any_log_has_a_page(tmp_path_factory: pytest.TempPathFactory, log: tuple[events.Event, ...]) -> None:
    run = make_run(tmp_path_factory.mktemp("any"), None)
    run.events_path.write_bytes(as_written(log))
    page = report_page([run])
    check(page)
    assert len(page) < 3_000_000


def test_a_page_says_nothing_may_be_fetched_or_run(recorded: Recorded) -> None:
    page = check(report_page([recorded("finished")]))
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes


def test_a_configuration_of_nobodys_preset_is_whole_in_the_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs", finished)
    text = run.config_toml.read_text()
    run.config_toml.write_text(text.replace('name = "smoke"', 'name = "mine"'))
    written = [block for block in check(report_page([run])).words["pre"] if "[grid]" in block]
    (tmp_path / "again.toml").write_text(written[0])
    assert config_hash(load(str(tmp_path / "again.toml"))) == config_hash(run.config())


def test_a_configuration_that_cannot_be_read_costs_its_part_only(recorded: Recorded) -> None:
    run = recorded("finished")
    run.config_toml.write_text("grid = [")
    page = check(report_page([run]))
    assert "Its config.toml cannot be read." in page.text("p")
    assert "17.44" in page.text("td")


# -- charts --------------------------------------------------------------------------------------------


def places(chart: Html | None) -> list[tuple[float, float]]:
    """The corners of the first line of a chart."""
    assert chart is not None
    (path,) = re.findall(r'<path d="([^"]*)" class="line series1"', chart)[:1]
    return [(float(x), float(y)) for x, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", path)]


def test_a_line_goes_through_its_points() -> None:
    drawn = places(lines("t", [Series("a", [(0, 0.0), (5, 10.0), (10, 5.0)])], x_name="x"))
    left, right, bottom = LEFT, WIDTH - RIGHT, drawn[0][1]
    assert drawn == [
        (left, bottom),
        ((left + right) / 2, TOP),
        (right, pytest.approx((TOP + bottom) / 2, abs=0.1)),
    ]
    assert TOP < bottom < HEIGHT
    tenfold = places(lines("t", [Series("a", [(0, 1.0), (1, 10.0), (2, 100.0)])], x_name="x", log=True))
    assert tenfold[1][1] == pytest.approx((tenfold[0][1] + tenfold[2][1]) / 2, abs=0.1)


def test_a_gap_breaks_a_line_and_what_is_not_finite_is_marked_where_it_was() -> None:
    points = [(0, 1.0), (1, 2.0), (2, None), (3, 1.0), (4, math.nan), (5, 1.0)]
    chart = lines("t", [Series("a", points)], x_name="x")
    assert chart is not None
    (path,) = re.findall(r'<path d="([^"]*)" class="line series1"', chart)[:1]
    assert [part[0] for part in path.split(" ") if part[0] in "ML"] == ["M", "L", "M", "M"]
    (mark,) = re.findall(r'<text x="([\d.]+)"[^>]*>!</text>', chart)
    assert float(mark) == pytest.approx(LEFT + 0.8 * (WIDTH - RIGHT - LEFT), abs=0.1)


def test_bars_are_as_long_as_their_numbers() -> None:
    chart = marks("t", [Mark("a", 200.0, "200"), Mark("b", 50.0, "50"), Mark("c", None, "–")])
    assert chart is not None
    one, other = map(float, re.findall(r'<rect [^>]*?width="([\d.]+)"', chart))
    assert one == pytest.approx(4 * other, rel=1e-3)


def test_the_training_of_blocks_is_drawn_block_after_block(recorded: Recorded) -> None:
    metrics = load_state(recorded("running")).metrics
    (chart,) = training(metrics)
    drawn = places(chart)
    assert len(drawn) == len(metrics)
    (path,) = re.findall(r'<path d="([^"]*)" class="line series1"', chart or "")[:1]
    assert path.count("M") == len({one.block for one in metrics})


numbers = st.floats() | st.sampled_from((0.0, -1.0, 5e-324, 1e300, -1e300, 1.7e308, 1e-300)) | st.none()
drawn_points = st.lists(st.tuples(st.floats(-1e300, 1e300) | st.integers(0, 5), numbers), max_size=60)


@settings(max_examples=100, deadline=None)
@given(st.lists(drawn_points, max_size=6), st.booleans(), st.booleans())
def test_any_numbers_can_be_drawn(
    points: list[list[tuple[float, float | None]]], log: bool, zero: bool
) -> None:
    series = [Series(f"s{index}", one, f"series{index % 4 + 1}") for index, one in enumerate(points)]
    chart = lines("t", series, x_name="x", log=log, from_zero=zero and not log)
    rows = [
        Mark(f"m{index}", y, str(y), index) for index, y in enumerate(y for one in points for _, y in one)
    ]
    for drawn in (chart, marks("t", rows[:30], log=log)):
        if drawn is not None:
            check(tag("html", tag("style", " "), drawn))


def test_colours_stand_out_in_light_and_in_dark() -> None:
    def luminance(colour: str) -> float:
        parts = [int(colour[index : index + 2], 16) / 255 for index in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return sum(share * c for share, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    def contrast(one: str, other: str) -> float:
        high, low = sorted((luminance(one), luminance(other)), reverse=True)
        return (high + 0.05) / (low + 0.05)

    for scheme in (_LIGHT, _DARK):
        colours = dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]{6});", scheme))
        for back in (colours["back"], colours["panel"]):
            for name in ("series1", "series2", "series3", "series4"):
                assert contrast(colours[name], back) >= 3, (name, back)
            for name in ("text", "muted", "good", "bad"):
                assert contrast(colours[name], back) >= 4.5, (name, back)
        for back in ("bad-back", "warn-back"):
            assert contrast(colours["text"], colours[back]) >= 4.5


def test_text_in_markup_is_text() -> None:
    assert tag("p", "<b>", Html("<i></i>"), None) == "<p>&lt;b&gt;<i></i></p>"
    assert tag("p", title='" onclick="x') == '<p title="&quot; onclick=&quot;x"></p>'
    assert html.unescape(tag("pre", "a\x1b[0m\nb")) == "<pre>a\\x1b[0m\nb</pre>"
