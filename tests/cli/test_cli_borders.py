"""What leaves the command line: foreign words, closed and full streams, terminals with other letters."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_tools import EQAT_WITH_SCRIPTED_ENGINE, SCRIPTED_ENGINE, Eqat, environment, story, wait_until

from engine.run import events
from engine.run.directory import RunDirectory
from engine.run.event_log import EventWriter
from engine.run.finding import list_runs
from engine.run.liveness import run_state
from engine.system.printable import hides
from eqat_tui import actions

EVIL = "\x1b]0;owned\x07\x1b]52;c;ZXZpbA==\x07\x9b31m\x7f exe.\u202egpj \u2028[/]"
RUN = ("run", "smoke", "--device", "cpu")
pytestmark = pytest.mark.usefixtures("no_engine_outlives_its_test")


def redirected(
    redirection: str, where: Path, *arguments: str, script: str = "", **extra: str
) -> subprocess.CompletedProcess[bytes]:
    """``eqat ARGUMENTS`` as a shell runs it, its streams redirected; with ``script`` on a scripted engine."""
    eqat = ["-c", EQAT_WITH_SCRIPTED_ENGINE, SCRIPTED_ENGINE] if script else ["-m", "eqat_tui"]
    return subprocess.run(
        ["sh", "-c", f'exec "$0" "$@" {redirection}', sys.executable, *eqat, *arguments],
        cwd=where,
        env=environment(SCRIPT=script, **extra),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=120,
    )


@pytest.fixture
def evil_run(new_run: Callable[[], RunDirectory]) -> RunDirectory:
    """A finished run whose log, status and configuration have words that steer terminals."""
    run = new_run()
    text = run.config_toml.read_text()
    assert "random://tiny-llama" in text
    run.config_toml.write_text(
        text.replace("random://tiny-llama", json.dumps(EVIL)[1:-1].replace("\\u007f", ""))
    )
    with EventWriter(run.events_path, 1) as writer:
        for event in story(run):
            writer.emit(event)
        writer.emit(
            events.RunStarted(id=EVIL, pid=1, host=EVIL, device=EVIL, versions={EVIL: EVIL}, argv=[EVIL])
        )
        writer.emit(events.Plan(plan={EVIL: EVIL, "warnings": [EVIL], "fp_bytes": EVIL}))
        writer.emit(events.Warning(code=EVIL, message=EVIL, hint=EVIL))
        writer.emit(events.Sample(stage="fp", prompt=EVIL, text=f"first\n\tsecond {EVIL}"))
        writer.emit(
            events.Export(
                format=EVIL, path=EVIL, verified=True, bytes=1, fp_bytes=1, bits_per_weight=1, copied_to=EVIL
            )
        )
        writer.emit(events.Error(code=EVIL, where=EVIL, message=EVIL, hint=EVIL, exit_code=3))
        writer.emit(events.RunFinished(outcome="failed", exit_code=3, seconds=1.0))
    return run


def is_clean(*outputs: bytes) -> bool:
    return not any(hides(letter) for out in outputs for letter in out.decode() if letter not in "\n\t")


@pytest.mark.parametrize(
    "arguments",
    [
        ("runs",),
        ("runs", "--json"),
        ("show", "latest"),
        ("show", "latest", "--json"),
        (),
        ("attach", "latest", "--plain"),
        ("show", EVIL.replace("\0", "")),
        ("plan", f"nothing{EVIL}.toml"),
        ("run", "smoke", "--set", f"grid.bits={EVIL}"),
        ("run", "smoke", "--set", f"{EVIL}=1"),
        ("run", "smoke", "--model", f"/no{EVIL}", "--json"),
        ("runs", f"--{EVIL}"),
        ("runs", "-n", EVIL),
        (f"do{EVIL}",),
        ("export", "latest", "--format", EVIL),
    ],
    ids=lambda arguments: " ".join(arguments)[:20].encode("ascii", "ignore").decode() or "overview",
)
def test_nothing_foreign_reaches_the_terminal_raw(
    arguments: tuple[str, ...], evil_run: RunDirectory, tmp_path: Path
) -> None:
    done = redirected("", tmp_path, *arguments)
    assert is_clean(done.stdout, done.stderr)
    assert b"Traceback" not in done.stderr
    assert done.stdout or done.stderr


def test_json_says_the_same_words_in_escapes(evil_run: RunDirectory, tmp_path: Path) -> None:
    for encoding in ("utf-8", "ascii", "latin-1"):
        out = redirected("", tmp_path, "show", "latest", "--json", PYTHONIOENCODING=encoding).stdout
        shown = json.loads(out.decode(encoding))
        assert (shown["device"], shown["host"], shown["error"]["where"]) == (EVIL, EVIL, EVIL)
        assert b"\\u001b" in out
        assert not set(out) & {*range(0x09), 0x1B, 0x7F, *range(0x80, 0xA0)} or encoding == "utf-8"


def test_what_a_model_writes_is_printed_as_words_on_lines(evil_run: RunDirectory, tmp_path: Path) -> None:
    with EventWriter(evil_run.events_path, 2) as writer:  # only a run that is done is asked to write
        writer.emit(events.RunStarted(id=EVIL, pid=1, host=EVIL, device=EVIL, versions={}, argv=[]))
        writer.emit(events.RunFinished(outcome="done", exit_code=0, seconds=1.0))
    done = redirected("", tmp_path, "generate", "latest", "--prompt", "x", script="finishes")
    assert b"first\n\tsecond \\x1b]0;owned\\x07" in done.stdout
    assert is_clean(done.stdout, done.stderr)


# -- streams -------------------------------------------------------------------------------------------

CLOSED = ["2>&-", "1>&-", "0<&-", "0<&- 2>&-", "1>&- 2>&-", "0<&- 1>&- 2>&-"]


@pytest.mark.parametrize("redirection", CLOSED)
@pytest.mark.parametrize("detach", [False, True], ids=["followed", "detached"])
def test_a_run_that_is_made_is_started_whatever_streams_are_closed(
    redirection: str, detach: bool, tmp_path: Path
) -> None:
    done = redirected(redirection, tmp_path, *RUN, *(["--detach"] if detach else []), script="finishes")
    assert done.returncode == 0
    run = list_runs(tmp_path / "runs")[0]
    wait_until(lambda: run_state(run) == "done")
    for file in (*run.path.rglob("*.log"), run.lock_path, run.events_path):
        assert (
            run.id.encode() not in file.read_bytes() or file == run.events_path
        )  # no message went into a file
    if "1>" not in redirection:
        assert run.id.encode() in done.stdout


EVERY_KIND = (
    ("--help",),
    ("--version",),
    ("run", "--help"),
    ("presets", "--json"),
    ("runs",),
    ("plan", "smoke"),
    (),
)


@pytest.mark.parametrize("arguments", EVERY_KIND, ids=lambda arguments: " ".join(arguments) or "overview")
def test_a_full_output_is_one_line_and_exit_code_7(
    arguments: tuple[str, ...], finished_run: RunDirectory, tmp_path: Path
) -> None:
    done = redirected(">/dev/full", tmp_path, *arguments)
    assert done.returncode == 7
    assert done.stderr.decode() == "error: standard output: the disk is full (what was printed is cut off)\n"


def test_a_mistake_keeps_its_exit_code_when_output_is_full(tmp_path: Path) -> None:
    done = redirected(">/dev/full", tmp_path, "show", "nothing", "--json")
    assert done.returncode == 2
    assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize("arguments", [("runs",), ("show", "latest"), ("show", "nothing")])
def test_messages_that_nobody_can_get_change_nothing(
    arguments: tuple[str, ...], finished_run: RunDirectory, tmp_path: Path
) -> None:
    heard = redirected("", tmp_path, *arguments)
    done = redirected("2>/dev/full", tmp_path, *arguments)
    assert (done.returncode, done.stdout) == (heard.returncode, heard.stdout)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "ascii:strict", "cp1252"])
def test_a_terminal_without_our_letters_gets_ascii(
    encoding: str, finished_run: RunDirectory, tmp_path: Path
) -> None:
    done = redirected("", tmp_path, "show", "latest", PYTHONIOENCODING=encoding, LC_ALL="C")
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"23.67" in done.stdout
    assert b"50.0 MiB" in done.stdout
    assert b"200 MiB -> 50.0 MiB" in done.stdout


def test_a_reader_that_has_seen_enough_ends_it_quietly(finished_run: RunDirectory, tmp_path: Path) -> None:
    done = redirected("| head -c 1", tmp_path, "presets")
    assert done.stderr == b""


# -- damaged runs --------------------------------------------------------------------------------------


def a_folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def deep(path: Path) -> None:
    path.write_bytes(b'{"kind":"plan","plan":' + b'{"a":' * 100_000 + b"}" * 100_000 + b"}\n")


def deep_but_read(path: Path) -> None:
    path.write_bytes(b'{"kind":"plan","plan":{"a":' + b"[" * 900 + b"]" * 900 + b"}}\n")


FILES = ("events_path", "status_path", "launch_path", "origin_path")


def test_damaged_runs_hide_no_other(
    finished_run: RunDirectory, new_run: Callable[[], RunDirectory], eqat: Eqat
) -> None:
    bad = []
    for damage in (a_folder, deep, deep_but_read):
        for file in FILES:
            bad.append(new_run())
            damage(getattr(bad[-1], file))
    listing, as_json, overview = eqat("runs"), eqat("runs", "--json"), eqat()
    for done in (listing, as_json, overview):
        assert done.returncode == 0
        assert "Traceback" not in done.stderr
        assert set(done.stderr.splitlines()) == {
            line for line in done.stderr.splitlines() if " is left out: " in line
        }
    for run in bad:  # each is listed, or named in one line
        assert (run.id in listing.stdout) != (f"{run.id} is left out: " in listing.stderr)
    assert finished_run.id in listing.stdout
    assert finished_run.id in {row["id"] for row in json.loads(as_json.stdout)}


def test_a_deep_plan_is_shown_as_far_as_a_plan_goes(new_run: Callable[[], RunDirectory], eqat: Eqat) -> None:
    run = new_run()
    deep_but_read(run.events_path)
    done = eqat("show", run.id, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["plan"]["a"][0][0]


ESCAPED = (
    TypeError("no\x1b[31m number"),
    RecursionError(),
    MemoryError(),
    KeyError("a\nb"),
    OSError(5, "I/O"),
)


@pytest.mark.parametrize("error", ESCAPED, ids=lambda error: type(error).__name__)
def test_whatever_a_damaged_run_raises_leaves_out_only_that_run(
    error: Exception,
    monkeypatch: pytest.MonkeyPatch,
    finished_run: RunDirectory,
    new_run: Callable[[], RunDirectory],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The files of a run are guarded; what comes through all the same need not be known beforehand."""
    bad, real = new_run(), actions.summarize

    def damaged(run: RunDirectory) -> dict[str, object]:
        if run.id == bad.id:
            raise error
        return real(run)

    monkeypatch.setattr(actions, "summarize", damaged)
    rows = actions.summaries([bad, finished_run])
    said = capsys.readouterr().err
    assert [row["id"] for row in rows] == [finished_run.id]
    assert said.startswith(f"{bad.id} is left out: ")
    assert said.count("\n") == 1
    assert "\x1b" not in said


def test_ctrl_c_before_anything_was_started_is_no_traceback(tmp_path: Path) -> None:
    program = (
        "import eqat_tui.preset_rows as listed\n"
        "def interrupted(): raise KeyboardInterrupt\n"
        "listed.preset_rows = interrupted\n"
        "from eqat_tui.cli import main\nmain(['presets'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment(), capture_output=True, timeout=60
    )
    assert done.returncode == 130
    assert b"Traceback" not in done.stderr
