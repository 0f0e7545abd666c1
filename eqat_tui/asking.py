"""A process that may load torch is asked one thing, and says what came of it: the request goes to its
standard input, its answer is the last line of JSON on its standard output."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from engine.errors import EqatError, ExitCode, PreflightError
from engine.run.launch import python_environment

LONGEST_S = 3600.0
"""Seconds after its last word that a process may take to end."""


def answer_of(
    module: str,
    request: msgspec.Struct,
    answer: str,
    *,
    where: str,
    heard: Callable[[Mapping[str, Any]], None] = lambda said: None,
) -> dict[str, Any]:
    """What the process that runs ``module`` says at its end, an object with the field ``answer``; ``heard``
    is handed every object before. ``where`` is the command, for messages.

    Raises:
        EqatError: what it refuses, or how it died.
    """
    last: dict[str, Any] = {}
    # Not a pipe: nobody would read it while the process talks on its other one.
    with tempfile.TemporaryFile() as words:
        with subprocess.Popen(
            [sys.executable, "-P", "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=words,
            env=python_environment(),
        ) as child:
            assert child.stdin is not None
            assert child.stdout is not None
            try:
                child.stdin.write(msgspec.json.encode(request))
                child.stdin.close()
                for line in child.stdout:
                    last = _object(line) or last
                    heard(last)
                child.wait(LONGEST_S)
            except BrokenPipeError:  # it died before it heard what is asked
                child.wait(LONGEST_S)
            except BaseException:
                child.kill()
                raise
        words.seek(0)
        said = words.read()[-10_000:].decode(errors="replace").strip().splitlines()
    if "error" in last:
        error = last["error"]
        raise EqatError(
            error["message"], exit_code=ExitCode(error["exit_code"]), where=error["where"], hint=error["hint"]
        )
    if answer not in last:
        raise PreflightError(_death(child.returncode, said), where=where)
    return last


def _death(code: int, said: Sequence[str]) -> str:
    """How a process ended that said nothing of why."""
    if code == -signal.SIGKILL:
        return "its process was killed, often by the kernel for want of memory"
    if code < 0:
        names = {number.value: number.name for number in signal.Signals}
        return f"its process crashed with {names.get(-code, f'signal {-code}')}"
    return f"its process ended with {code}" + (f": {said[-1][:200]}" if said else "")


def _object(line: bytes) -> dict[str, Any]:
    """What the line says; nothing for one that a library printed."""
    try:
        tree = json.loads(line)
    except ValueError:
        return {}
    return tree if isinstance(tree, dict) else {}
