"""Commands that look, and what they say to a mistake: one line, the documented exit code, no traceback."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_tools import Eqat, environment, story
from waiting import PATIENCE

from engine.config.loading import load, preset_names
from engine.run.directory import RunDirectory
from engine.run.event_log import EventWriter


def error_of(result: subprocess.CompletedProcess[str]) -> str:
    """The one line on stderr."""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


def test_no_arguments_print_an_overview(eqat: Eqat, finished_run: RunDirectory) -> None:
    result = eqat()
    assert result.returncode == 0
    assert "eqat run" in result.stdout
    assert "demo" in result.stdout
    assert finished_run.id in result.stdout


def test_version_is_the_engines(eqat: Eqat) -> None:
    from engine import __version__

    assert eqat("--version").stdout == f"eqat {__version__}\n"


def test_presets_lists_all_of_them_with_their_grids(eqat: Eqat) -> None:
    tree = json.loads(eqat("presets", "--json").stdout)
    rows = [row for row in tree if row["kind"] == "run"]
    assert [row["name"] for row in rows] == preset_names()
    assert {row["name"]: row["runs"] for row in tree if row["kind"] == "sweep"}["e2e-qp-gain"] == 8
    assert {"smoke", "demo", "demo-w2", "llama-2-7b-w2g64"} <= {row["name"] for row in rows}
    assert all(row["bits"] in (2, 3, 4, 8) and row["description"] for row in rows)
    listed = eqat("presets").stdout
    assert "demo-w2" in listed
    assert "lr-qat-vs-others" in listed


def test_plan_and_dry_run_say_the_same_and_start_nothing(eqat: Eqat, tmp_path: Path) -> None:
    planned = json.loads(eqat("plan", "smoke", "--json", "--device", "cpu").stdout)
    dry = json.loads(eqat("run", "smoke", "--dry-run", "--json", "--device", "cpu").stdout)
    for plan in (planned, dry):
        plan.pop("machine")  # what is free changes while we look
    assert planned == dry
    assert planned["export_bytes"] < planned["fp_bytes"]
    assert not (tmp_path / "runs").exists()


def test_plan_as_text_names_memory_disk_time_and_size(eqat: Eqat) -> None:
    text = eqat("plan", "smoke", "--device", "cpu").stdout
    for word in ("Block-AP", "host memory", "disk", "bits per weight", "about"):
        assert word in text


def test_a_plan_that_does_not_fit_exits_3_with_and_without_json(eqat: Eqat) -> None:
    settings = ("--device", "cpu", "--set", "runtime.host_memory_gib=0.001")
    text = eqat("plan", "smoke", *settings)
    assert text.returncode == 3
    assert "does not fit" in text.stdout
    assert error_of(text)
    result = eqat("plan", "smoke", *settings, "--json")
    assert result.returncode == 3
    assert json.loads(result.stdout)["problems"]
    assert eqat("run", "smoke", *settings).returncode == 3


def test_runs_lists_newest_first(eqat: Eqat, new_run: Callable[[], RunDirectory]) -> None:
    made = [new_run().id for _ in range(3)]
    rows = json.loads(eqat("runs", "--json").stdout)
    assert [row["id"] for row in rows] == made[::-1]
    assert [row["id"] for row in json.loads(eqat("runs", "--json", "--limit", "1").stdout)] == made[-1:]
    assert eqat("runs").stdout.splitlines()[1].startswith(made[-1])


def test_runs_dir_flag_wins_over_the_environment(
    eqat: Eqat, finished_run: RunDirectory, tmp_path: Path
) -> None:
    place = str(finished_run.path.parent)
    assert json.loads(eqat("runs", "--json", EQAT_RUNS_DIR=str(tmp_path / "none")).stdout) == []
    listed = eqat("runs", "--json", "--runs-dir", place, EQAT_RUNS_DIR=str(tmp_path / "none"))
    assert [row["id"] for row in json.loads(listed.stdout)] == [finished_run.id]
    assert json.loads(eqat("runs", "--json", EQAT_RUNS_DIR=place).stdout)[0]["id"] == finished_run.id


def test_no_runs_is_an_empty_list_and_a_hint(eqat: Eqat) -> None:
    assert json.loads(eqat("runs", "--json").stdout) == []
    result = eqat("runs")
    assert result.stdout == ""
    assert "eqat run demo" in result.stderr


def test_show_json_has_the_documented_fields(eqat: Eqat, finished_run: RunDirectory) -> None:
    shown = json.loads(eqat("show", "latest", "--json").stdout)
    assert shown["id"] == finished_run.id
    assert shown["state"] == "done"
    assert shown["config"]["grid"]["bits"] == 4
    assert {"name", "seconds", "peak_gpu_bytes", "peak_host_bytes"} <= set(shown["phases"][0])
    assert [block["final_loss"] for block in shown["blocks"]] == [0.1, 0.2]
    assert {"index", "initial_loss", "final_loss", "val_loss", "seconds"} <= set(shown["blocks"][0])
    assert shown["perplexity"]["fp"] == 18.21
    assert {"fp", "rtn", "block_ap", "e2e_qp"} <= set(shown["perplexity"])
    assert shown["size_bytes"] == {"fp": 200 * 2**20, "quantized": 50 * 2**20}
    assert shown["bits_per_weight"] == 4.5
    assert shown["exports"][0]["verified"] is True
    assert shown["exports"][0]["max_logit_diff"] == 1.5e-5


def test_show_prints_the_report(eqat: Eqat, finished_run: RunDirectory) -> None:
    text = eqat("show", finished_run.id).stdout
    assert "tiny-llama at 4 bits, groups of 32 · done" in text
    assert "18.21" in text
    assert "1.3×" in text  # 23.67 / 18.21
    assert "200 MiB → 50.0 MiB (4×" in text
    assert "process 1.50 GiB" in text
    assert "gptq_v2 runs/" in text
    assert "verified, largest logit difference 1.5e-05" in text


MISTAKES = [
    (("run", "no-such-preset"), 2, "no-such-preset"),
    (("run", "missing.toml"), 2, "missing.toml"),
    (("run", "smoke", "--bits", "5"), 2, "grid.bits"),
    (("run", "smoke", "--bits", "three"), 2, "--bits"),
    (("run", "smoke", "--group-size", "48"), 2, "grid.group_size"),
    (("run", "smoke", "--set", "block_ap.epochs"), 2, "key=value"),
    (("run", "smoke", "--set", "block_ap.epoch=3"), 2, "block_ap.epochs"),
    (("run", "smoke", "--set", "block_ap.epochs=many"), 2, "block_ap.epochs"),
    (("run", "smoke", "--model", "./not-here"), 3, "not-here"),
    (("plan", "smoke", "--device", "tpu"), 2, "runtime.device"),
    (("show", "nothing"), 2, "nothing"),
    (("show", "latest"), 2, "no runs"),
    (("attach", "nothing"), 2, "nothing"),
    (("stop", "nothing"), 2, "nothing"),
    (("resume", "nothing"), 2, "nothing"),
    (("export", "latest", "--format", "zip"), 2, "zip"),
    (("frobnicate",), 2, "frobnicate' (eqat --help)"),
    (("sample", "latest"), 2, "eqat generate is meant"),
    (("run",), 2, "PRESET|FILE' (eqat run --help)"),
    (("runs", "--wrong"), 2, "(eqat runs --help)"),
    (("export", "latest", "--to", ""), 2, "--to: is empty"),
    (("export", "latest", "--format", "gptq_v2,zip"), 2, "zip"),
]


@pytest.mark.parametrize(("arguments", "code", "word"), MISTAKES, ids=lambda value: str(value)[:50])
def test_a_mistake_is_one_line_and_the_documented_exit_code(
    eqat: Eqat, arguments: tuple[str, ...], code: int, word: str
) -> None:
    result = eqat(*arguments)
    assert result.returncode == code
    assert word in error_of(result)
    assert result.stdout == ""


def test_with_json_a_mistake_is_an_object_too(eqat: Eqat) -> None:
    result = eqat("run", "smoke", "--bits", "5", "--json")
    error = json.loads(result.stdout)["error"]
    assert set(error) == {"message", "where", "hint", "exit_code"}
    assert error["where"] == "grid.bits"
    assert error["exit_code"] == result.returncode == 2
    assert error_of(result)


def test_an_unwritable_runs_directory_is_one_line(eqat: Eqat, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    result = eqat("run", "smoke", "--device", "cpu", "--runs-dir", "file/runs")
    assert result.returncode == 3
    assert "file: is a file, not a folder" in error_of(result)


def test_a_run_that_kept_nothing_says_so(eqat: Eqat, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("too short")
    result = eqat("run", "smoke", "--device", "cpu", "--set", f"data.source={tmp_path}/short.txt")
    assert result.returncode == 4
    told = result.stderr.splitlines()[-1]
    assert told.startswith("nothing was checkpointed yet: eqat resume ")
    assert told.endswith(" begins anew")


def test_stop_and_resume_refuse_a_run_in_the_wrong_state(eqat: Eqat, finished_run: RunDirectory) -> None:
    stopped = eqat("stop", "latest")
    assert (stopped.returncode, "done" in error_of(stopped)) == (2, True)
    resumed = eqat("resume", "latest")
    assert (resumed.returncode, "done" in error_of(resumed)) == (2, True)


@pytest.mark.parametrize(
    "command", [("eval",), ("export",), ("generate", "--prompt", "a")], ids=lambda x: x[0]
)
def test_what_only_a_finished_run_has_is_refused_before_an_engine_starts(
    eqat: Eqat, new_run: Callable[[], RunDirectory], command: tuple[str, ...]
) -> None:
    run = new_run()
    with EventWriter(run.events_path, 1) as writer:
        for event in story(run)[:-5]:  # it wants E2E-QP, and was cut off behind Block-AP
            writer.emit(event)
    result = eqat(command[0], run.id, *command[1:])
    assert result.returncode == 2
    assert error_of(result) == (
        f"error: {run.id}: the run has not finished training (it is crashed) (eqat resume {run.id})"
    )
    assert not run.lock_path.exists()


def test_attach_refuses_a_run_that_was_never_started(eqat: Eqat, new_run: Callable[[], RunDirectory]) -> None:
    new_run()
    result = eqat("attach", "latest")
    assert result.returncode == 2
    assert "never started" in error_of(result)


def test_attach_to_a_finished_run_reports_it_and_exits_as_it_did(
    eqat: Eqat, finished_run: RunDirectory
) -> None:
    result = eqat("attach", "latest")
    assert result.returncode == 0
    assert "18.21" in result.stdout


def test_a_reader_that_leaves_early_is_no_error(tmp_path: Path, new_run: Callable[[], RunDirectory]) -> None:
    new_run()
    read, write = os.pipe()
    os.close(read)  # as `| head` does once it has enough
    result = subprocess.run(
        [sys.executable, "-m", "eqat_tui", "runs"],
        cwd=tmp_path,
        env=environment(),
        stdout=write,
        stderr=subprocess.PIPE,
        timeout=PATIENCE,
    )
    os.close(write)
    assert result.stderr == b""


def test_doctor_checks_without_the_smoke_run(eqat: Eqat) -> None:
    result = eqat("doctor", "--quick", "--json")
    answer = json.loads(result.stdout)
    assert answer["ok"] is (result.returncode == 0)
    checks = {check["name"]: check["status"] for check in answer["checks"]}
    assert set(checks) == {"python", "packages", "torch", "gpu", "host", "disk", "presets"}
    assert checks["python"] == checks["packages"] == checks["presets"] == "ok"


def test_a_plan_of_several_formats_says_what_each_takes(eqat: Eqat) -> None:
    formats = ("--set", 'export.formats=["gptq_v2","hf"]')
    text = eqat("plan", "smoke", "--device", "cpu", *formats).stdout
    sizes = next(line for line in text.splitlines() if line.startswith("  size "))
    assert "(gptq_v2), " in sizes
    assert sizes.endswith("(hf)")
    planned = json.loads(eqat("plan", "smoke", "--device", "cpu", "--json", *formats).stdout)
    assert set(planned["export_sizes"]) == {"gptq_v2", "hf"}
    assert sum(planned["export_sizes"].values()) == planned["export_bytes"]


def test_what_a_hint_says_to_type_can_be_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from eqat_tui.actions import typed

    monkeypatch.chdir(tmp_path)
    run = RunDirectory.create(tmp_path / "my runs", load("smoke"))
    assert shlex.split(f"eqat resume {typed(run)}") == ["eqat", "resume", f"my runs/{run.id}"]
    plain = RunDirectory.create(tmp_path / "runs", load("smoke"))
    assert typed(plain) == plain.id


@pytest.mark.parametrize("command", ["run", "resume", "resume --from-block"])
def test_a_command_that_every_task_of_a_step_types_makes_no_run(
    command: str, eqat: Eqat, new_run: Callable[[], RunDirectory], tmp_path: Path
) -> None:
    step = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}
    two, existing = ("--gpus", "2"), {new_run().id}
    typed = {
        "run": ("run", "smoke", "--device", "cpu", *two),
        "resume": ("resume", "latest", *two),
        "resume --from-block": ("resume", "latest", "--from-block", "0", *two),
    }
    result = eqat(*typed[command], **step)
    assert result.returncode == 2, result.stderr
    assert "each of 2 processes would make a run of its own" in error_of(result)
    assert "srun --ntasks=2 python -m engine RUN" in error_of(result)
    assert {place.name for place in (tmp_path / "runs").iterdir()} == existing
