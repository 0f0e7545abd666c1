"""``eqat attach HOST:RUN`` over a stand-in for ssh, which runs here what is to be run there; the rest is
real."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from cli_tools import Eqat, ended, environment, runs_at_work, start_eqat, story
from remote_tools import EQAT_THERE, Elsewhere
from waiting import PATIENCE, wait_until

from engine.config.derived import resolve
from engine.config.loading import load
from engine.errors import EqatError
from engine.run import events
from engine.run.directory import RunDirectory
from engine.run.event_log import EventWriter
from engine.run.finding import list_runs
from engine.run.liveness import run_state
from engine.run.lock import RunLock, holder
from engine.run.shown import show_run
from engine.run.sight import SeenFromAfar
from engine.run.state import load_state
from eqat_tui.feed import LiveFeed
from eqat_tui.remote import mirror as mirrors
from eqat_tui.remote import ssh
from eqat_tui.remote.mirror import attached
from eqat_tui.remote.ssh import Destination

GPU1 = Destination("gpu1", (), EQAT_THERE)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Elsewhere]:
    made = Elsewhere(tmp_path / "elsewhere")
    for name, value in made.variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("EQAT_CACHE_DIR", str(made.place / "cache"))
    monkeypatch.setattr(mirrors, "PAUSES_S", (0.0,))
    yield made
    for run in list_runs(made.there / "runs"):
        pid = holder(run.lock_path)
        if pid not in (None, os.getpid()):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def run_there(elsewhere: Elsewhere) -> RunDirectory:
    """A run over there that was never started."""
    return RunDirectory.create(elsewhere.there / "runs", resolve(load("smoke")))


def told(run: RunDirectory, *, attempt: int = 1, metrics: int = 40) -> None:
    """Add the events of an attempt that went well to the log of ``run``."""
    first, *others = story(run)
    with EventWriter(run.events_path, attempt) as writer:
        writer.emit(first)
        for step in range(1, metrics + 1):
            writer.emit(events.Metric(phase="block_ap", block=step, step=1, steps=8, epoch=0, loss=1 / step))
        for event in others:
            writer.emit(event)


def whole(log: Path) -> list[bytes]:
    """The lines of a log that are events."""
    return [
        line for line in log.read_bytes().split(b"\n")[:-1] if line.startswith(b"{") and line.endswith(b"}")
    ]


def follows_there(elsewhere: Elsewhere, script: str) -> RunDirectory:
    """A run over there that the scripted engine works on."""
    ended(start_eqat(elsewhere.there, script, "run", "smoke", "--device", "cpu", "--detach"))
    (run,) = runs_at_work(elsewhere.there)
    return run


def says(elsewhere: Elsewhere, *messages: dict[str, object]) -> Destination:
    """A program over there that says this and then nothing."""
    program, lines = elsewhere.place / "says", elsewhere.place / "lines"
    lines.write_text("".join(json.dumps(message) + "\n" for message in messages))
    program.write_text(f"#!/bin/sh\ncat {lines}\nexec sleep 60\n")
    program.chmod(0o755)
    return Destination("gpu1", (), str(program))


def attach(elsewhere: Elsewhere, *arguments: str) -> subprocess.Popen[str]:
    """``eqat attach ARGUMENTS`` here."""
    return subprocess.Popen(
        [sys.executable, "-m", "eqat_tui", "attach", *arguments, "--remote-command", EQAT_THERE],
        env=environment(**elsewhere.variables, EQAT_CACHE_DIR=str(elsewhere.place / "cache")),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def read_until(process: subprocess.Popen[str], words: str) -> str:
    """The lines that it tells, up to the first with these words."""
    assert process.stderr is not None
    said = ""
    while words not in said:
        line = process.stderr.readline()
        assert line, f"ended without {words!r}: {said}"
        said += line
    return said


# -- to its end ----------------------------------------------------------------------------------------


def test_a_real_run_elsewhere_is_followed_to_its_report_and_its_exit_code(elsewhere: Elsewhere) -> None:
    subprocess.run(
        [sys.executable, "-m", "eqat_tui", "run", "smoke", "--device", "cpu", "--detach"],
        cwd=elsewhere.there,
        env=environment(),
        check=True,
        capture_output=True,
    )
    process = attach(elsewhere, "me@gpu1:latest")
    out, err = ended(process)
    run = list_runs(elsewhere.there / "runs")[0]
    assert (process.returncode, run_state(run)) == (0, "done"), err
    assert "· done ·" in out
    assert f"me@gpu1:{run.path}" in out
    assert "E2E-QP" in err


def test_how_a_run_elsewhere_fails_is_told_with_what_to_type_there(elsewhere: Elsewhere) -> None:
    run = follows_there(elsewhere, "works")
    process = attach(elsewhere, "gpu1:latest")
    assert read_until(process, "step").count("\n") == 1  # where it is, at once
    os.kill(holder(run.lock_path) or 0, signal.SIGKILL)
    _, err = ended(process)
    assert process.returncode == 128 + signal.SIGKILL
    assert f"the end of gpu1:{run.path}/logs/attempt-001.log" in err
    assert f"ssh gpu1 '{EQAT_THERE} resume {run.path}' begins anew" in err


def test_json_is_one_document_with_the_place_over_there(
    elsewhere: Elsewhere, run_there: RunDirectory
) -> None:
    told(run_there)
    process = attach(elsewhere, "gpu1:", "--json")
    out, _ = ended(process)
    shown = json.loads(out)
    assert (shown["state"], shown["path"]) == ("done", f"gpu1:{run_there.path}")
    assert shown["perplexity"]["block_ap"] == 23.67


# -- a connection that breaks --------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_no_event_is_lost_or_doubled_wherever_the_connection_is_cut(
    elsewhere: Elsewhere, run_there: RunDirectory, seed: int
) -> None:
    """A log that grows meanwhile, with a torn line and a second attempt in it."""
    chance = random.Random(seed)
    told(run_there, metrics=20)
    elsewhere.cut(*[chance.choice([-1, chance.randrange(1, 15_000)]) for _ in range(5)])
    if elsewhere.cuts_left() and (elsewhere.place / "cuts").read_text().startswith("-1"):
        elsewhere.cut(chance.randrange(1, 15_000), -1, chance.randrange(1, 15_000))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mirrors, "SILENT_S", 60.0)

        def grow() -> None:
            with open(run_there.events_path, "ab", buffering=0) as log:
                log.write(b'{"kind":"metric","v":1,"seq":99,"att')  # a power cut
            told(run_there, attempt=2, metrics=60)

        with attached(GPU1, "latest") as found:
            feed = LiveFeed(found)
            feed.poll()
            threading.Thread(target=grow).start()
            wait_until(lambda: feed.poll().state.attempt == 2 and feed.poll().state.outcome == "done")
            assert whole(found.events_path) == whole(run_there.events_path)
            here, there = feed.poll(), LiveFeed(run_there).poll()
    assert here.state == there.state
    assert here.liveness == there.liveness == "done"
    assert found.sight.beginnings == 0
    assert len(elsewhere.asked()) >= 3


def test_a_cut_in_the_middle_of_a_line_is_gone_on_with_at_that_line(
    elsewhere: Elsewhere, run_there: RunDirectory
) -> None:
    told(run_there)
    size = run_there.events_path.stat().st_size
    elsewhere.cut(size)  # somewhere in the log: each line is longer by its envelope, and files come before it
    with attached(GPU1, "latest") as found:
        assert whole(found.events_path) == whole(run_there.events_path)
    second = elsewhere.asked()[1]
    assert "--from" in second
    assert "--from 0 " not in second


def test_a_log_that_begins_while_one_looks_is_not_told_again_after_a_cut(
    elsewhere: Elsewhere, run_there: RunDirectory
) -> None:
    with attached(GPU1, "latest") as found:
        told(run_there, metrics=2)
        wait_until(lambda: whole(found.events_path) == whole(run_there.events_path))
        found.sight.hang_up()
        wait_until(lambda: len(elsewhere.asked()) == 2)
        told(run_there, attempt=2)
        wait_until(lambda: whole(found.events_path) == whole(run_there.events_path))
        assert found.sight.beginnings == 0
        size = run_there.events_path.stat().st_size
        assert 0 < int(elsewhere.asked()[1].partition("--from ")[2].split()[0]) < size


def test_a_log_that_was_replaced_is_told_from_its_beginning(
    elsewhere: Elsewhere, run_there: RunDirectory
) -> None:
    told(run_there)
    with attached(GPU1, "latest") as found:
        feed = LiveFeed(found)
        assert feed.poll().state.outcome == "done"
        run_there.events_path.unlink()
        told(run_there, metrics=2)
        wait_until(lambda: found.sight.beginnings == 1)
        wait_until(lambda: whole(found.events_path) == whole(run_there.events_path))
        wait_until(lambda: feed.poll().state == LiveFeed(run_there).poll().state)


def test_a_log_that_was_replaced_while_nobody_could_look_is_told_from_its_beginning(
    elsewhere: Elsewhere, run_there: RunDirectory
) -> None:
    told(run_there)
    with attached(GPU1, "latest") as found:
        elsewhere.down(True)
        found.sight.hang_up()
        wait_until(found.sight.trouble)
        run_there.events_path.unlink()
        told(run_there, metrics=80)  # longer than the one before
        elsewhere.down(False)
        wait_until(lambda: whole(found.events_path) == whole(run_there.events_path))


def test_a_machine_that_cannot_be_seen_has_not_crashed_its_run(elsewhere: Elsewhere) -> None:
    run = follows_there(elsewhere, "works")
    with attached(GPU1, "latest") as found, pytest.MonkeyPatch.context() as patch:
        patch.setattr(mirrors, "PAUSES_S", (0.0, 3.0))
        feed = LiveFeed(found)
        assert (feed.poll().liveness, feed.poll().trouble) == ("running", "")
        elsewhere.down(True)
        found.sight.hang_up()
        wait_until(lambda: "trying again in" in feed.poll().trouble)
        view = feed.poll()
        assert view.liveness == "running"
        assert view.trouble.startswith("connection to gpu1 lost, trying again in ")
        assert "No route to host" in view.trouble
        before = view.now
        time.sleep(0.3)
        assert feed.poll().now == before  # nothing grows old that is not seen
        elsewhere.down(False)
        wait_until(lambda: not feed.poll().trouble)
        assert feed.poll().liveness == "running"
    assert run_state(run) == "running"


def test_a_connection_that_is_only_silent_counts_as_lost(
    elsewhere: Elsewhere, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a laptop wakes up in another network: nobody says that the connection is gone."""
    monkeypatch.setattr(mirrors, "SILENT_S", 0.5)
    hello = {"kind": "hello", "eqat": "0.1.0", "id": "silent", "path": "/x", "log": "", "start": 0}
    destination = says(elsewhere, hello, {"kind": "look", "now": 1.0, "state": "running"})
    with attached(destination, "latest") as found:
        wait_until(lambda: len(elsewhere.asked()) >= 3)  # each is hung up
        assert found.sight.look().state == "running"


