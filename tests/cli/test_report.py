"""``eqat report``: where the page is written, and what is never written over."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_tools import Eqat

from engine.run.directory import RunDirectory

MINE = "<!doctype html>\n<p>a page of somebody's\n"


def test_a_report_is_one_file_named_after_its_run_and_is_replaced_by_a_newer_one(
    eqat: Eqat, finished_run: RunDirectory, tmp_path: Path
) -> None:
    file = tmp_path / f"{finished_run.id}.html"
    done = eqat("report", "latest")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", f"wrote {file.name}\n")
    assert "23.67" in file.read_text(encoding="utf-8")
    file.write_text(file.read_text(encoding="utf-8").replace("23.67", "old"), encoding="utf-8")
    assert eqat("report", "latest", "--to", file.name).returncode == 0
    assert "23.67" in file.read_text(encoding="utf-8")


def test_a_dash_prints_the_page(eqat: Eqat, finished_run: RunDirectory, tmp_path: Path) -> None:
    done = eqat("report", finished_run.id, "--to", "-")
    assert done.returncode == 0
    assert done.stdout.startswith("<!doctype html>")
    assert done.stdout.endswith("</html>\n")
    assert list(tmp_path.glob("*.html")) == []


def test_charts_are_written_alone(eqat: Eqat, finished_run: RunDirectory, tmp_path: Path) -> None:
    done = eqat("report", "latest", "--charts", "drawn")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert (tmp_path / "drawn" / "size-of-the-weights.svg").exists()
    assert list(tmp_path.glob("*.html")) == []
    nowhere = eqat("report", "latest", "--to", "no folder/r.html", "--charts", "more")
    assert (nowhere.returncode, "lies in no folder" in nowhere.stderr) == (2, True)
    assert not (tmp_path / "more").exists(), "what cannot be written whole is not begun"
    refused = eqat("report", "latest", "--png")
    assert (refused.returncode, "--png: is for charts" in refused.stderr) == (2, True)


@pytest.mark.parametrize(
    ("to", "words"),
    [
        ("mine.html", "exists and is no report"),
        ("link.html", "exists and is no report"),
        ("nowhere.html", "exists and is no report"),
        ("folder", "is a folder"),
        ("missing/report.html", "lies in no folder"),
        ("RUN/report.html", "lies inside a run"),
        ("RUN/export/report.html", "lies inside a run"),
        ("", "is empty"),
        ("/proc/report.html", "/proc/report.html: cannot be written"),
    ],
)
def test_nothing_of_anybody_is_written_over(
    to: str, words: str, eqat: Eqat, finished_run: RunDirectory, tmp_path: Path
) -> None:
    (tmp_path / "mine.html").write_text(MINE)
    (tmp_path / "link.html").symlink_to("mine.html")
    (tmp_path / "nowhere.html").symlink_to("made-by-a-link.html")
    (tmp_path / "folder").mkdir()
    before = sorted(path for path in tmp_path.rglob("*"))
    done = eqat("report", finished_run.id, "--to", to.replace("RUN", str(finished_run.path)))
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
    assert sorted(path for path in tmp_path.rglob("*")) == before
    assert (tmp_path / "mine.html").read_text() == MINE


def test_a_run_that_is_named_twice_or_not_there_is_one_line(eqat: Eqat, finished_run: RunDirectory) -> None:
    for runs in ((finished_run.id, "latest"), ("nothing-like-it",)):
        done = eqat("report", *runs)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
