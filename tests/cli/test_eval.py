"""``eqat eval``: what is meant by its target, what is refused before anything is loaded, and one checkpoint
that is really measured."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_tools import Eqat, environment
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.errors import DataError, EqatError, ExitCode, UsageError
from engine.run.directory import RunDirectory
from engine.run.measured import How, Measured, keep, measured
from eqat_tui.evaluating import Tasks, arguments_of, checkpoint_of, how_of, request_of

STORIES = Path(__file__).parents[2].parent / "shared/models/stories260K"


def own_text(folder: Path) -> Path:
    path = folder / "own.txt"
    path.write_text("".join(f"Once upon a time there was a fox, and its number {n}.\n" for n in range(80)))
    return path


def test_what_is_typed_is_a_run_or_a_checkpoint(
    finished_run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for run in ("latest", finished_run.id, str(finished_run.path), str(finished_run.export_dir)):
        assert checkpoint_of(run) is None
    for model in ("org/model", "random://tiny-llama"):
        assert checkpoint_of(model) == model
    export = finished_run.export_dir / "gptq_v2"
    export.mkdir()
    assert checkpoint_of(str(export)) is None  # there is none in it
    (export / "config.json").write_text("{}")
    assert checkpoint_of(str(export)) == str(export)
    (tmp_path / "model.gguf").write_text("")
    assert checkpoint_of("model.gguf") == str(tmp_path / "model.gguf")
    assert checkpoint_of("./not-there") is None  # for the finder of runs to refuse
    (tmp_path / "notes").mkdir()
    with pytest.raises(UsageError, match="is not a run directory, and no checkpoint either"):
        checkpoint_of("notes")


def test_texts_are_told_apart_and_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a,b.txt").write_text("one file")
    (tmp_path / "c.txt").write_text("another")
    how = how_of(["builtin,c.txt", "a,b.txt"], 32, 4, "text")
    assert how.texts == ("builtin", f"{tmp_path}/c.txt", f"{tmp_path}/a,b.txt")
    assert (how.sequence_length, how.windows, how.bos) == (32, 4, "text")
    assert not how_of(None, None, None, None).is_asked


@pytest.mark.parametrize(
    ("asked", "where", "code"),
    [
        ((["nowhere.txt"], None, None, None), "nowhere.txt", ExitCode.DATA),
        (([""], None, None, None), "--data", ExitCode.USAGE),
        ((["self"], None, None, None), "--data", ExitCode.USAGE),
        ((["builtin", "builtin"], None, None, None), "--data", ExitCode.USAGE),
        ((None, 1, None, None), "--sequence-length", ExitCode.USAGE),
        ((None, None, -1, None), "--windows", ExitCode.USAGE),
        ((None, None, None, "sometimes"), "--bos", ExitCode.USAGE),
        ((None, None, None, None, Tasks(["bool q"])), "--tasks", ExitCode.USAGE),
        ((None, None, None, None, Tasks(["piqa"], limit=-1)), "--task-limit", ExitCode.USAGE),
        ((None, None, None, None, Tasks(limit=3)), "--tasks", ExitCode.USAGE),
        ((None, None, None, None, Tasks(["piqa"], folder="nowhere")), "nowhere", ExitCode.DATA),
        ((None, None, None, None, Tasks(["piqa"], folder=".")), "--task-folder", ExitCode.USAGE),
    ],
)
def test_a_mistake_is_told_by_its_flag(asked: Any, where: str, code: ExitCode) -> None:
    with pytest.raises(EqatError) as caught:
        how_of(*asked)
    assert caught.value.exit_code == code
    assert str(caught.value).startswith(f"{where}: ")
    assert "\n" not in str(caught.value)


def test_a_text_without_end_wants_a_number_of_windows() -> None:
    endless = how_of(["c4"], None, None, None)
    with pytest.raises(UsageError, match="c4 is too long to be read whole"):
        request_of("random://tiny-llama", None, endless, "cpu", False)
    assert (
        request_of("random://tiny-llama", None, how_of(["c4"], None, 9, None), "cpu", False).how.windows == 9
    )


def test_what_belongs_to_the_other_kind_of_target_is_refused(eqat: Eqat, finished_run: RunDirectory) -> None:
    refused = eqat("eval", "latest", "--reference", "x")
    assert (refused.returncode, "--reference: is for checkpoints" in refused.stderr) == (2, True)
    refused = eqat("eval", "random://tiny-llama", "--detach")
    assert (refused.returncode, "--detach: is for runs" in refused.stderr) == (2, True)


@pytest.mark.skipif(not STORIES.is_dir(), reason="the shared models are not here")
def test_a_model_is_measured_as_transformers_measures_it(eqat: Eqat, tmp_path: Path) -> None:
    own = own_text(tmp_path)
    result = eqat(
        *("eval", str(STORIES), "--data", "own.txt", "--sequence-length", "64", "--windows", "5"),
        *("--device", "cpu", "--json", "--out", "found.json"),
        OMP_NUM_THREADS="1",
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert json.loads((tmp_path / "found.json").read_text()) == found
    (one,) = found["measured"]
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    ids = tokenizer(own.read_text(), add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    begin = torch.full((5, 1), tokenizer.bos_token_id)
    ids_NT = torch.cat([begin, ids[: 5 * 63].view(5, 63)], 1)  # every window begins as a text does
    model = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32)
    with torch.no_grad():
        log_p = model(ids_NT).logits[:, :-1].double().log_softmax(-1)
    want = math.exp(-log_p.gather(-1, ids_NT[:, 1:, None]).mean().item())
    assert one["perplexity"] == pytest.approx(want, rel=1e-4)
    assert (one["tokens"], one["corpus"]) == (5 * 63, str(own))


def result(**changes: object) -> Measured:
    fields = {"corpus": "c4", "sequence_length": 64, "windows": 2, "tokens": 126, "perplexity": 9.5}
    return Measured(**{"stage": "rtn", **fields, **changes})  # type: ignore[arg-type]


def test_what_is_kept_replaces_its_own_and_leaves_the_others(new_run: Callable[[], RunDirectory]) -> None:
    run = new_run()
    keep(run, [result(), result(sequence_length=128)])
    keep(run, [result(perplexity=None)])
    assert [(one.sequence_length, one.perplexity) for one in measured(run)] == [(128, 9.5), (64, None)]
    (run.eval_dir / "measured.json").write_text("{")
    assert measured(run) == []
    assert How() == How(texts=())


def test_tasks_alone_measure_no_text_and_reach_the_engine_as_typed(
    tmp_path: Path, finished_run: RunDirectory
) -> None:
    (tmp_path / "mine.jsonl").write_text('{"query": "a", "choices": ["b", "c"], "gold": 0}\n')
    how = how_of(None, None, None, None, Tasks([f"piqa,{tmp_path}/mine.jsonl"], limit=7))
    assert (how.tasks, how.reads_texts, how.is_asked) == (("piqa", f"{tmp_path}/mine.jsonl"), False, True)
    assert how_of(["builtin"], None, None, None, Tasks(["piqa"])).reads_texts
    (tmp_path / "empty.jsonl").write_text("")
    for name, words in (("empty", "the file is empty"), ("none", "no such file")):
        with pytest.raises(DataError, match=words):
            how_of(None, None, None, None, Tasks([f"{tmp_path}/{name}.jsonl"]))
    with pytest.raises(DataError, match="neither a file, nor a hub id"):
        how_of(["wikitxt"], None, None, None, Tasks())
    assert arguments_of(finished_run, how) == [
        *("--task-limit", "7", "--ask", "piqa", "--ask", f"{tmp_path}/mine.jsonl"),
    ]


@pytest.mark.skipif(not STORIES.is_dir(), reason="the shared models are not here")
def test_ctrl_c_ends_it_at_once_and_leaves_nothing_at_work(tmp_path: Path) -> None:
    own_text(tmp_path)
    with subprocess.Popen(
        [sys.executable, "-m", "eqat_tui", "eval", str(STORIES), "--data", "own.txt"],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    ) as child:
        time.sleep(1.0)
        child.send_signal(signal.SIGINT)
        out, said = child.communicate(timeout=60)
    assert child.returncode == 130
    assert b"Traceback" not in said
    assert out == b""
