"""What a command costs before it does anything: it is typed a hundred times a day, over SSH, where something
trains."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cli_tools import environment

TRIES = 12
"""The cheapest of so many counts: what else runs on this machine can only make a process dearer."""
YARDSTICK = (
    "import argparse, ast, asyncio, dataclasses, decimal, email.message, inspect, json, subprocess, typing, "
    "unittest, urllib.parse"
)
YARDSTICK_SECONDS = 0.103
"""What the yardstick takes on the machine of the limits while nothing else runs there. Beside other work the
same imports take more of a core, whose caches and clock they share, and so do ours."""
LEEWAY = 1.6
"""How much dearer than by the yardstick a command may still be: on hardware that others use too, the two were
seen to differ by so much for minutes. What a command does is counted to the call, below."""
EQAT = "from eqat_tui.__main__ import main; main()"
"""What the program ``eqat`` consists of once it is installed."""
COUNTED = f"""
import sys
counts = {{"call": 0, "c_call": 0}}
def count(frame, event, argument):
    if event in counts:
        counts[event] += 1
sys.setprofile(count)
try:
    {EQAT}
finally:
    sys.setprofile(None)
    print(sum(counts.values()), file=sys.stderr)
"""
"""The same, which says last how many calls it took, of Python's functions and of C's."""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of commands whose modules are compiled and kept, as on every machine of a user's."""
    known = environment(PYTHONPYCACHEPREFIX=str(tmp_path_factory.mktemp("bytecode")))
    known.pop("PYTHONDONTWRITEBYTECODE", None)
    return known


def processor_seconds(code: str, arguments: list[str], where: Path, environment: dict[str, str]) -> float:
    """Of one process, its own and the system's on its behalf."""
    child = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=where,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0
    return used.ru_utime + used.ru_stime


def command_line(given: object) -> str:
    """What a test of a command is called by; of its limit, nothing."""
    return " ".join(given) if isinstance(given, list) else ""


@pytest.mark.alone
@pytest.mark.parametrize(
    ("arguments", "most"),
    [(["--help"], 0.15), (["runs", "--json"], 0.25), (["presets"], 0.25)],
    ids=command_line,
)
def test_a_command_that_only_looks_costs_little(
    arguments: list[str], most: float, tmp_path: Path, compiled: dict[str, str]
) -> None:
    cheapest = yardstick = float("inf")
    for _ in range(TRIES):
        yardstick = min(yardstick, processor_seconds(YARDSTICK, [], tmp_path, compiled))
        cheapest = min(cheapest, processor_seconds(EQAT, arguments, tmp_path, compiled))
        if cheapest <= LEEWAY * most * max(1.0, yardstick / YARDSTICK_SECONDS):
            return
    pytest.fail(
        f"{cheapest:.3f} s of a processor ({yardstick:.3f} s the yardstick), "
        f"and {LEEWAY * most:.2f} s are the most"
    )


@pytest.mark.parametrize(
    ("arguments", "most"),
    [(["--help"], 280_000), (["runs", "--json"], 340_000), (["presets"], 400_000)],
    ids=command_line,
)
def test_a_command_that_only_looks_makes_few_calls(
    arguments: list[str], most: int, tmp_path: Path, compiled: dict[str, str]
) -> None:
    """The same number in every process, whatever else the machine does. When this was written: 216, 256 and
    310 thousand, which took 0.11, 0.19 and 0.19 s of the limits' machine."""
    for _ in range(2):  # The first compiles what it imports.
        done = subprocess.run(
            [sys.executable, "-c", COUNTED, *arguments],
            cwd=tmp_path,
            env=compiled,
            capture_output=True,
            text=True,
            check=True,
        )
    calls = int(done.stderr.split()[-1])
    assert calls <= most
    assert calls > 100_000  # It counted.
