"""What the workbench costs: bytes, processor time, seconds until it shows something.

    python benchmarks/workbench.py

opens it in pseudo-terminals on a run whose log grows at the full rate of an engine (four metrics and one
reading of the machine a second; nothing is trained), and prints a table. Nothing else should run meanwhile.
"""

from __future__ import annotations

import platform
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "tui"), str(ROOT / "tests" / "run")]

from logs import LiveEngine, make_run  # noqa: E402
from pty_app import SIXTEEN, TRUE_COLOUR, PtyApp  # noqa: E402
from test_run_state import log_of, long_log  # noqa: E402

from engine.run.state import load_state  # noqa: E402

SIZES = ((80, 24), (200, 50))
SECONDS = 15.0
REPEATS = 5


def following(size: tuple[int, int], terminal: dict[str, str]) -> str:
    """One row: following a run in a terminal of ``size``."""
    with tempfile.TemporaryDirectory() as folder:
        run = make_run(Path(folder) / "runs", None)
        with LiveEngine(run), PtyApp(["attach", run.id], cwd=Path(folder), size=size, **terminal) as app:
            app.read(10.0, until=b"loss of block")
            app.read(2.0)
            before = app.cpu_seconds()
            frames = app.frames(SECONDS)
            used = (app.cpu_seconds() - before) / SECONDS
    colours = "true colour" if terminal is TRUE_COLOUR else "16 colours"
    return (
        f"| {size[0]}×{size[1]}, {colours} | {len(frames) / SECONDS:.1f} | {max(frames) / 1000:.1f} "
        f"| {statistics.mean(frames) / 1000:.1f} | {100 * used:.1f} |"
    )


def seconds_until(arguments: list[str], words: bytes, folder: Path) -> float:
    """Seconds from the start of the process until ``words`` are on the screen; the median."""
    times = []
    for _ in range(REPEATS):
        with PtyApp(arguments, cwd=folder) as app:
            app.read(20.0, until=words)
            times.append(time.monotonic() - app.began)
    return statistics.median(times)


def main() -> None:
    print("| following a run | refreshes/s | largest, KB | mean, KB | % of a core |")
    print("|---|---|---|---|---|")
    for size in SIZES:
        for terminal in (TRUE_COLOUR, SIXTEEN):
            print(following(size, terminal), flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = make_run(folder / "runs", None)
        run.events_path.write_bytes(log_of(long_log(200_000)))
        begun = time.perf_counter()
        load_state(run)
        read = time.perf_counter() - begun
        print(f"\nfirst paint of `eqat`: {seconds_until([], b'Setup', folder):.2f} s")
        attached = seconds_until(["attach", run.id], b"loss of block", folder)
        print(f"`eqat attach` on a log of 200 000 events: {attached:.2f} s; reading it alone: {read:.2f} s")
    processor = platform.processor() or platform.machine()
    print(f"Python {platform.python_version()}, textual {version('textual')}, {processor}")


if __name__ == "__main__":
    main()
