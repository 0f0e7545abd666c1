"""``eqat rm`` and ``eqat gc`` on folders that are no runs, on links, and on what lies beside runs."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_tools import Eqat, environment

from engine.run.directory import RunDirectory
from eqat_tui.actions import run_of
from eqat_tui.cli import _run_command


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project of the user's with a configuration of its own."""
    folder = tmp_path / "proj"
    folder.mkdir()
    (folder / "config.toml").write_text("[tool]\nx = 1\n")
    (folder / "notes.txt").write_text("precious")
    return folder


def everything(folder: Path) -> list[tuple[Path, bytes | None]]:
    paths = sorted(folder.rglob("*"))
    return [(path, path.read_bytes() if path.is_file() else None) for path in paths]


def one_line(result: subprocess.CompletedProcess[str]) -> str:
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


REFS = ["proj", "./proj", "proj/", "proj/.", "ABSOLUTE", ".", "..", "runs", "./runs", "runs/.."]


@pytest.mark.parametrize("ref", REFS)
def test_rm_deletes_no_project_that_has_a_config(
    ref: str,
    tmp_path: Path,
    project: Path,
    finished_run: RunDirectory,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Nor the runs folder, nor the folder one is in."""
    shutil.copy(finished_run.config_toml, tmp_path / "runs")
    shutil.copy(finished_run.config_toml, tmp_path)
    monkeypatch.chdir(project if ref == ".." else tmp_path)
    before = everything(tmp_path)
    ref = str(project) if ref == "ABSOLUTE" else ref
    assert _run_command(["rm", "--yes", "--runs-dir", str(tmp_path / "runs"), ref]) == 2
    assert ref in capsys.readouterr().err
    assert everything(tmp_path) == before


@pytest.mark.parametrize("ref", [".", "..", "RUN/.", "RUN/export/..", "RUN/export/../"])
def test_rm_wants_a_run_by_its_name(
    ref: str, finished_run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One may stand in a run and not know it."""
    monkeypatch.chdir(finished_run.path if ref == "." else finished_run.export_dir)
    before = everything(finished_run.path)
    assert _run_command(["rm", "-y", ref.replace("RUN", str(finished_run.path))]) == 2
    assert "a run is deleted by its name" in capsys.readouterr().err
    assert everything(finished_run.path) == before


def test_rm_refuses_a_run_with_a_file_of_the_users_and_names_it(
    eqat: Eqat, finished_run: RunDirectory
) -> None:
    (finished_run.path / "thesis.tex").write_text("precious")
    refused = eqat("rm", "--yes", finished_run.id)
    assert refused.returncode == 3
    assert f"{finished_run.path}: holds what no run has: thesis.tex" in one_line(refused)
    assert "move it away" in refused.stderr
    (finished_run.path / "thesis.tex").unlink()
    assert eqat("rm", "--yes", finished_run.id).returncode == 0


def test_where_one_of_several_runs_is_refused_none_is_deleted_and_every_reason_is_given(
    eqat: Eqat, tmp_path: Path, new_run: Callable[[], RunDirectory]
) -> None:
    good, spoiled = new_run(), new_run()
    (spoiled.path / "notes.txt").write_text("precious")
    (tmp_path / "runs" / "link").symlink_to(good.path)
    refused = eqat("rm", "--yes", good.id, spoiled.id, "absent", "link", "..")
    assert refused.returncode == 3
    lines = refused.stderr.splitlines()
    said = ["notes.txt", "there is no run 'absent'", f"is a link to {good.path}", "deleted by its name"]
    assert len(lines) == len(said) + 1
    for words, line in zip(said, lines, strict=False):
        assert words in line
    assert lines[-1] == "nothing was deleted"
    assert good.path.is_dir()
    assert spoiled.path.is_dir()


def test_a_linked_run_is_listed_shown_and_resumed_by_its_name_and_not_deleted(
    eqat: Eqat, tmp_path: Path, finished_run: RunDirectory
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    target = finished_run.path.rename(elsewhere / finished_run.id)
    (tmp_path / "runs" / "best").symlink_to(target)
    (row,) = json.loads(eqat("runs", "--json").stdout)
    assert (row["id"], row["path"]) == ("best", str(target))
    refused = eqat("rm", "--yes", "best", finished_run.id, "runs/best")
    assert refused.returncode == 3
    assert refused.stderr.count(f"is a link to {target}") == 3
    for ref in ("best", finished_run.id):
        assert json.loads(eqat("show", ref, "--json").stdout)["path"] == str(target)
    assert "best: is done already" in one_line(eqat("resume", "best"))
    assert "best: is not running" in one_line(eqat("stop", "best"))
    assert eqat("attach", "best", "--plain").returncode == 0
    assert target.is_dir()
    assert eqat("rm", "--yes", str(target)).returncode == 0
    assert json.loads(eqat("runs", "--json").stdout) == []


def test_the_question_names_the_path_and_what_is_in_it(
    tmp_path: Path, eqat: Eqat, finished_run: RunDirectory, new_run: Callable[[], RunDirectory]
) -> None:
    other = new_run()
    (finished_run.export_dir / "gptq_v2").mkdir()
    (finished_run.export_dir / "gptq_v2" / "model.safetensors").write_bytes(bytes(3 << 20))
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "eqat_tui", "rm", finished_run.id, other.id],
        cwd=tmp_path,
        env=environment(),
        stdin=theirs,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.write(ours, b"n\n")
    _, err = process.communicate(timeout=30)
    assert process.returncode == 0
    lines = err.splitlines()
    assert lines[0] == str(finished_run.path)
    assert lines[1].startswith("  done, perplexity 23.67, export gptq_v2, 3.0")
    assert lines[2] == str(other.path)
    assert lines[3].startswith("  created, no block finished, ")
    assert lines[4].startswith("Delete these 2 runs with everything inside (3.0")
    assert all(len(line) <= 80 for line in lines if not line.startswith("/"))
    assert finished_run.path.is_dir()
    told = one_line(eqat("rm", finished_run.id))
    assert f"would delete {finished_run.path} (done, perplexity 23.67, export gptq_v2" in told
    assert "--yes" in told


def test_gc_leaves_alone_what_is_not_ours_and_names_it_once(
    eqat: Eqat, tmp_path: Path, finished_run: RunDirectory
) -> None:
    precious = tmp_path / "runs" / ".removed-precious"
    precious.mkdir()
    (precious / "notes.txt").write_text("precious")
    (finished_run.cache_dir / "notes.bin").write_text("precious")
    (finished_run.cache_dir / "full.bin").write_bytes(bytes(100))
    for arguments in (("--json",), ()):
        done = eqat("gc", *arguments)
        assert done.returncode == 0
        assert done.stderr.count(str(precious)) == 1
        assert done.stderr.count("notes.bin") == 1
        if arguments == ("--json",):
            said = json.loads(done.stdout)
            assert [left["path"] for left in said["left_alone"]] == [str(precious)]
            assert said["runs"][0]["foreign"] == ["notes.bin"]
            assert said["freed"] == 100
    assert (precious / "notes.txt").read_text() == "precious"
    assert [path.name for path in finished_run.cache_dir.iterdir()] == ["notes.bin"]


def test_the_run_of_an_export_is_not_a_project_above_it(
    eqat: Eqat, tmp_path: Path, project: Path, finished_run: RunDirectory
) -> None:
    export = project / "export" / "gptq_v2"
    export.mkdir(parents=True)
    assert run_of(str(export)) == str(export)
    (finished_run.export_dir / "gptq_v2").mkdir()
    assert run_of(str(finished_run.export_dir / "gptq_v2")) == str(finished_run.path)
    refused = eqat("eval", "proj/export/gptq_v2")
    assert refused.returncode == 2
    assert "is not a run directory" in one_line(refused)