def test_lines_say_once_that_a_connection_was_lost_and_once_that_it_is_back(elsewhere: Elsewhere) -> None:
    run = follows_there(elsewhere, "works")
    process = attach(elsewhere, "gpu1:latest")
    said = read_until(process, "step")  # a connection that is lost sooner was never there
    elsewhere.down(True)
    for connection in psutil.Process(process.pid).children(recursive=True):
        connection.terminate()
    said += read_until(process, "connection to gpu1 lost")
    wait_until(lambda: len(elsewhere.asked()) >= 3)  # tries that fail are not told again
    elsewhere.down(False)
    said += read_until(process, "connected again")
    process.send_signal(signal.SIGINT)
    err = said + ended(process)[1]
    assert (process.returncode, run_state(run)) == (0, "running")
    assert err.count("connection to gpu1 lost") == 1
    assert err.count("connected again") == 1
    assert "crashed" not in err
    assert f"left; the engine goes on: eqat attach gpu1:{run.path}" in err


def test_a_run_that_is_deleted_over_there_is_gone_and_not_tried_for_ever(
    elsewhere: Elsewhere, run_there: RunDirectory
) -> None:
    told(run_there)
    with attached(GPU1, "latest") as found:
        feed = LiveFeed(found)
        os.rename(run_there.path, elsewhere.place / "away")
        wait_until(lambda: feed.poll().liveness == "gone")
        assert feed.poll().trouble == ""
        wait_until(lambda: found.sight.failure is not None)  # type: ignore[attr-defined]


