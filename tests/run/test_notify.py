"""Messages about runs: who gets which, and that nothing of them can harm a run."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from engine.config.loading import load
from engine.config.user import NotifyConfig
from engine.run import events, notify
from engine.run.directory import RunDirectory
from engine.run.event_log import EventWriter

WRITES = (
    "import os, sys; open(sys.argv[1], 'a').write(' '.join(sys.argv[2:]) + ' ' + os.environ['EQAT_FOLDER'])"
)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    made = RunDirectory.create(tmp_path / "runs", load("smoke"))
    with EventWriter(made.events_path, 1) as writer:
        for stage, perplexity in (("fp", 18.21), ("rtn", 90.0), ("block_ap", 23.67)):
            writer.emit(
                events.Eval(
                    stage=stage,
                    perplexity=perplexity,
                    tokens=9,
                    sequence_length=9,
                    seconds=1.0,
                    corpus="builtin",
                )
            )
        writer.emit(events.RunFinished(outcome="done", exit_code=0, seconds=5.5))
    return made


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's file."""
    monkeypatch.setenv("EQAT_CONFIG_DIR", str(tmp_path))
    return tmp_path / "config.toml"


class Hook(BaseHTTPRequestHandler):
    """Keeps what is posted; answers with what its server is told to, after as long."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.got.append(json.loads(body))  # type: ignore[attr-defined]
        time.sleep(self.server.slow)  # type: ignore[attr-defined]
        self.send_response(self.server.answer)  # type: ignore[attr-defined]
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hook() -> Iterator[HTTPServer]:
    server = HTTPServer(("127.0.0.1", 0), Hook)
    server.got, server.answer, server.slow = [], 200, 0.0  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def address(server: HTTPServer) -> str:
    return f"http://127.0.0.1:{server.server_port}/hook"


@pytest.mark.parametrize(
    ("code", "occasion"),
    [(0, "done"), (75, "stopped"), (130, "stopped"), (143, "stopped"), (1, "failed"), (7, "failed")],
)
def test_an_exit_code_says_what_has_become_of_a_run(code: int, occasion: str) -> None:
    assert notify.occasion_of(code) == occasion


def test_a_message_says_which_run_and_what_of_it(run: RunDirectory) -> None:
    expected = f"{run.id} is done: perplexity of full precision 18.21, perplexity of Block-AP 23.67"
    assert notify.message_of(run, "done") == expected
    assert notify.message_of(run, "waiting", "the disk is full") == f"{run.id} waits: the disk is full"
    with EventWriter(run.events_path, 2) as writer:
        writer.emit(
            events.Error(code="data", where="data.source", message="too \x1b[2J short", hint="", exit_code=4)
        )
        writer.emit(events.RunFinished(outcome="failed", exit_code=4, seconds=5.5))
    failed = notify.message_of(run, "failed")
    assert failed.startswith(f"{run.id} has failed: data.source: too ")
    assert failed.isprintable()


def test_a_program_and_a_webhook_are_given_the_message(
    run: RunDirectory, user: Path, tmp_path: Path, hook: HTTPServer
) -> None:
    told = tmp_path / "told"
    command = [sys.executable, "-c", WRITES, str(told), "{event}", "{message}"]
    user.write_text(f"[notify]\ncommand = {json.dumps(command)}\nwebhook = {json.dumps(address(hook))}\n")
    notify.notify(run, "done")
    message = notify.message_of(run, "done")
    assert told.read_text() == f"done {message} {run.path}"
    (got,) = hook.got  # type: ignore[attr-defined]
    assert (got["text"], got["content"], got["event"], got["run"]) == (message, message, "done", run.id)


def test_only_what_is_asked_for_is_told(run: RunDirectory, user: Path, hook: HTTPServer) -> None:
    user.write_text(f"[notify]\nwebhook = {json.dumps(address(hook))}\n")
    notify.notify(run, "stopped")
    assert hook.got == []  # type: ignore[attr-defined]
    user.write_text(f'[notify]\non = ["stopped"]\nwebhook = {json.dumps(address(hook))}\n')
    notify.notify(run, "done")
    notify.notify(run, "stopped")
    assert [got["event"] for got in hook.got] == ["stopped"]  # type: ignore[attr-defined]


def test_what_goes_wrong_is_a_line_and_takes_no_longer_than_it_may(
    run: RunDirectory,
    user: Path,
    hook: HTTPServer,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def said(text: str) -> str:
        user.write_text(text)
        notify.notify(run, "done")
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("warning: notify: ")
        return line

    missing = said('[notify]\ncommand = ["/no/such/program"]')
    assert "/no/such/program cannot be started: No such file" in missing
    fails = json.dumps([sys.executable, "-c", "import sys; sys.exit('no')"])
    assert "ended with 1: no" in said(f"[notify]\ncommand = {fails}")
    hook.answer = 500  # type: ignore[attr-defined]
    assert "answers 500" in said(f"[notify]\nwebhook = {json.dumps(address(hook))}")
    assert "cannot be reached" in said('[notify]\nwebhook = "http://127.0.0.1:9/x"')
    assert "there is no such field" in said("[notify]\nhook = 3")
    monkeypatch.setattr(notify, "PATIENCE", 0.3)
    sleeps = json.dumps([sys.executable, "-c", "import time; time.sleep(30)"])
    begun = time.monotonic()
    assert "did not end in 0 s" in said(f"[notify]\ncommand = {sleeps}")
    assert time.monotonic() - begun < 25


def test_what_a_program_leaves_in_the_background_is_not_waited_for(
    run: RunDirectory, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notify, "HEARING_S", 0.3)
    begun = time.monotonic()
    assert notify.send(NotifyConfig(command=("sh", "-c", "sleep 40 &")), "a message", run, "done")
    assert not notify.send(
        NotifyConfig(command=("sh", "-c", "sleep 40 & echo no >&2; exit 3")), "a message", run, "done"
    )
    assert time.monotonic() - begun < 30
    assert capsys.readouterr().err.splitlines() == ["warning: notify: sh ended with 3: no"]


def test_sending_says_whether_all_ways_took_it(run: RunDirectory, hook: HTTPServer) -> None:
    both = NotifyConfig(command=(sys.executable, "-c", "raise SystemExit(3)"), webhook=address(hook))
    assert not notify.send(both, "a message", run, "done")
    assert [got["text"] for got in hook.got] == ["a message"]  # type: ignore[attr-defined]
    assert notify.send(NotifyConfig(webhook=address(hook)), "another", run, "done")
