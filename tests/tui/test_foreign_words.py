"""Words of others in the app: they are shown as words, take the room they seem to take, and steer nothing."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from any_logs import NASTY, as_written
from app_tools import PLAIN, app_of, drive, picture, press, settled, told, until, view_of
from hypothesis import given
from hypothesis import strategies as st
from logs import make_run
from pty_app import PtyApp
from rich.cells import cell_len
from rich.segment import Segment
from textual.color import Color
from textual.pilot import Pilot
from textual.widgets import Input

from engine.run import events
from engine.run.directory import RunDirectory
from engine.system.printable import hides, printable
from eqat_tui.app import EqatApp
from eqat_tui.lines import beside, columns, cut, few, fit, line, plain, width_of, widths_of, wrap
from eqat_tui.log_tail import end_of_file
from eqat_tui.palette import COVER, PrintableFilter, content, covered
from eqat_tui.screens.dialogs import Ask, MarkdownReader
from eqat_tui.views.result import loading_snippet

Recorded = Callable[[str], RunDirectory]
Play = Pilot[Any]
EVIL = "\x1b]0;owned\x07\x1b]52;c;ZXZpbA==\x07\x9b31m\x7f exe.\u202egpj \u2028[/][b]"
WORDS = st.sampled_from(NASTY) | st.text(st.characters(exclude_categories=()), max_size=60)


def is_clean(text: str) -> bool:
    return not any(hides(letter) for letter in text if letter != "\n")


# -- lines ---------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(WORDS, st.sampled_from(("", "bad"))), max_size=4), st.integers(0, 60))
def test_a_line_of_any_words_is_as_wide_as_asked(spans: list[tuple[str, str]], width: int) -> None:
    assert width_of(cut(spans, width)) <= width
    assert width_of(fit(spans, width)) == width
    assert width_of(beside(spans, spans, width)) <= width
    for made in (cut(spans, width), fit(spans, width), line(*spans), line(*(text for text, _ in spans))):
        assert is_clean(plain(made))
    assert len(plain(fit(spans, width))) <= 40 * (width + 2)
    assert content(spans, "eqat-dark").plain == plain(cut(spans, 300))


@given(WORDS, st.integers(2, 60))
def test_a_text_of_any_words_is_wrapped_and_nothing_of_it_is_lost(text: str, width: int) -> None:
    rows = wrap(text, width)
    assert all(width_of(row) <= width for row in rows)
    assert is_clean("".join(map(plain, rows)))
    if len(text) < 500 and "\t" not in text:
        kept = "".join(map(plain, rows)).replace(" ", "")
        said = "".join(
            printable(row) for row in text.replace("\r\n", "\n").translate(dict.fromkeys(b"\n\v\f\r"))
        )
        assert kept == said.replace(" ", "") or "\u200d" in text


@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4))
def test_columns_of_any_words_are_aligned(rows: list[tuple[str, str]]) -> None:
    sizes = [min(size, 20) for size in widths_of(rows)]
    made = columns(rows, sizes)
    assert {width_of(row) for row in made} == {sum(sizes) + 2}
    assert all(is_clean(plain(row)) for row in made)


def test_a_megabyte_is_wrapped_in_a_moment() -> None:
    began = time.process_time()
    for text in (
        "x" * 2_000_000,
        "中" * 2_000_000,
        "word " * 400_000,
        "a\u0301" * 1_000_000,
        "\n" * 2_000_000,
    ):
        rows = wrap(text, 40)
        assert len(rows) < 25_000
        cut([(text, "")], 40)
    assert time.process_time() - began < 3.0


def test_of_many_lines_the_first_are_kept_and_the_rest_is_hinted_at() -> None:
    lines = wrap("one two three four", 5)
    assert few(lines, 9) == lines
    assert [plain(row) for row in few(lines, 2)] == ["one", "…"]


# -- borders -------------------------------------------------------------------------------------------


@given(WORDS)
def test_the_last_filter_lets_nothing_through_and_moves_nothing(text: str) -> None:
    (made,) = PrintableFilter().apply([Segment(text)], Color(0, 0, 0))
    assert is_clean(made.text)
    if "\u200d" not in text and "\ufe0f" not in text:  # what joins is measured together
        assert cell_len(made.text) == cell_len(text)


@given(WORDS)
def test_an_input_has_a_sign_for_each_letter(text: str) -> None:
    assert len(covered(text)) == len(text)
    assert is_clean(covered(text))


def test_lines_that_load_a_checkpoint_are_only_that() -> None:
    evil = 'x"\nimport os; os.system("reboot")\n#'
    scope: dict[str, Any] = {}
    row = loading_snippet(evil).splitlines()[1]
    exec(row, scope)
    assert scope["path"] == evil
    assert loading_snippet("runs/x/export").splitlines()[1] == 'path = "runs/x/export"'


def test_the_end_of_a_log_is_read_from_a_file_only(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"one\r\n\x1b[31mtwo\x1b[0m\rthree\xff\n")
    assert end_of_file(log) == ["one", " [31mtwo [0m", "three\ufffd"]
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(log)
    assert end_of_file(pipe) == ["(pipe: is a FIFO, not a regular file)"]
    assert "link" in end_of_file(link)[0]
    assert "no such file" in end_of_file(tmp_path / "none")[0]


def evil_log(run_id: str) -> list[events.Event]:
    return [
        events.RunStarted(id=EVIL, pid=1, host=EVIL, device=EVIL, versions={"eqat": "99.²"}, argv=[], t=1e15),
        events.Plan(
            plan={"blocks": 10**12, "phases": [1, {"name": EVIL}], "seconds": EVIL, "published": [1]}
        ),
        events.BlockStarted(phase="block_ap", block=10**12, blocks=-1),
        events.Metric(
            phase="block_ap", block=2, step=10**12, steps=0, epoch=0, loss=1e300, lr={EVIL: -1e300}
        ),
        events.Memory(host_used=10**30, gpu_used=-5, gpu_total=10**30, gpu_temperature=1e300),
        events.Eval(
            stage="fp",
            perplexity=0.0,
            tokens=-1,
            sequence_length=0,
            seconds=0.0,
            corpus=EVIL,
            accuracy={EVIL: 1e9},
        ),
        events.Warning(code=EVIL, message=EVIL, hint=EVIL, t=-1e300),
        events.Sample(stage="fp", prompt=EVIL, text=EVIL * 9_999),
        events.Export(
            format=EVIL, path=f"/{EVIL}", verified=True, bytes=-1, fp_bytes=0, bits_per_weight=1e300
        ),
        events.Export(
            format="up", path="../../x", verified=True, bytes=10**30, fp_bytes=0, bits_per_weight=-1.0
        ),
        events.Error(code="x", where=EVIL, message=f"{EVIL} " * 9_999, hint=EVIL, exit_code=3),
        events.RunFinished(outcome="failed", exit_code=1, seconds=-1e300),
    ]


@pytest.fixture
def evil_run(tmp_path: Path) -> RunDirectory:
    run = make_run(tmp_path / "runs", None, name="20251124-1600-x-0001")
    run.events_path.write_bytes(as_written(evil_log(run.id)))
    (run.logs_dir / "attempt-001.log").write_text(EVIL)
    return RunDirectory(run.path.rename(run.path.with_name("20251124-1600-\x1b]0;owned\x07[b][")))


@pytest.mark.parametrize("liveness", ["failed", "hung"])
def test_every_screen_survives_the_worst_log(liveness: Any, evil_run: RunDirectory) -> None:
    async def script(pilot: Play, app: EqatApp) -> None:
        for keys in (
            ["2"],
            ["c"],
            ["c"],
            ["s"],
            ["b"],
            ["l"],
            ["escape"],
            ["3"],
            ["y"],
            ["m"],
            ["4"],
            ["2"],
            ["question_mark"],
        ):
            await press(pilot, *keys)
            assert is_clean(await settled(pilot))
        await press(pilot, "escape", "4")
        await until(pilot, lambda: "1 of 1" in picture(app))
        assert "owned" in picture(app)
        await press(pilot, "space", "t")
        assert is_clean(await settled(pilot))

    drive(app_of(evil_run, view_of(evil_run, liveness), runs_dir=Path("runs")), script)


def test_a_card_outside_of_the_run_is_not_read(evil_run: RunDirectory, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "README.md").write_text("# secret")

    async def script(pilot: Play, app: EqatApp) -> None:
        await until(pilot, lambda: "failed" in picture(app))
        await press(pilot, "m")
        await until(pilot, lambda: any("outside of the run" in note for note in told(app)))
        assert not isinstance(app.screen, MarkdownReader)

    drive(app_of(evil_run, view_of(evil_run, "failed"), mode="result"), script)


def test_dialogs_and_the_clipboard_hold_words_only() -> None:
    async def script(pilot: Play, app: EqatApp) -> None:
        app.copy(f"first\n{EVIL}", "it")
        assert app.clipboard == "first\n" + printable(EVIL)
        app.push_screen(Ask("question", f"a{EVIL}b", help=[EVIL], choices=[f"a{EVIL}bc"]))
        await until(pilot, lambda: isinstance(app.focused, Input))
        shown = await settled(pilot)
        assert is_clean(shown)
        assert f"a{COVER}]0;owned{COVER}" in shown
        assert app.focused is not None
        assert app.focused.value == f"a{EVIL}b"  # type: ignore[attr-defined]
        await press(pilot, "escape")
        app.push_screen(MarkdownReader([(EVIL, f"# head {EVIL}\n\n{EVIL}")]))
        await until(pilot, lambda: "head" in picture(app))
        assert is_clean(await settled(pilot))

    drive(app_of(mode="runs", terminal=PLAIN), script)


def test_a_damaged_run_is_a_row_that_says_so(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    from eqat_tui.screens import runs as screen

    good, bad, real = recorded("stopped"), recorded("failed"), screen.summarize

    def summarize(run: RunDirectory) -> dict[str, Any]:
        if run.id == bad.id:
            raise RecursionError(EVIL)
        return real(run)

    monkeypatch.setattr(screen, "summarize", summarize)

    async def script(pilot: Play, app: EqatApp) -> None:
        await until(pilot, lambda: "2 of 2" in picture(app))
        shown = await settled(pilot)
        assert is_clean(shown)
        assert "1 cannot be read" in shown
        assert "✗ cannot be read" in shown
        for key in ("o", "space", "down", "space", "equals_sign", "escape", "enter"):
            await press(pilot, key)
            assert is_clean(await settled(pilot))
        assert good.path.is_dir()

    drive(app_of(mode="runs"), script)


def test_in_a_real_terminal_no_title_is_set_and_nothing_is_copied(
    evil_run: RunDirectory, tmp_path: Path
) -> None:
    with PtyApp(["attach", str(evil_run.path)], cwd=tmp_path) as app:
        app.read(20.0, until=b"owned")
        app.type("3")
        app.read(10.0, until=b"[3 Result]")
        app.type("m")  # a note
        app.read(10.0, until=b"outside of the run")
        for key in "45432l":
            app.type(key)
            app.read(0.6)
        app.type("\x1b")
        app.read(0.4)
        app.type("q")
        app.end()
    assert b"\x1b]0;" not in app.output
    assert b"\x1b]2;" not in app.output
    assert b"\x1b]52" not in app.output
    assert b"\xc2\x9b" not in app.output
    assert "\u202e".encode() not in app.output
    assert b"\\x1b]0;owned\\x07" in app.output