# -- requests ------------------------------------------------------------------------------------------


def test_a_stop_is_passed_on_and_its_end_is_seen(elsewhere: Elsewhere) -> None:
    run = follows_there(elsewhere, "works")
    with attached(GPU1, "latest") as found:
        feed = LiveFeed(found)
        found.sight.ask("stop")
        wait_until(lambda: feed.poll().liveness == "stopped")
    assert run_state(run) == "stopped"
    assert load_state(run).exit_code == 75


def test_an_abort_and_a_kill_are_passed_on(elsewhere: Elsewhere) -> None:
    run = follows_there(elsewhere, "ignores stop")
    with attached(GPU1, "latest") as found:
        found.sight.ask("stop")
        wait_until(lambda: load_state(run).acknowledged)
        found.sight.ask("abort")
        wait_until(lambda: run_state(run) == "aborted")
        ended(start_eqat(elsewhere.there, "works", "resume", "latest", "--detach"))
        feed = LiveFeed(found)
        wait_until(lambda: feed.poll().liveness == "running")
        found.sight.kill()
        wait_until(lambda: feed.poll().liveness == "crashed")
        assert "killed" in feed.poll().why_gone


def test_a_request_that_cannot_be_passed_on_says_so(elsewhere: Elsewhere, run_there: RunDirectory) -> None:
    told(run_there)
    with attached(GPU1, "latest") as found:
        with pytest.raises(EqatError, match=r"gpu1: .*is not running \(done\)") as wrong:
            found.sight.ask("stop")
        assert wrong.value.exit_code == 2
        elsewhere.down(True)
        with pytest.raises(EqatError, match=r"cannot be reached: .*No route to host") as wrong:
            found.sight.resume()
        assert wrong.value.exit_code == 3


