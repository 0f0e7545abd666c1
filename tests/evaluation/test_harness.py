"""Tasks that lm-eval asks: its numbers are those of its own ``hf`` model; what it cannot ask is a line."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy
import pytest
import tiny
import torch
from harness_tasks import write_tasks

from engine.config.model import ModelConfig
from engine.config.tasks import LmTask
from engine.data.encoding import Encoder
from engine.errors import DataError, PreflightError, StopRequested, UsageError
from engine.evaluation.answering import Means, answering
from engine.models.causal_lm import CausalLM
from engine.models.source import ModelSource
from engine.run.measures import TaskScore

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is an extra: pip install 'eqat[tasks]'")

from engine.evaluation.harness import HarnessTasks, ask, find_tasks  # noqa: E402

CPU = torch.device("cpu")
ALL = (LmTask("letters", 2), LmTask("whole"), LmTask("written"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build(tmp_path_factory.mktemp("tiny") / "model", "llama2", num_hidden_layers=2)


@pytest.fixture(scope="module")
def lm(folder: Path) -> CausalLM:
    return CausalLM(ModelSource.open(ModelConfig(source=str(folder))), CPU, torch.float32)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def tasks(place: Path) -> HarnessTasks:
    return find_tasks(ALL, folder=str(place))


@pytest.fixture(autouse=True)
def _quick_bootstrap(monkeypatch: pytest.MonkeyPatch) -> None:
    from engine.evaluation import harness

    monkeypatch.setattr(harness, "_ITERATIONS", 2)


def ours(lm: CausalLM, tasks: HarnessTasks, **means: Any) -> dict[str, TaskScore]:
    encoder = Encoder(lm.source.tokenizer(), rows=lm.vocab_size)
    model = answering(lm, encoder, lm.load_block, Means(**{"batch_size": 4, **means}))
    return {score.name: score for score in ask(tasks, model)}


def theirs(folder: Path, place: Path, task: LmTask) -> dict[str, float]:
    """The numbers of lm-eval's ``hf`` model, by the names that ours have."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    found = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder), "dtype": "float32"},
        tasks=[task.name],
        num_fewshot=task.shots,
        task_manager=TaskManager(include_path=str(place), include_defaults=False),
        batch_size=4,
        device="cpu",
        bootstrap_iters=0,
        log_samples=False,
    )
    shots = f" {task.shots}-shot" if task.shots else ""
    made = {}
    for key, value in found["results"][task.name].items():
        metric, comma, chosen = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            made[f"{task.name}{shots}, {metric}" + ("" if chosen == "none" else f" ({chosen})")] = value
    return made


def test_numbers_are_those_of_lm_evals_own_model(
    lm: CausalLM, folder: Path, place: Path, tasks: HarnessTasks
) -> None:
    found = ours(lm, tasks)
    expected = {name: value for task in ALL for name, value in theirs(folder, place, task).items()}
    assert len(expected) >= 5
    assert {name: score.value for name, score in found.items()} == pytest.approx(expected, rel=1e-5)
    letters = found["letters 2-shot, acc"]
    assert (letters.questions, letters.shots, letters.by) == (12, 2, f"lm-eval {lm_eval.__version__}")
    assert found["whole, word_perplexity"].better == "smaller"


