"""``eqat log-to``: what a run has logged, for other programs; and the run never knows of it."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import signal
import sqlite3
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_tools import Eqat, ended, environment, start_eqat
from waiting import PATIENCE, wait_until

from engine.errors import PreflightError
from engine.run import events
from engine.run.directory import RunDirectory
from engine.run.event_log import EventWriter, read_events
from engine.run.finding import list_runs
from engine.run.liveness import run_state
from eqat_tui.tracking.hosted import open_trackio
from eqat_tui.tracking.points import Point, Points

RUN = ("run", "smoke")


def contents(run: RunDirectory) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}


def lines_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def numbers(lines: list[dict[str, Any]], name: str) -> list[tuple[int, float | None]]:
    return [(line["step"], line["values"][name]) for line in lines if name in line.get("values", {})]


def test_lines_have_what_the_run_has_logged(eqat: Eqat, finished_run: RunDirectory) -> None:
    before = contents(finished_run)
    done = eqat("log-to", "jsonl", finished_run.id)
    assert done.returncode == 0, done.stderr
    lines = lines_of(done.stdout)
    assert numbers(lines, "block_ap/loss") == [(1, 0.25)]
    assert numbers(lines, "block_ap/blocks/final_loss") == [(0, 0.1), (1, 0.2)]
    assert numbers(lines, "perplexity/fp") == [(1, 18.21)]
    assert numbers(lines, "perplexity/block_ap") == [(2, 23.67)]
    assert lines[-1]["texts"] == {"outcome": "done"}
    assert contents(finished_run) == before


def test_steps_of_blocks_are_counted_through_and_a_number_that_was_not_finite_is_null() -> None:
    points = Points()

    def metric(block: int | None, step: int, **more: Any) -> Point | None:
        return points.of(
            events.Metric(phase="block_ap", block=block, step=step, steps=8, epoch=0, t=5.0, **more)
        )

    assert metric(0, 8, loss=0.5) == Point(5.0, 8, {"block_ap/loss": 0.5})
    assert metric(2, 1, lr={"scales": 0.1}) == Point(5.0, 17, {"block_ap/lr/scales": 0.1})
    assert metric(None, 3, non_finite=True) == Point(5.0, 3, {"block_ap/loss": None})
    restored = events.BlockFinished(phase="block_ap", block=0, seconds=0.1, final_loss=0.5, restored=True)
    assert points.of(restored) is None  # it was told of when it was trained


def test_foreign_words_stay_in_their_line(eqat: Eqat, new_run: Callable[[], RunDirectory]) -> None:
    run = new_run()
    with EventWriter(run.events_path, 1) as writer:
        writer.emit(events.Warning(code="a/b\n\x1b[0m", message="x\x7f\u202ey\nz", hint=""))
    done = eqat("log-to", "jsonl", run.id)
    assert done.stdout.isascii()
    assert not set(done.stdout) & {"\x1b", "\x7f"}
    assert lines_of(done.stdout)[0]["texts"] == {"warning/a_b\\n\\x1b[0m": "x\\x7f\\u202ey z"}


def test_a_run_is_followed_to_its_end_and_what_came_live_is_what_the_log_says(
    tmp_path: Path, eqat: Eqat, no_engine_outlives_its_test: None
) -> None:
    ended(start_eqat(tmp_path, "finishes", *RUN, "--detach"))
    live = eqat("log-to", "jsonl", "latest", "--follow")
    assert live.returncode == 0, live.stderr
    (run,) = list_runs(tmp_path / "runs")
    assert run_state(run) == "done"
    assert [step for step, _ in numbers(lines_of(live.stdout), "block_ap/loss")][-1] == 20
    assert live.stdout == eqat("log-to", "jsonl", "latest").stdout


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, "full"])
def test_whatever_becomes_of_a_tracker_the_run_goes_on(
    how: Any, tmp_path: Path, no_engine_outlives_its_test: None
) -> None:
    ended(start_eqat(tmp_path, "works", *RUN, "--detach"))
    (run,) = list_runs(tmp_path / "runs")
    wait_until(lambda: len(read_events(run.events_path)[0]) > 5)
    out = tmp_path / "out.jsonl"
    where = open("/dev/full" if how == "full" else out, "wb")  # noqa: SIM115
    command = [sys.executable, "-m", "eqat_tui", "log-to", "jsonl", run.id, "--follow"]
    with where:
        tracker = subprocess.Popen(
            command, cwd=tmp_path, env=environment(), stdout=where, stderr=subprocess.PIPE, text=True
        )
    if how != "full":
        wait_until(lambda: out.stat().st_size > 0)
        tracker.send_signal(how)
    told = tracker.communicate(timeout=PATIENCE)[1]
    assert tracker.returncode == {signal.SIGKILL: -9, signal.SIGINT: 0, "full": 7}[how], told
    assert "Traceback" not in told
    count = len(read_events(run.events_path)[0])
    wait_until(lambda: len(read_events(run.events_path)[0]) > count + 5)
    assert run_state(run) == "running"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("mlflow", "latest"), 2, "there is no tracker 'mlflow' (jsonl, tensorboard, wandb, trackio)"),
        (("jsonl", "nothing-like-it"), 2, "there is no run"),
        (("jsonl", "latest", "--to", "mine"), 2, "mine: exists already"),
        (("jsonl", "latest", "--to", "missing/x"), 2, "cannot be written"),
        (("jsonl", "latest", "--to", "RUN/x"), 2, "lies inside a run"),
        (("jsonl", "latest", "--to", "/dev/full"), 2, "exists already"),
        (("jsonl", "latest", "--to", ""), 2, "is empty"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    arguments: tuple[str, ...], code: int, words: str, eqat: Eqat, finished_run: RunDirectory, tmp_path: Path
) -> None:
    (tmp_path / "mine").write_text("precious")
    before = sorted(tmp_path.rglob("*"))
    done = eqat("log-to", *(text.replace("RUN", str(finished_run.path)) for text in arguments))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (code, "", 1), done.stderr
    assert words in done.stderr
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "mine").read_text() == "precious"


def test_a_tracker_that_is_not_installed_says_what_to_install(
    eqat: Eqat, finished_run: RunDirectory, tmp_path: Path
) -> None:
    # A finder that knows no tensorboard stands for an installation without it.
    hidden = tmp_path / "site"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text(
        "import importlib.util\nfound = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name == 'tensorboard' else found(name, *a)\n"
    )
    path = os.pathsep.join((str(hidden), environment()["PYTHONPATH"]))
    done = eqat("log-to", "tensorboard", finished_run.id, PYTHONPATH=path)
    assert (done.returncode, done.stderr) == (
        3,
        "error: tensorboard: tensorboard is not installed (pip install tensorboard)\n",
    )
    assert not (tmp_path / "tensorboard").exists()


def test_tensorboard_reads_what_was_written(eqat: Eqat, finished_run: RunDirectory, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with EventWriter(finished_run.events_path, 1) as writer:
        writer.emit(events.Metric(phase="e2e_qp", step=7, steps=8, epoch=0, loss=math.nan))
        writer.emit(events.Warning(code="short", message="too little text", hint="give more"))
    kept = os.environ.get("PYTHONPATH", "")
    path = os.pathsep.join(filter(None, (environment()["PYTHONPATH"], kept)))
    done = eqat("log-to", "tensorboard", finished_run.id, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    read = EventAccumulator(str(tmp_path / "tensorboard" / finished_run.id))
    read.Reload()
    (loss,) = read.Scalars("block_ap/loss")
    logged = next(e for e in read_events(finished_run.events_path)[0] if isinstance(e, events.Metric))
    assert (loss.step, loss.value) == (1, 0.25)
    assert loss.wall_time == pytest.approx(logged.t)
    assert [one.step for one in read.Scalars("block_ap/blocks/final_loss")] == [0, 1]
    assert [one.value for one in read.Scalars("perplexity/block_ap")] == [pytest.approx(23.67)]
    (broken,) = read.Scalars("e2e_qp/loss")
    assert broken.step == 7
    assert math.isnan(broken.value)
    assert read.Tensors("warning/short")[0].tensor_proto.string_val == [b"too little text (give more)"]
    assert b"[grid]" in read.Tensors("settings")[0].tensor_proto.string_val[0]

    again = eqat("log-to", "tensorboard", finished_run.id, PYTHONPATH=path)
    assert again.returncode == 2
    assert "not an empty folder" in again.stderr


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_is_written_without_torch(finished_run: RunDirectory, tmp_path: Path) -> None:
    code = (
        "import contextlib, sys\nfrom eqat_tui.cli import main\nwith contextlib.suppress(SystemExit):\n"
        f"    main(['log-to', 'tensorboard', {str(finished_run.path)!r}])\n"
        "print(sorted({'torch', 'tensorflow', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
    assert list((tmp_path / "tensorboard").rglob("events.out.tfevents.*"))


@pytest.mark.skipif(importlib.util.find_spec("trackio") is None, reason="trackio is not installed")
def test_trackio_has_what_was_logged(eqat: Eqat, finished_run: RunDirectory, tmp_path: Path) -> None:
    done = eqat("log-to", "trackio", finished_run.id, "--to", "kept", **_path())
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    with sqlite3.connect(tmp_path / "kept" / "eqat.db") as database:
        rows = database.execute("select step, metrics from metrics where run_name = ?", (finished_run.id,))
        logged = [(step, json.loads(metrics)) for step, metrics in rows]
    assert [(step, one["block_ap/loss"]) for step, one in logged if "block_ap/loss" in one] == [(1, 0.25)]
    assert any(one.get("outcome") == "done" for _, one in logged)


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_has_what_was_logged_and_asks_nobody(
    eqat: Eqat, finished_run: RunDirectory, tmp_path: Path
) -> None:
    done = eqat("log-to", "wandb", finished_run.id, "--to", "kept", **_path())
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    (file,) = (tmp_path / "kept" / "wandb").glob("offline-run-*/*.wandb")
    content = file.read_bytes()
    for said in (b"block_ap/loss", b"block_ap/step", b"perplexity/block_ap", b"23.67", b"grid.bits"):
        assert said in content, said
    inside = eqat("log-to", "wandb", finished_run.id, "--to", str(finished_run.path), **_path())
    assert (inside.returncode, "lies inside a run" in inside.stderr) == (2, True)


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_a_tracker_that_fails_is_one_line(
    where: str, finished_run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever such a library does, anywhere: stood in for by one that fails in one place."""

    def broken(name: str) -> Callable[..., Any]:
        def called(*args: Any, **more: Any) -> Any:
            if name == where:
                raise RuntimeError("no room\nat all")
            return types.SimpleNamespace(log=broken("log"))

        return called

    monkeypatch.setitem(
        sys.modules, "trackio", types.SimpleNamespace(init=broken("init"), finish=broken("finish"))
    )

    def handed_on() -> None:
        sink = open_trackio(finished_run, None)
        sink.write([Point(1.0, 1, {"a/b": 1.0})])
        sink.close()

    with pytest.raises(PreflightError) as caught:
        handed_on()
    assert str(caught.value).startswith("trackio: no room (")


def _path() -> dict[str, str]:
    """Where an installation beside this one keeps the libraries, as in other tests here."""
    kept = os.environ.get("PYTHONPATH", "")
    return {"PYTHONPATH": os.pathsep.join(filter(None, (environment()["PYTHONPATH"], kept)))}