# -- what goes wrong at once ---------------------------------------------------------------------------


def test_a_host_that_cannot_be_reached_is_one_line(elsewhere: Elsewhere) -> None:
    elsewhere.down(True)
    process = attach(elsewhere, "gpu1:latest")
    out, err = ended(process)
    assert (process.returncode, out) == (3, "")
    assert err == (
        "error: gpu1: cannot be reached: ssh: connect to host gpu1 port 22: No route to host "
        "(try: ssh gpu1 true)\n"
    )


def test_a_run_that_is_not_there_is_one_line_with_the_code_of_over_there(elsewhere: Elsewhere) -> None:
    process = attach(elsewhere, "gpu1:nonsense")
    _, err = ended(process)
    assert process.returncode == 2
    assert err.startswith("error: gpu1: ")
    assert "there is no run 'nonsense'" in err
    assert err.count("\n") == 1


def test_an_eqat_that_is_not_on_the_path_over_there_is_one_line_with_its_flag(
    eqat: Eqat, elsewhere: Elsewhere
) -> None:
    for command in ("no-such-eqat", str(elsewhere.place), f"{sys.executable} -m no_such_module"):
        ended_with = eqat("attach", "gpu1:latest", "--remote-command", command, **elsewhere.variables)
        assert ended_with.returncode == 3, command
        assert ended_with.stderr.count("\n") == 1
        assert "there is no " in ended_with.stderr
        assert "--remote-command" in ended_with.stderr


def test_options_that_mean_nothing_or_cannot_be_read_are_one_line(eqat: Eqat, elsewhere: Elsewhere) -> None:
    for arguments, says in (
        (("latest", "--ssh-option", "-p 2"), "--ssh-option: is for a run of another machine, HOST:RUN"),
        (("latest", "--remote-command", "x"), "--remote-command: is for a run of another machine, HOST:RUN"),
        (("gpu1:latest", "--ssh-option", "-p '2"), "--ssh-option: cannot be read: No closing quotation"),
    ):
        found = eqat("attach", *arguments)
        assert (found.returncode, found.stderr.count("\n")) == (2, 1), found.stderr
        assert says in found.stderr
    found = eqat("attach", "gpu1:latest", EQAT_SSH="ssh 'x")
    assert (found.returncode, found.stderr.count("\n")) == (2, 1), found.stderr
    assert "$EQAT_SSH: cannot be read" in found.stderr


