"""Standard streams that are closed, full, gone, or speak another language: in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
CODES = [
    f"{stdin} {stdout} {stderr}".strip()
    for stdin in ("", "0<&-")
    for stdout in ("", "1>&-")
    for stderr in ("", "2>&-")
]


def run(code: str, redirection: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """``code`` after the streams were opened, as the shell redirects it."""
    program = f"from engine.system.standard_streams import *\nopen_standard_streams()\n{code}"
    return subprocess.run(
        ["sh", "-c", f'"$0" -c "$1" {redirection}', sys.executable, program],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
    )


@pytest.mark.parametrize("redirection", CODES)
def test_no_file_gets_the_number_of_a_closed_stream(redirection: str, tmp_path: Path) -> None:
    code = (
        "import sys\nfile = open('made', 'w')\nassert file.fileno() > 2\n"
        "print('data'); print('words', file=sys.stderr); sys.stdin.read()\n"
        "file.write('written'); finish_output()"
    )
    done = run(code, redirection, tmp_path)
    assert done.returncode == 0
    assert (tmp_path / "made").read_text() == "written"
    assert done.stdout == (b"" if "1>" in redirection else b"data\n")
    assert done.stderr == (b"" if "2>" in redirection else b"words\n")


def test_a_child_has_all_three_streams_too(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys\n"
        "ask = 'import os; [os.fstat(fd) for fd in (0, 1, 2)]'\n"
        "sys.exit(subprocess.call([sys.executable, '-c', ask]))"
    )
    assert run(code, "0<&- 1>&- 2>&-", tmp_path).returncode == 0


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("ascii", rb"1 -> 2 x + - ~ \xe9 \u4e2d \udcff"),
        ("latin-1", b"1 -> 2 \xd7 + - ~ \xe9 \\u4e2d \\udcff"),
        ("utf-8", "1 → 2 × ✓ – … é 中 ".encode() + rb"\udcff"),
    ],
)
def test_an_encoding_without_our_signs_gets_those_of_ascii(
    encoding: str, shown: bytes, tmp_path: Path
) -> None:
    code = "import sys\nfor file in (sys.stdout, sys.stderr): print('1 → 2 × ✓ – … é 中 \\udcff', file=file)"
    done = run(code, "", tmp_path, PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stdout, done.stderr) == (0, shown + b"\n", shown + b"\n")


def test_a_full_output_is_one_error_and_no_more(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "for words in ('first', 'second'):\n"
        "    try:\n        print(words, flush=True)\n"
        "    except OutputError as error:\n        print(error, int(error.exit_code), file=sys.stderr)\n"
    )
    done = run(code, ">/dev/full", tmp_path)
    assert done.returncode == 0
    assert done.stderr.decode() == "standard output: the disk is full (what was printed is cut off) 7\n"


def test_output_that_is_only_written_at_the_end_is_an_error_then(tmp_path: Path) -> None:
    code = "print('held back')\ntry:\n    finish_output()\nexcept OutputError:\n    sys.exit(7)"
    done = run(code, ">/dev/full", tmp_path)
    assert (done.returncode, done.stderr) == (7, b"")


def test_narration_that_cannot_be_written_ends_nothing(tmp_path: Path) -> None:
    code = "import sys\nprint('words', file=sys.stderr, flush=True)\nprint('data')\nfinish_output()"
    done = run(code, "2>/dev/full", tmp_path)
    assert (done.returncode, done.stdout) == (0, b"data\n")


def test_the_streams_of_another_program_are_left_alone() -> None:
    import io

    from engine.system.standard_streams import open_standard_streams

    before = sys.stdout, sys.stderr
    mine = sys.stdout = io.StringIO()
    try:
        open_standard_streams()
        assert sys.stdout is mine
    finally:
        sys.stdout, sys.stderr = before
