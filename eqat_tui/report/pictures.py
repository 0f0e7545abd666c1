"""The charts of a report as pictures of their own: SVG, and PNG by a library that draws it.

They are the figures of the page. A picture has its title within, the light colours, and no variable and no
rule that another program may not know.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from engine.errors import EqatError, PreflightError, UsageError, first_line
from engine.run.comparison import compared, named_twice
from engine.run.directory import RunDirectory
from engine.run.state import load_state
from engine.system.files import atomic_write
from eqat_tui.outside import begins_with, outside_runs, write_failed
from eqat_tui.report.curves import charts_across, charts_of
from eqat_tui.report.markup import Html, tag
from eqat_tui.report.place import default_file
from eqat_tui.report.style import background, picture_style
from eqat_tui.report.svg import LEFT, WIDTH, Chart

SIGN = "<?xml version='1.0' encoding='UTF-8'?>\n<!-- made by eqat report -->\n"
"""What a picture of ours begins with: a file that does may be replaced by a newer one."""
ANOTHER = "choose another folder with --charts"
INSTALL = "pip install resvg-py"
HEAD = 30
"""Above the chart, for its title."""
BELOW = 8
SHARPNESS = 2.0
"""Pixels of a PNG for one of the page."""


def default_folder(runs: Sequence[RunDirectory]) -> Path:
    """What their folder is called where none was named: as the report's file."""
    return Path(f"{default_file(runs).stem}-charts")


def pictures(runs: Sequence[RunDirectory]) -> dict[str, Chart]:
    """The charts of the report on ``runs``, by what their files are called.

    Raises:
        UsageError: for a run that is named twice, or more runs than can be compared.
        EqatError: for one whose log cannot be read.
    """
    named_twice(runs)
    side_by_side = compared(runs) if len(runs) > 1 else []
    across = charts_across(side_by_side) if side_by_side else []
    found = {f"all-{_slug(chart.caption)}": chart for chart in across}
    letters = [f"{one.letter.lower()}-" for one in side_by_side] or [""]
    for run, letter in zip(runs, letters, strict=True):
        found |= {f"{letter}{_slug(chart.caption)}": chart for chart in charts_of(load_state(run))}
    return found


def as_svg(chart: Chart) -> str:
    """A chart as a file of its own."""
    height = chart.height + HEAD + BELOW
    title = tag("text", chart.caption, x=LEFT if len(chart.caption) < 60 else 8, y=20, class_="name title")
    return SIGN + tag(
        "svg",
        tag("title", chart.caption),
        tag("desc", chart.said),
        tag("style", Html(picture_style())),
        tag("rect", width=WIDTH, height=height, fill=background()),
        title,
        tag("g", chart.body, transform=f"translate(0 {HEAD})"),
        xmlns="http://www.w3.org/2000/svg",
        role="img",
        viewBox=f"0 0 {WIDTH} {height:.0f}",
        width=WIDTH,
        height=height,
    )


def write_pictures(folder: Path, charts: Mapping[str, Chart], *, png: bool = False) -> list[Path]:
    """Write every chart into the folder, which is made if it is not there; what was written.

    Raises:
        UsageError: for a folder in a run, or that has somebody's file of such a name.
        PreflightError: where what draws PNG is not installed.
        EqatError: with code 7 where the disk is full.
    """
    if png and find_spec("resvg_py") is None:
        raise PreflightError("resvg-py is not installed", where="--png", hint=INSTALL)
    outside_runs(folder / "chart.svg", ANOTHER)
    endings = (".svg", ".png") if png else (".svg",)
    for name in charts:
        _check(folder, name, endings)
    written: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, chart in charts.items():
            drawn = as_svg(chart)
            for ending in endings:
                file = folder / f"{name}{ending}"
                atomic_write(file, drawn.encode("utf-8") if ending == ".svg" else as_png(drawn))
                written.append(file)
    except (OSError, EqatError) as error:
        raise write_failed(error, folder, ANOTHER) from error
    return written


def as_png(svg: str) -> bytes:
    """The picture in pixels. Letters are drawn with a font of this machine."""
    import resvg_py

    try:
        return bytes(
            resvg_py.svg_to_bytes(svg_string=svg, zoom=SHARPNESS, sans_serif_family="DejaVu Sans", dpi=96)
        )
    except Exception as error:  # of a library in Rust
        raise PreflightError(
            f"cannot be drawn: {first_line(error, 200)}", where="--png", hint=INSTALL
        ) from error


def _check(folder: Path, name: str, endings: Sequence[str]) -> None:
    """UsageError for a file of somebody else's; a PNG is ours where the SVG beside it is."""
    ours = begins_with(folder / f"{name}.svg", SIGN)
    for ending in endings:
        file = folder / f"{name}{ending}"
        if os.path.lexists(file) and (not ours or file.is_symlink() or not file.is_file()):
            raise UsageError("exists and is no chart of eqat", where=str(file), hint=ANOTHER)


def _slug(title: str) -> str:
    """A title as a name of a file."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")[:60]
