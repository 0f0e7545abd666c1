"""A message when a run ends or waits, to whoever its user's ``config.toml`` names.

The engine sends it, so that it comes without the app and without a terminal. It can change nothing: what
goes wrong is a line in the run's log, and nobody waits longer than :data:`PATIENCE`. A run that is killed
cannot speak any more, and sends none.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any

from engine.config.stages import stage_label
from engine.config.user import NotifyConfig, Occasion, load_user_config
from engine.errors import EqatError, ExitCode, first_line
from engine.run.directory import RunDirectory
from engine.run.shown import show_run
from engine.system.printable import printable

PATIENCE = 10.0
"""Seconds that a message may take."""
LAST_WORDS = 4096
"""Bytes of what a program says last are kept."""
HEARING_S = 1.0
"""The last words of a program that has failed are waited for so long."""
STAGE_WORDS = 2
"""Perplexities that a message names: the first, of full precision, and the last."""


def occasion_of(code: int) -> Occasion:
    """What has become of an attempt at a run, by its exit code."""
    if code in (ExitCode.STOPPED, ExitCode.ABORTED, ExitCode.TERMINATED):
        return "stopped"
    return "done" if code == ExitCode.DONE else "failed"


def notify(run: RunDirectory, occasion: Occasion, why: str = "") -> None:
    """Tell that ``run`` is done, has failed, was stopped or waits, as the user wants it told."""
    try:
        wanted = load_user_config().notify
    except EqatError as error:
        _complain(str(error))
        return
    if occasion in wanted.on and (wanted.command or wanted.webhook):
        send(wanted, message_of(run, occasion, why), run, occasion)


def message_of(run: RunDirectory, occasion: Occasion, why: str = "") -> str:
    """One line: which run, what became of it, and the numbers or the reason."""
    facts = [why] if why else []
    with contextlib.suppress(EqatError):
        facts = facts or _facts(show_run(run), occasion)
    end = f": {', '.join(facts)}" if facts else ""
    return printable(f"{run.id} {_WORDS[occasion]}{end}")


_WORDS: Mapping[Occasion, str] = {
    "done": "is done",
    "failed": "has failed",
    "stopped": "was stopped",
    "waiting": "waits",
}


def _facts(shown: Mapping[str, Any], occasion: Occasion) -> list[str]:
    if occasion == "failed" and shown["error"]:
        where, message = shown["error"]["where"], shown["error"]["message"]
        return [f"{where}: {message}" if where else message]
    if occasion != "done":
        return []
    known = [(stage, value) for stage, value in shown["perplexity"].items() if value is not None]
    named = known if len(known) < STAGE_WORDS else [known[0], known[-1]]
    return [f"perplexity of {stage_label(stage)} {value:.4g}" for stage, value in named]


def send(wanted: NotifyConfig, message: str, run: RunDirectory, occasion: Occasion) -> bool:
    """By all ways at once; whether all of them took it. What does not is told on stderr."""
    values = {"message": message, "run": run.id, "event": occasion, "folder": str(run.path)}
    ways: list[Callable[[], None]] = []
    if wanted.command:
        ways.append(lambda: _start(wanted.command, values))
    if wanted.webhook:
        ways.append(lambda: _post(wanted.webhook, values))
    taken: list[bool] = []

    def go(way: Callable[[], None]) -> None:
        try:
            way()
        except Exception as error:  # whatever a program or a server does, the run is not touched
            _complain(first_line(error, 200))
        else:
            taken.append(True)

    threads = [threading.Thread(target=go, args=(way,), daemon=True) for way in ways]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE + 1.0)
        if thread.is_alive():
            _complain(f"no answer in {PATIENCE:.0f} s")
    return len(taken) == len(ways)


def _start(command: tuple[str, ...], values: Mapping[str, str]) -> None:
    arguments = [_filled(part, values) for part in command]
    environment = {**os.environ, **{f"EQAT_{name.upper()}": value for name, value in values.items()}}
    try:
        process = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
            env=environment,
        )
    except OSError as error:
        raise RuntimeError(f"{arguments[0]} cannot be started: {error.strerror}") from None
    said = bytearray()
    # On a thread: what the program has left in the background may hold the pipe open for as long as it likes.
    hears = threading.Thread(target=_hear, args=(process, said), daemon=True)
    hears.start()
    try:
        code = process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise TimeoutError(f"{arguments[0]} did not end in {PATIENCE:.0f} s") from None
    if code != 0:
        hears.join(HEARING_S)
        words = bytes(said).decode(errors="replace").strip().splitlines()
        raise RuntimeError(f"{arguments[0]} ended with {code}: {words[-1] if words else 'no word'}")


def _hear(process: subprocess.Popen[bytes], said: bytearray) -> None:
    """Keep the last of what a program says on stderr, until all that hold it have closed it."""
    assert process.stderr is not None
    while piece := os.read(process.stderr.fileno(), LAST_WORDS):
        said[:] = (said + piece)[-LAST_WORDS:]


def _filled(part: str, values: Mapping[str, str]) -> str:
    for name, value in values.items():
        part = part.replace(f"{{{name}}}", value)
    return part


def _post(address: str, values: Mapping[str, str]) -> None:
    text = values["message"]
    body = {"text": text, "content": text, "host": socket.gethostname(), **values}
    request = urllib.request.Request(
        address,
        json.dumps(body).encode(),
        {"Content-Type": "application/json", "User-Agent": "eqat"},
        method="POST",
    )
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE):
            pass
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"the webhook answers {error.code} {error.reason}") from None
    except (OSError, ValueError) as error:
        raise RuntimeError(f"the webhook cannot be reached: {getattr(error, 'reason', error)}") from None


def _complain(what: str) -> None:
    print(f"warning: notify: {printable(what)}", file=sys.stderr, flush=True)
