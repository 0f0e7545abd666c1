"""``make test`` on small suites: what it runs again, and what it does not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import suite

PASSES = "def test_passes(): pass\n"
ALONE = "import pytest\n@pytest.mark.alone\ndef test_by_itself(): pass\n"
FIRST_TIME = """
from pathlib import Path
def test_unsteady():
    met, here = Path(__file__).parent / "met", not (Path(__file__).parent / "met").exists()
    met.touch()
    assert not here
"""


def run(folder: Path, *, workers: int = 0, **files: str) -> subprocess.CompletedProcess[str]:
    """The suite of ``files``, by pytest with nothing but xdist, which starts sooner."""
    for name, text in files.items():
        (folder / f"test_{name}.py").write_text(text)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = alone: by itself\n")
    return subprocess.run(
        [sys.executable, suite.__file__, "--workers", str(workers), "--folder", str(folder)],
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_PLUGINS": "xdist.plugin"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_what_fails_by_chance_is_named_and_a_fault_fails_twice(tmp_path: Path) -> None:
    by_chance = run(tmp_path, workers=2, one=PASSES, two=ALONE, three=FIRST_TIME)
    assert by_chance.returncode == 0, by_chance.stdout
    assert "1 failed, 1 passed" in by_chance.stdout  # beside each other, then the one that is alone
    assert by_chance.stdout.count("1 passed") == 3
    assert "unsteady: test_three.py::test_unsteady failed" in by_chance.stdout
    (tmp_path / "met").unlink()
    a_fault = run(tmp_path, four="import pytest\n@pytest.mark.alone\ndef test_fails(): assert False\n")
    assert a_fault.returncode == suite.FAILED
    assert a_fault.stdout.count("test_fails - assert False") == 2
    assert a_fault.stdout.count("unsteady: ") == 1


def test_where_many_fail_nothing_is_run_again(tmp_path: Path) -> None:
    numbers = range(suite.AGAIN + 1)
    many = f"import pytest\n@pytest.mark.parametrize('n', {numbers})\ndef test_fails(n): assert n < 0\n"
    done = run(tmp_path, one=PASSES, two=ALONE, three=many)
    assert done.returncode == suite.FAILED
    assert done.stdout.count("test_fails[0] - ") == 1


def test_a_file_that_cannot_be_read_is_not_run_again(tmp_path: Path) -> None:
    done = run(tmp_path, workers=2, one=PASSES, two=ALONE, three="import nothing_of_this_name\n")
    assert done.returncode != 0
    assert "once more" not in done.stdout


def test_a_suite_without_tests_is_a_fault(tmp_path: Path) -> None:
    assert run(tmp_path).returncode != 0