def test_every_answer_is_the_one_of_lm_evals_own_model(
    lm: CausalLM, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Likelihoods themselves: an accuracy of a few questions would not show a small error."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from engine.evaluation import rows as module

    pairs = [("cold", " warm"), ("cold", " a"), ("cold", " b"), ("", "stone"), ("blue " * 60, "bird" * 25)]
    asked = [
        Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=index)
        for index, pair in enumerate(pairs)
    ]
    hf = HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=2)
    expected = hf.loglikelihood(asked, disable_tqdm=True)
    encoder = Encoder(lm.source.tokenizer(), rows=lm.vocab_size)
    for room in (1 << 30, 1):  # all at once, and one after the other
        monkeypatch.setattr(module, "CPU_MEMORY", room)
        model = answering(lm, encoder, lm.load_block, Means(folder=tmp_path))
        found = model.loglikelihood(asked)
        assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], rel=1e-5)
        assert [same for _, same in found] == [same for _, same in expected]
    assert model.max_length == hf.max_length == 256
    assert list(tmp_path.iterdir()) == []
    # Texts of several lengths are written together, some with stops that others lack.
    wanted = {"until": ["q"], "max_gen_toks": 16, "do_sample": False}
    texts = [
        Instance(request_type="generate_until", doc={}, arguments=(text, options), idx=index)
        for index, text in enumerate(("cold", "blue " * 60, "a", "stone water"))
        for options in (wanted, {**wanted, "until": ["\n"], "max_gen_toks": 5})
    ]
    expected_texts = hf.generate_until(texts, disable_tqdm=True)
    model.means = Means(batch_size=2)
    assert model.generate_until(texts) == expected_texts
    assert len(set(expected_texts)) > 3


def test_random_numbers_of_a_training_are_left_alone(lm: CausalLM, tasks: HarnessTasks) -> None:
    def draw() -> list[float]:
        return [random.random(), float(numpy.random.rand()), torch.rand(()).item()]

    random.seed(5), numpy.random.seed(5), torch.manual_seed(5)
    expected = draw()
    random.seed(5), numpy.random.seed(5), torch.manual_seed(5)
    ours(lm, tasks)
    assert draw() == expected


def test_progress_is_told_and_a_stop_is_heard_while_a_model_writes(lm: CausalLM, tasks: HarnessTasks) -> None:
    told: list[float] = []
    ours(lm, tasks, on_progress=lambda done, of: told.append(done / of))
    assert max(told) == 1
    batches = 0

    def stop() -> None:
        nonlocal batches
        batches += 1
        if batches == 30:
            raise StopRequested

    with pytest.raises(StopRequested):
        ours(lm, tasks, on_batch=stop)
    assert not hasattr(lm.model, "hf_device_map")
    assert ours(lm, tasks)["written, bleu (whole)"].value is not None  # the model is as it was


def test_a_model_without_room_is_not_asked_to_write(lm: CausalLM, tasks: HarnessTasks) -> None:
    assert tasks.lets_write
    with pytest.raises(PreflightError, match="need all of its blocks in memory"):
        ours(lm, tasks, free_for_blocks=lambda: (10, "this machine"))


def test_what_cannot_be_asked_is_said_in_a_line(place: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="knows no task 'lettres'") as caught:
        _find_without_defaults("lettres", place)
    assert "letters" in caught.value.hint
    bad = write_tasks(tmp_path / "bad")
    (bad / "letters.jsonl").unlink()
    with pytest.raises(DataError, match="questions cannot be read"):
        _find_without_defaults("letters", bad)


def _find_without_defaults(name: str, place: Path) -> HarnessTasks:
    """The list of lm-eval's own tasks takes it seconds to read."""
    from lm_eval.tasks import TaskManager

    from engine.evaluation import harness

    with pytest.MonkeyPatch.context() as patch:
        own = TaskManager(include_path=str(place), include_defaults=False)
        patch.setattr(harness, "_manager", lambda asked, folder: own)
        return find_tasks([LmTask(name)], folder=str(place))


def test_a_group_has_the_numbers_of_its_members_together(lm: CausalLM, place: Path) -> None:
    tasks = _find_without_defaults("both", place)
    found = ours(lm, tasks)
    assert list(found) == ["both, acc"]
    assert found["both, acc"].questions == 24


def test_a_limit_holds_for_each_task(lm: CausalLM, place: Path) -> None:
    tasks = find_tasks([LmTask("letters")], folder=str(place), limit=3)
    assert tasks.questions == 3
    assert ours(lm, tasks)["letters, acc"].questions == 3
