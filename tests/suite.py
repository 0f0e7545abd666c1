"""The whole suite: what can share the machine, then what must be alone; what failed is run once more.

A machine that others use stands still for seconds, and of six thousand tests, many of which drive programs in
a terminal, one may notice. It has failed for that if it passes where nothing runs beside it, and is named as
such; a fault fails twice. Where more than a few fail, nothing is run again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

AGAIN = 3
"""So many tests may have failed by chance."""
FAILED = 1
"""Exit code of pytest where tests failed, and nothing worse."""


def run(folder: Path, cache: Path, *options: str) -> int:
    """One run of pytest; what failed is noted in ``cache``."""
    command = [sys.executable, "-m", "pytest", "-o", f"cache_dir={cache}", *options]
    return subprocess.run(command, cwd=folder, check=False).returncode


def failures(cache: Path) -> list[str]:
    """The tests that failed, as pytest noted them."""
    noted = cache / "v" / "cache" / "lastfailed"
    return sorted(json.loads(noted.read_text())) if noted.exists() else []


def part(folder: Path, which: str, *options: str) -> tuple[int, list[str]]:
    """Run the tests that ``which`` selects; the exit code, and what failed at first and passed again."""
    with tempfile.TemporaryDirectory(prefix="eqat-tests-") as place:
        cache = Path(place)
        code = run(folder, cache, "-m", which, *options)
        failed = failures(cache)
        # With several workers pytest says the same of files that it could not read.
        all_ran = all("::" in name for name in failed)
        if code != FAILED or not all_ran or not 0 < len(failed) <= AGAIN:
            return code, []
        print(f"\nonce more, with nothing beside it: {', '.join(failed)}", flush=True)
        code = run(folder, cache, "-m", which, "--last-failed", "--last-failed-no-failures", "none")
        return code, sorted(set(failed) - set(failures(cache)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", default="3", help="processes that share the tests")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parents[1])
    chosen = parser.parse_args()
    shared, first = part(chosen.folder, "not alone", "-n", chosen.workers, "--dist", "worksteal")
    alone, second = part(chosen.folder, "alone")
    for name in first + second:
        print(f"unsteady: {name} failed, and passed when run again")
    return shared or alone


if __name__ == "__main__":
    sys.exit(main())