def test_no_ssh_here_is_one_line(eqat: Eqat) -> None:
    found = eqat("attach", "gpu1:latest", EQAT_SSH="/no/such/ssh -v")
    assert found.returncode == 3
    assert found.stderr.startswith("error: /no/such/ssh: cannot be started: No such file or directory (")


@pytest.mark.parametrize("ref", ["-oProxyCommand=touch x:latest", "me@:latest"])
def test_what_is_no_host_is_refused(eqat: Eqat, elsewhere: Elsewhere, ref: str, tmp_path: Path) -> None:
    found = eqat("attach", "--", ref, **elsewhere.variables)
    assert found.returncode == 2, found.stderr
    assert found.stderr.count("\n") == 1
    assert not (elsewhere.place / "asked").exists()


@pytest.mark.parametrize(
    ("script", "code", "words"),
    [
        (
            """echo '{"kind":"hello","contract":7,"eqat":"9.1","id":"x","log":"","start":"new"}'""",
            3,
            "runs eqat 9.1, whose runs this one (0.1.0) cannot follow (install the same version here)",
        ),
        (
            """echo "error: No such command 'tail-events' (eqat --help)" >&2; exit 2""",
            3,
            "its eqat is too old for this one",
        ),
        ("exit 0", 3, "does not speak as eqat tail-events does"),
    ],
)
def test_another_version_over_there_is_one_line(
    eqat: Eqat, elsewhere: Elsewhere, script: str, code: int, words: str
) -> None:
    other = elsewhere.place / "other"
    other.write_text(f"#!/bin/sh\n{script}\n")
    other.chmod(0o755)
    found = eqat("attach", "gpu1:latest", "--remote-command", str(other), **elsewhere.variables)
    assert found.returncode == code, found.stderr
    assert words in found.stderr
    assert found.stderr.count("\n") == 1


def test_what_a_shell_prints_and_what_a_later_version_adds_is_passed_over(
    elsewhere: Elsewhere, run_there: RunDirectory
) -> None:
    told(run_there)
    with open(run_there.events_path, "ab") as log:
        log.write(b'{"kind":"from.the.future","v":1,"seq":500,"attempt":1,"t":1.0,"mono":1.0,"more":[1,2]}\n')
    noisy = elsewhere.place / "noisy"
    noisy.write_text(
        f"""#!/bin/sh
echo 'Welcome to gpu1!'
echo '{{"kind":"weather","sun":true}}'
{EQAT_THERE} "$@"
"""
    )
    noisy.chmod(0o755)
    with attached(Destination("gpu1", (), str(noisy)), "latest") as found:
        view = LiveFeed(found).poll()
        assert view.liveness == "done"
        assert view.state.event_count == LiveFeed(run_there).poll().state.event_count
        assert whole(found.events_path) == whole(run_there.events_path)  # a later reader of it may know more


def test_nothing_is_written_outside_of_the_copy(elsewhere: Elsewhere, tmp_path: Path) -> None:
    """Whatever the other machine says."""
    lines = [
        {
            "kind": "hello",
            "contract": 1,
            "eqat": "0.1.0",
            "id": "../../evil",
            "path": "/x",
            "log": "",
            "start": 0,
        },
        *(
            {"kind": "file", "name": name, "text": "x"}
            for name in (
                "../x",
                "/tmp/x",
                "logs/../../x",
                "control/x",
                "lock",
                "export/x",
                "logs/x",
                "config.toml",
            )
        ),
        {"kind": "look", "now": 1.0},
    ]
    with attached(says(elsewhere, *lines), "latest") as found:
        room = found.path.parent
        files = sorted(str(path.relative_to(room)) for path in room.rglob("*") if path.is_file())
        assert files == ["run/config.toml", "run/events.jsonl"]
    assert not room.exists()


