"""The page: one run, or several side by side and then each."""

from __future__ import annotations

import time
from collections.abc import Sequence

from engine import __version__
from engine.run.comparison import Compared, Difference, compared, differing_settings, named_twice
from engine.run.directory import RunDirectory
from engine.run.shown import show_run
from engine.run.state import load_state
from eqat_tui.compare_text import MARK, sentences, setting_words, table_rows
from eqat_tui.output import format_time
from eqat_tui.report.curves import charts_across
from eqat_tui.report.markup import Child, Html, join, table, tag, void
from eqat_tui.report.sections import run_section
from eqat_tui.report.style import STYLE

SIGN = "<!doctype html>\n<!-- made by eqat report -->\n"
"""What a page of ours begins with: a file that does may be replaced by a newer one."""


def report_page(runs: Sequence[RunDirectory]) -> str:
    """The report on ``runs`` as an HTML page that needs no other file and no network.

    Raises:
        UsageError: for a run that is named twice, or more runs than can be compared.
        EqatError: for one whose log cannot be read.
    """
    named_twice(runs)
    side_by_side = compared(runs) if len(runs) > 1 else []
    letters = [one.letter for one in side_by_side] or [""]
    parts = [
        run_section(run, show_run(run), load_state(run), letter=letter)
        for run, letter in zip(runs, letters, strict=True)
    ]
    name = f"{len(runs)} runs" if side_by_side else runs[0].id
    body = [_overview(side_by_side)] if side_by_side else []
    now = format_time(time.time(), "%Y-%m-%d %H:%M")
    made = tag("footer", f"made by eqat {__version__} on {now}", class_="muted")
    content = tag("body", tag("main", *body, *parts), made)
    page = tag("html", _head(f"eqat: {name}"), content, lang="en")
    # Whatever is not ASCII is a reference: neither a mail nor a pipe can mistake its encoding then.
    return SIGN + page.encode("ascii", "xmlcharrefreplace").decode("ascii")


def _head(title: str) -> Html:
    # The policy holds what the page promises: nothing is fetched, and nothing in it is ever run.
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return tag(
        "head",
        void("meta", charset="utf-8"),
        void("meta", http_equiv="Content-Security-Policy", content=policy),
        void("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Html(STYLE)),
    )


def _overview(runs: Sequence[Compared]) -> Html:
    """The runs side by side: what ``eqat compare`` says, and charts of all of them."""
    found = Difference(runs)
    rows: list[list[Child]] = [
        [name, *(_best(words) if index in best else words for index, words in enumerate(values))]
        for name, values, best in table_rows(runs, found)
    ]
    settings: list[list[Child]] = [
        [name, *map(setting_words, values)] for name, values in differing_settings(runs).items()
    ]
    head: list[Child] = ["", *(run.letter for run in runs)]
    same = tag("p", "Their settings are the same.", class_="muted")
    return tag(
        "section",
        tag("h1", f"{len(runs)} runs side by side"),
        table([[run.letter, run.id] for run in runs]),
        *(tag("p", words, class_="note") for words in sentences(runs, found)),
        tag("div", *charts_across(runs), class_="charts"),
        tag("h3", "What came of them"),
        table(rows, head=head),
        tag("h3", "Settings that differ"),
        table(settings, head=head) if settings else same,
    )


def _best(words: str) -> Html:
    return join(tag("span", f"{words} {MARK}", class_="best"))
