"""The app's pictures in README.md, from a run that really happened.

    python benchmarks/screenshot.py RUN

shows RUN in the app as it was in the middle of Block-AP (a replay) and as it ended, and puts both screens, as
the terminal gets them, between the marks in README.md.
"""

from __future__ import annotations

import asyncio
import re
import sys
from pathlib import Path
from typing import Any

from engine.errors import EqatError
from engine.run.directory import RunDirectory
from engine.run.finding import default_runs_dir, find_run
from eqat_tui.app import EqatApp
from eqat_tui.feed import ReplayFeed, RunView
from eqat_tui.palette import Terminal

README = Path(__file__).resolve().parents[1] / "README.md"
SIZE = (96, 28)
"""Columns and rows; narrow enough for a page, wide enough for what there is to see."""
PLACE = 0.305
"""Part of the run that the monitor's picture shows as done."""


class Moment:
    """A run as it was at one moment, as if that were now."""

    def __init__(self, run: RunDirectory, place: float) -> None:
        self.run = run
        feed = ReplayFeed(run)
        feed.pause()
        feed.seek(place)
        self._view = feed.poll()

    def poll(self) -> RunView:
        import msgspec

        return msgspec.structs.replace(self._view, replay=None, liveness="running")


def text_of(app: EqatApp) -> str:
    """The screen as text."""
    rows = app.screen._compositor.render_strips()
    return "\n".join("".join(segment.text for segment in row).rstrip() for row in rows)


def picture(run: RunDirectory, mode: str) -> str:
    """The screen of ``mode`` for ``run``."""
    app = EqatApp(runs_dir=run.path.parent, terminal=Terminal(), mode=mode)

    async def shoot() -> str:
        async with app.run_test(size=SIZE) as pilot:
            if mode == "monitor":
                app.show_feed(Moment(run, PLACE))
            else:
                app.open_run(run, show=False)
            await pilot.pause(1.5)
            return text_of(app)

    return asyncio.run(shoot())


def main(arguments: list[str]) -> int:
    try:
        run = find_run(default_runs_dir(), arguments[0] if arguments else "latest")
    except EqatError as error:
        print(f"error: {error}; make demo makes a run", file=sys.stderr)
        return int(error.exit_code)
    readme: Any = README.read_text(encoding="utf-8")
    for mode in ("monitor", "result"):
        block = "\n".join(f"    {line}".rstrip() for line in picture(run, mode).splitlines())
        marks = (f"<!-- screen: {mode} -->\n", "\n<!-- end -->")
        readme = re.sub(
            f"{re.escape(marks[0])}.*?{re.escape(marks[1])}",
            lambda _, block=block, marks=marks: f"{marks[0]}\n{block}\n{marks[1]}",
            readme,
            flags=re.DOTALL,
        )
    README.write_text(readme, encoding="utf-8")
    print(f"README.md shows {run.id}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