def test_copies_that_a_killed_viewer_has_left_are_removed_by_the_next_one(
    elsewhere: Elsewhere, run_there: RunDirectory
) -> None:
    follows_there(elsewhere, "works")
    rooms = elsewhere.place / "cache" / "attached"
    process = attach(elsewhere, "gpu1:latest")
    read_until(process, "step")
    with attached(GPU1, "latest"):
        assert len(list(rooms.iterdir())) == 2  # one that lives is left alone
        process.kill()
        process.communicate()
    assert len(list(rooms.iterdir())) == 1
    with attached(GPU1, "latest") as found:
        assert list(rooms.iterdir()) == [found.path.parent]
    assert list(rooms.iterdir()) == []


# -- names ---------------------------------------------------------------------------------------------


def test_host_and_run_are_told_apart_as_scp_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert ssh.split("gpu1:latest") == ("gpu1", "latest")
    assert ssh.split("me@gpu1.example.com:runs/x:y") == ("me@gpu1.example.com", "runs/x:y")
    assert ssh.split("gpu1:") == ("gpu1", "latest")
    assert ssh.split("me@[::1]:w2") == ("me@::1", "w2")
    for here in ("latest", "runs/2025", "./odd:name", "/runs/odd:name", "~/runs/odd:name"):
        assert ssh.split(here) is None, here
    (tmp_path / "odd:name").mkdir()
    assert ssh.split("odd:name") is None


def test_options_of_ssh_come_before_the_host_and_words_are_quoted(
    eqat: Eqat, elsewhere: Elsewhere, run_there: RunDirectory
) -> None:
    told(run_there)
    odd = elsewhere.there / "my runs; $(touch x)"
    os.rename(elsewhere.there / "runs", odd)
    found = eqat(
        *("attach", "gpu1:latest", "--json", "--runs-dir", odd.name),
        *("--ssh-option", "-p 2222", "--ssh-option=-J bastion", "--remote-command", EQAT_THERE),
        **elsewhere.variables,
    )
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["state"] == "done"
    assert elsewhere.asked()[0].startswith("['-p', '2222', '-J', 'bastion', '-T', ")
    assert not (elsewhere.there / "x").exists()


# -- eqat tail-events by itself ------------------------------------------------------------------------


def lines_of(text: str, kind: str) -> list[dict[str, object]]:
    return [found for found in map(json.loads, text.splitlines()) if found["kind"] == kind]


def test_tail_events_goes_on_from_any_byte(eqat: Eqat, tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "runs", resolve(load("smoke")))
    told(run)
    every = lines_of(eqat("tail-events", "latest", "--once").stdout, "event")
    assert [found["event"] for found in every] == [json.loads(line) for line in whole(run.events_path)]
    ends = [found["end"] for found in every]
    assert ends[-1] == run.events_path.stat().st_size
    third = ends[2]
    assert isinstance(third, int)
    for offset, first in ((third, 3), (third + 1, 4), (third - 1, 3)):
        rest = eqat("tail-events", "latest", "--once", "--from", str(offset)).stdout
        assert lines_of(rest, "event") == every[first:], offset


def test_tail_events_ends_when_its_reader_is_gone(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "runs", resolve(load("smoke")))
    told(run)
    with RunLock(run.lock_path):
        process = subprocess.Popen(
            [sys.executable, "-m", "eqat_tui", "tail-events", "latest"],
            cwd=tmp_path,
            env=environment(),
            stdout=subprocess.PIPE,
        )
        assert process.stdout is not None
        assert b'"hello"' in process.stdout.readline()
        process.stdout.close()
        assert process.wait(PATIENCE) == -signal.SIGPIPE


def test_copies_of_another_machines_run_are_never_asked_for_its_lock(
    elsewhere: Elsewhere, run_there: RunDirectory
) -> None:
    """Whoever looks at them as if they were a run of this machine would call it crashed."""
    told(run_there, metrics=1)
    with open(run_there.events_path, "ab") as log:  # a third attempt that works
        log.write(whole(run_there.events_path)[0].replace(b'"attempt":1', b'"attempt":2') + b"\n")
    with RunLock(run_there.lock_path), attached(GPU1, "latest") as found:
        assert isinstance(found, SeenFromAfar)
        assert show_run(found)["state"] == "running"
        assert LiveFeed(found).poll().pid == os.getpid()
