"""Zero-shot tasks: how questions are asked, and that answers are those of the whole model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import tiny
import torch
from torch.nn import functional

from engine.config.corpora import HubSource
from engine.config.derived import resolve
from engine.config.field_docs import field_help
from engine.config.loading import load
from engine.config.model import ModelConfig
from engine.config.overrides import apply_overrides
from engine.config.tasks import TASKS, LmTask, Task, lm_task, require_lm_eval
from engine.config.validation import validate
from engine.data import tasks as asking
from engine.data.encoding import Encoder
from engine.data.tasks import Question, questions
from engine.errors import DataError, PreflightError, StopRequested, UsageError
from engine.evaluation.tasks import Row, TokenizedTask, _scores, accuracies, tokenize
from engine.models.causal_lm import CausalLM
from engine.models.source import ModelSource

CPU = torch.device("cpu")
SHARED = Path(__file__).parents[2].parent / "shared" / "data"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build(tmp_path_factory.mktemp("tiny") / "model", "llama2", num_hidden_layers=2)


@pytest.fixture(scope="module")
def lm(folder: Path) -> CausalLM:
    return CausalLM(ModelSource.open(ModelConfig(source=str(folder))), CPU, torch.float32)


def random_rows(lm: CausalLM, count: int, seed: int = 0) -> list[Row]:
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    rows = []
    for _ in range(count):
        length = draw(2, 90)
        ids = torch.randint(0, lm.vocab_size, (length,), generator=generator).tolist()
        rows.append(Row(tuple(ids), draw(1, length)))
    return rows


def by_hand(lm: CausalLM, row: Row) -> float:
    """One row alone through the whole model, nothing padded."""
    with torch.no_grad(), lm.whole(lm.load_block) as whole:
        logits = whole(input_ids=torch.tensor([row.ids])).logits[0].double()
    log_p = functional.log_softmax(logits, -1)
    places = range(len(row.ids) - row.scored, len(row.ids))
    return sum(log_p[place - 1, row.ids[place]].item() for place in places)


@pytest.mark.parametrize("stored", [False, True])
def test_scores_are_those_of_each_row_alone(lm: CausalLM, stored: bool, tmp_path: Path) -> None:
    from engine.evaluation import rows as module

    rows = random_rows(lm, 23)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "TOKENS_AT_A_TIME", 100)  # several batches, one of them not full
        if stored:
            patch.setattr(module, "CPU_MEMORY", 0)
        scores = _scores(lm, lm.load_block, rows, tmp_path, lambda done, blocks: None, lambda: None)
    assert scores == pytest.approx([by_hand(lm, row) for row in rows], rel=1e-4)
    assert list(tmp_path.iterdir()) == []


def test_the_likeliest_choice_is_the_answer(lm: CausalLM) -> None:
    rows = random_rows(lm, 12)
    values = [by_hand(lm, row) for row in rows]
    spans = ((0, 2), (2, 5), (5, 8), (8, 12))
    best = [max(range(first, end), key=values.__getitem__) - first for first, end in spans]
    gold = (best[0], best[1], (best[2] + 1) % 3, best[3])
    found = accuracies(lm, lm.load_block, {"mine": TokenizedTask(tuple(rows), spans, gold)})
    assert found["mine"].accuracy == 0.75
    assert found["mine"].questions == 4
    assert found["mine"].stderr == pytest.approx(math.sqrt(0.75 * 0.25 / 3))


def test_a_model_of_undefined_numbers_is_not_right_by_chance(lm: CausalLM) -> None:
    def broken(index: int) -> torch.nn.Module:
        block = lm.load_block(index)
        with torch.no_grad():
            for parameter in block.parameters():
                parameter.fill_(float("nan"))
        return block

    scores = _scores(lm, broken, random_rows(lm, 3), None, lambda done, blocks: None, lambda: None)
    assert scores == [-math.inf] * 3


def test_a_stop_ends_the_questions(lm: CausalLM) -> None:
    task = TokenizedTask(tuple(random_rows(lm, 4)), ((0, 2), (2, 4)), (0, 0))

    def stop() -> None:
        raise StopRequested

    with pytest.raises(StopRequested):
        accuracies(lm, lm.load_block, {"mine": task}, on_batch=stop)


def test_a_continuation_begins_where_its_context_ends() -> None:
    tokenizer = tiny.byte_tokenizer(300)
    question = Question((("Question: where? ", "here"), ("Question: where?", " there")), 0)
    task = tokenize([question], Encoder(tokenizer))
    continuations = [tokenizer.decode(row.ids[-row.scored :]) for row in task.rows]
    assert continuations == [" here", " there"]
    assert task.spans == ((0, 2),)
    assert task.gold == (0,)


def test_long_contexts_lose_their_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    from engine.evaluation import tasks as module

    monkeypatch.setattr(module, "LONGEST", 20)
    task = tokenize([Question((("x" * 100, " end"), ("", "y")), 0)], Encoder(tiny.byte_tokenizer(300)))
    assert [len(row.ids) for row in task.rows] == [20, 2]
    assert [row.scored for row in task.rows] == [4, 1]


# -- asking --------------------------------------------------------------------------------------------

HUB_ROWS = {
    "piqa": (
        {"goal": "dry a cup", "sol1": "a towel", "sol2": "a lake", "label": 0},
        Question(
            (("Question: dry a cup\nAnswer:", " a towel"), ("Question: dry a cup\nAnswer:", " a lake")), 0
        ),
    ),
    "arc_easy": (
        {"question": "Hot?", "choices": {"text": ["sun", "ice"], "label": ["A", "B"]}, "answerKey": "B"},
        Question((("Question: Hot?\nAnswer:", " sun"), ("Question: Hot?\nAnswer:", " ice")), 1),
    ),
    "winogrande": (
        {"sentence": "Ann beat Eve so _ won.", "option1": "Ann", "option2": "Eve", "answer": "1"},
        Question((("Ann beat Eve so Ann", " won."), ("Ann beat Eve so Eve", " won.")), 0),
    ),
    "hellaswag": (
        {
            "activity_label": "Cooking",
            "ctx_a": "A man [header] stirs.",
            "ctx_b": "he",
            "endings": ["eats [step] it.", "[substeps] flies."],
            "label": "0",
        },
        Question(
            (
                ("Cooking: A man stirs. He", " eats it."),
                ("Cooking: A man stirs. He", "  flies."),
            ),
            0,
        ),
    ),
}
HUB_ROWS["arc_challenge"] = HUB_ROWS["arc_easy"]


@pytest.mark.parametrize("name", HUB_ROWS)
def test_tasks_of_the_hub_are_asked_as_published(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    row, expected = HUB_ROWS[name]
    monkeypatch.setattr(asking, "hub_rows", lambda source: iter([row] * 3))
    assert questions(name, limit=2) == [expected, expected]


def test_every_task_that_a_configuration_may_name_can_be_asked() -> None:
    assert set(TASKS.names()) == set(HUB_ROWS)


def test_the_fields_text_names_every_task_that_it_takes() -> None:
    text = field_help()["evaluation.tasks"]
    assert [name for name in TASKS.names() if name not in text] == []


def asked_backwards(row: asking.Row) -> Question:
    return Question(((row["text"], row["text"][::-1]),), 0)


def test_a_task_that_another_package_registers_is_validated_and_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    TASKS.register(Task(name="mirror", source=HubSource("a/b"), ask=f"{__name__}:asked_backwards"))
    try:
        monkeypatch.setattr(asking, "hub_rows", lambda source: iter([{"text": source.repo}]))
        validate(resolve(apply_overrides(load("smoke"), {"evaluation.tasks": "mirror"})))
        assert questions("mirror") == [Question((("a/b", "b/a"),), 0)]
    finally:
        TASKS.unregister("mirror")


def test_a_file_brings_its_own_questions(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    rows = [
        {"query": "Question: 1 + 1?\nAnswer:\n", "choices": ["2", " 3"], "gold": 0},
        {"context_options": ["Ann won", "Eve won"], "continuation": "again.", "gold": 1},
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    one, other = questions(str(path))
    assert one == Question((("Question: 1 + 1?\nAnswer:", " 2"), ("Question: 1 + 1?\nAnswer:", " 3")), 0)
    assert other == Question((("Ann won", " again."), ("Eve won", " again.")), 1)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no questions"),
        ("{", "bad.jsonl:1: not a JSON line"),
        ("[]", "no questions"),
        ('["a"]', "bad.jsonl:1: the line is not a JSON object"),
        ('{"a": ' + "[" * 100_000, "nested too deeply"),
        ('{"query": "a", "choices": ["b"], "gold": ' + "1" * 5000 + "}", "question 1"),
        ('{"query": "a", "choices": ["b"], "gold": 1e400}', "question 1"),
        ('{"query": "a", "choices": ["b"], "gold": 99999999999999999999}', "question 1"),
        ('{"query": "a", "choices": "bc", "gold": 0}', "question 1"),
        ('{"query": "a", "choices": ["\\ud83d"], "gold": 0}', "question 1"),
        ('{"query": "a", "choices": {"b": 1}, "gold": 0}', "question 1"),
        ('{"context_options": [1, 2], "continuation": "b", "gold": 0}', "question 1"),
        ('{"context_options": null, "continuation": "b", "gold": 0}', "question 1"),
        ("\xff", "UTF-8"),
        ('{"query": "a", "choices": ["b"], "gold": 1}', "question 1"),
        ('{"query": "a", "choices": ["b"], "gold": true}', "question 1"),
        ('{"query": "a", "gold": 0}', "question 1"),
        ('{"query": 3, "choices": ["b"], "gold": 0}', "question 1"),
    ],
)
def test_a_file_of_another_form_is_refused_in_words(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=says) as caught:
        questions(str(path))
    assert str(path) in str(caught.value)


def test_a_file_that_is_not_there_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        questions(str(tmp_path / "none.jsonl"))


@pytest.mark.parametrize(
    "value", ["bool q", "piqa,piqa", "a/x.jsonl,b/x.jsonl", "mmlu:5,mmlu:5", "mmlu:101", "lm-eval/"]
)
def test_wrong_names_are_found_before_anything_runs(value: str) -> None:
    with pytest.raises(UsageError) as caught:
        validate(resolve(apply_overrides(load("smoke"), {"evaluation.tasks": value})))
    assert caught.value.where == "evaluation.tasks"


@pytest.mark.skipif(not SHARED.exists(), reason="needs the shared data")
@pytest.mark.parametrize("file", ["piqa/valid", "arc/arc_easy", "winogrande/winogrande_dev.llmfoundry"])
def test_real_questions_are_read_and_tokenized(file: str) -> None:
    found = questions(str(SHARED / f"{file}.jsonl"), limit=50)
    assert len(found) == 50
    task = tokenize(found, Encoder(tiny.byte_tokenizer(300)))
    assert len(task.spans) == 50
    assert all(row.scored < len(row.ids) for row in task.rows)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("piqa", None),
        ("mine.jsonl", None),
        ("lm-eval/piqa", LmTask("piqa")),
        ("piqa:0", LmTask("piqa", 0)),
        ("mmlu:5", LmTask("mmlu", 5)),
        ("bool q", None),
    ],
)
def test_which_names_are_lm_evals(typed: str, meant: LmTask | None) -> None:
    assert lm_task(typed) == meant


def test_a_task_of_lm_eval_says_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from engine.config import tasks as module

    monkeypatch.setattr(module, "find_spec", lambda name: None)
    require_lm_eval(["piqa", "mine.jsonl"])
    with pytest.raises(PreflightError, match="lm-eval, which may know it, is not installed") as caught:
        require_lm_eval(["piqa", "mmlu:5"])
    assert caught.value.hint == "pip install 'eqat[tasks]'"
