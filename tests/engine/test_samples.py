"""The task ``generate``: both models continue a prompt, and the run stays what it was."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from engine_runs import exported, failure, of, output, run_here, wait_until
from greedy import plain_greedy
from torch import nn

from engine.config.derived import resolve
from engine.data.encoding import Encoder
from engine.evaluation.continuation import prompt_ids
from engine.phases.samples import write_samples
from engine.pipeline import Pipeline
from engine.plan.plan import make_plan
from engine.reporter import Reporter
from engine.run import control, events
from engine.run.directory import RunDirectory
from engine.run.liveness import run_state
from engine.run.state import load_state
from engine.run.task import Asked

Make = Callable[..., RunDirectory]
PROMPT = "Once upon a time"


@pytest.fixture
def finished(finished_copy: Make) -> RunDirectory:
    """A finished run that a test may write into."""
    return finished_copy()


def generate(run: RunDirectory, *arguments: str, prompt: str = PROMPT) -> int:
    return run_here(run, "--task", "generate", f"--prompt={prompt}", *arguments)


@contextmanager
def prepared(run: RunDirectory) -> Iterator[Pipeline]:
    """The task inside this process, up to where it begins to write."""
    device = torch.device("cpu")
    config = resolve(run.config())
    report = Reporter(run, 2, device)
    try:
        pipeline = Pipeline(
            run, config, make_plan(config, device="cpu"), report, device, Asked(task="generate")
        )
        pipeline.prepare()
        yield pipeline
    finally:
        report.close()


def files(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# -- what it says --------------------------------------------------------------------------------------


def test_both_models_write_and_the_run_stays_as_it_was(finished: RunDirectory) -> None:
    export, checkpoints = exported(finished), files(finished.checkpoints_dir)
    assert generate(finished, "--new-tokens", "12") == 0
    full, trained = of(finished, events.Sample)
    assert (full.stage, trained.stage) == ("fp", "e2e_qp")
    for sample in (full, trained):
        assert sample.prompt == PROMPT
        assert sample.text
        assert not sample.text.startswith(PROMPT)
        assert 0 < sample.tokens <= 12
        assert sample.seconds > 0
        assert not sample.problem
    assert run_state(finished) == "done"
    assert exported(finished) == export
    assert files(finished.checkpoints_dir) == checkpoints
    assert [e.phase for e in of(finished, events.PhaseFinished, attempt=2)] == ["prepare", "generate"]
    assert load_state(finished).samples == {"fp": full, "e2e_qp": trained}


def test_the_texts_are_those_of_plain_greedy_loops_over_the_run_s_own_blocks(finished: RunDirectory) -> None:
    assert generate(finished, "--new-tokens", "12") == 0
    with prepared(finished) as pipeline:
        job = pipeline.job
        tokenizer = job.source.tokenizer()
        ids = prompt_ids(Encoder(tokenizer), PROMPT)[0].tolist()
        for sample, block_for in zip(
            of(finished, events.Sample), (job.lm.load_block, job.packed_block), strict=True
        ):
            want = plain_greedy(job.lm, block_for, ids, 12)
            assert (sample.text, sample.tokens) == (
                tokenizer.decode(want, skip_special_tokens=True),
                len(want),
            )


@pytest.mark.parametrize(
    ("left_out", "stage"),
    [({"e2e_qp.enabled": False}, "block_ap"), ({"block_ap.enabled": False, "e2e_qp.enabled": False}, "rtn")],
)
def test_the_quantized_model_is_the_newest_there_is(
    make: Make, left_out: dict[str, object], stage: str
) -> None:
    run = make(**left_out, **{"evaluation.enabled": False, "export.formats": []})
    assert run_here(run) == 0
    assert generate(run, "--new-tokens", "2") == 0
    assert [e.stage for e in of(run, events.Sample)] == ["fp", stage]


def test_a_process_of_its_own_prints_nothing_and_carries_any_text(finished: RunDirectory) -> None:
    prompt = "--über\n日本"
    command = [sys.executable, "-m", "engine", str(finished.path), "--task", "generate", "--new-tokens", "3"]
    done = subprocess.run([*command, f"--prompt={prompt}"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [e.prompt for e in of(finished, events.Sample)] == [prompt, prompt]


# -- what it refuses -----------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["", " \n", "\udcff"])
def test_a_prompt_without_text_is_a_usage_error(finished: RunDirectory, prompt: str) -> None:
    assert generate(finished, prompt=prompt) == 2
    error = failure(finished, 2)
    assert error.where == "--prompt"
    assert error.hint
    assert not of(finished, events.PhaseStarted, attempt=2), "it was refused before anything was loaded"


def test_a_prompt_longer_than_the_model_reads_is_refused_and_one_that_just_fits_is_cut_short(
    finished: RunDirectory,
) -> None:
    assert generate(finished, prompt="a" * 2048) == 2
    assert "has 2048 tokens, and the model reads at most 2048" in failure(finished, 2).message
    with prepared(finished) as pipeline:
        write_samples(pipeline.job, "a" * 2045, 50)
    assert all(0 < e.tokens <= 3 for e in of(finished, events.Sample))
    assert len(of(finished, events.Sample)) == 2


def test_fewer_than_one_token_is_a_usage_error(finished: RunDirectory) -> None:
    assert generate(finished, "--new-tokens", "0") == 2
    assert failure(finished, 2).where == "--new-tokens"


def test_a_run_that_has_not_finished_training_has_no_second_model_to_ask(make: Make) -> None:
    run = make()
    assert generate(run) == 2
    assert "has not finished training" in failure(run, 2).message
    assert not of(run, events.Sample)


# -- what can happen -----------------------------------------------------------------------------------


def test_a_model_without_room_is_a_problem_in_words_not_a_crash(finished: RunDirectory) -> None:
    with prepared(finished) as pipeline:
        write_samples(pipeline.job, PROMPT, 4, budget_bytes=pipeline.job.lm.blocks_bytes() - 1)
        write_samples(pipeline.job, PROMPT, 4, budget_bytes=pipeline.job.lm.blocks_bytes())
    refused, written = of(finished, events.Sample)[:2], of(finished, events.Sample)[2:]
    assert [e.stage for e in refused] == [e.stage for e in written] == ["fp", "e2e_qp"]
    for sample in refused:
        assert (sample.text, sample.tokens) == ("", 0)
        assert "the budget has room for" in sample.problem
        assert "\n" not in sample.problem
    assert all(e.text and not e.problem for e in written)


def test_memory_that_runs_out_costs_one_model_its_text_and_not_the_other(finished: RunDirectory) -> None:
    with prepared(finished) as pipeline:
        job = pipeline.job
        whole = job.lm.load_block

        def load_block(index: int) -> nn.Module:
            if not of(finished, events.Sample):  # while the first one is asked
                raise torch.OutOfMemoryError("CUDA out of memory")
            return whole(index)

        job.lm.load_block = load_block  # type: ignore[method-assign, assignment]
        write_samples(job, PROMPT, 4)
    full, trained = of(finished, events.Sample)
    assert "memory ran out" in full.problem
    assert not full.text
    assert trained.text
    assert not trained.problem


@pytest.mark.alone
def test_a_stop_while_a_text_is_written_is_heard_and_costs_the_run_nothing(finished: RunDirectory) -> None:
    export, checkpoints = exported(finished), files(finished.checkpoints_dir)
    asked: list[float] = []

    def stop() -> None:
        wait_until(lambda: any(e.phase == "generate" for e in of(finished, events.PhaseStarted, attempt=2)))
        control.request(finished, "stop")
        asked.append(time.monotonic())

    helper = threading.Thread(target=stop)
    helper.start()
    assert generate(finished, "--new-tokens", "2000") == 75
    assert time.monotonic() - asked[0] < 3, "it wrote to the end first"
    helper.join()
    assert len(of(finished, events.Sample)) < 2
    assert exported(finished) == export
    assert files(finished.checkpoints_dir) == checkpoints
    assert generate(finished, "--new-tokens", "2") == 0
    assert run_state(finished) == "done"
    assert "Traceback" not in output(finished)
