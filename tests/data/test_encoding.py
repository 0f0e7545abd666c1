"""Sequences begin as the model's tokenizer begins a text, once; and no token is one that the model lacks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from text_files import documents
from tokenizers_made import (
    BEGIN,
    END,
    like_gpt2,
    like_llama,
    like_opt,
    like_smollm,
    with_template,
    with_token,
)

from engine.config.data import DataConfig
from engine.data.encoding import Encoder, tokenizer_hash
from engine.data.tasks import Question
from engine.data.tokens import token_windows
from engine.errors import DataError, ExitCode, PreflightError
from engine.evaluation.continuation import prompt_ids
from engine.evaluation.tasks import tokenize

BUILTIN = DataConfig()
Kind = Callable[[Path], Any]
BEGINS: dict[str, Kind] = {"template": with_template, "llama": like_llama, "opt": like_opt}
BEGINS_NOT: dict[str, Kind] = {"gpt2": like_gpt2, "smollm": like_smollm}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EQAT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


@pytest.fixture(params=BEGINS)
def begins(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    return BEGINS[request.param](tmp_path / "tokenizer")


@pytest.fixture(params=BEGINS_NOT)
def begins_not(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    return BEGINS_NOT[request.param](tmp_path / "tokenizer")


def whole_text(data: DataConfig) -> str:
    return "\n\n".join(documents(data, "evaluation"))


def rows_of(path: Path, texts: list[str]) -> DataConfig:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return DataConfig(source=str(path))


# -- windows -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["train", "validation"])
def test_every_drawn_window_begins_with_the_token_and_none_twice(
    begins: Any, part: Any, tmp_path: Path
) -> None:
    # Documents of the windows' own length: about every window would begin where a document does.
    for data in (BUILTIN, rows_of(tmp_path / "a.jsonl", ["x" * 14] * 2000)):
        windows = token_windows(Encoder(begins), data, part, sequences=50, length=17, seed=1)
        assert windows.shape == (50, 17)
        assert set(windows[:, 0].tolist()) == {begins.bos_token_id}
        if begins.bos_token_id != begins.eos_token_id:
            assert not (windows[:, 1] == begins.bos_token_id).any()


def test_an_evaluation_window_is_the_token_and_the_text_without_a_gap(begins: Any) -> None:
    windows = token_windows(Encoder(begins), BUILTIN, "evaluation", sequences=0, length=64)
    ids = begins(whole_text(BUILTIN), add_special_tokens=False)["input_ids"]
    assert windows.shape == (len(ids) // 63, 64)
    assert set(windows[:, 0].tolist()) == {begins.bos_token_id}
    assert windows[:, 1:].flatten().tolist() == ids[: len(ids) // 63 * 63]
    few = token_windows(Encoder(begins), BUILTIN, "evaluation", sequences=5, length=64)
    assert torch.equal(few, windows[:5])


def test_a_text_that_begins_with_the_token_itself_has_it_once(begins: Any, tmp_path: Path) -> None:
    token = begins.convert_ids_to_tokens(begins.bos_token_id)
    data = rows_of(tmp_path / "a.jsonl", [token + "x" * 40] * 99)
    first = token_windows(Encoder(begins), data, "evaluation", sequences=1, length=32)
    assert first[0].tolist().count(begins.bos_token_id) == 1
    drawn = token_windows(Encoder(begins), data, "train", sequences=9, length=32).tolist()
    doubled = [begins.bos_token_id] * 2
    if begins.bos_token_id != begins.eos_token_id:
        assert not any(row[at : at + 2] == doubled for row in drawn for at in range(31))


@pytest.mark.parametrize("bos", ["auto", "text", "never"])
def test_where_the_tokenizer_begins_with_nothing_windows_are_the_text(begins_not: Any, bos: Any) -> None:
    encoder = Encoder(begins_not, bos=bos)
    windows = token_windows(encoder, BUILTIN, "evaluation", sequences=0, length=64)
    ids = begins_not(whole_text(BUILTIN))["input_ids"]
    assert windows.flatten().tolist() == ids[: len(ids) // 64 * 64]
    assert (encoder.begin, encoder.words()) == ((), "")
    plain = token_windows(Encoder(begins_not), BUILTIN, "train", sequences=8, length=64)
    assert torch.equal(token_windows(encoder, BUILTIN, "train", sequences=8, length=64), plain)


def test_always_writes_it_for_a_tokenizer_that_does_not(begins_not: Any) -> None:
    encoder = Encoder(begins_not, bos="always")
    for part in ("train", "evaluation"):
        windows = token_windows(encoder, BUILTIN, part, sequences=4, length=32)
        assert set(windows[:, 0].tolist()) == {begins_not.bos_token_id}
    begins_not.bos_token = None
    with pytest.raises(PreflightError, match="no begin-of-text token"):
        Encoder(begins_not, bos="always")


def test_text_begins_once_and_windows_are_cut_as_published(begins: Any) -> None:
    encoder = Encoder(begins, bos="text")
    ids = begins(whole_text(BUILTIN))["input_ids"]
    windows = token_windows(encoder, BUILTIN, "evaluation", sequences=0, length=64)
    assert windows.flatten().tolist() == ids[: len(ids) // 64 * 64]
    assert windows[0, 0] == begins.bos_token_id
    assert not (windows[1:, 0] == begins.bos_token_id).any()
    assert "begins the text" in encoder.words()


def test_never_has_none_anywhere(tmp_path: Path) -> None:
    encoder = Encoder(with_template(tmp_path / "t"), bos="never")
    for part in ("train", "validation", "evaluation"):
        assert not (token_windows(encoder, BUILTIN, part, sequences=6, length=64) == 1).any()
    assert "no sequence begins" in encoder.words()


def test_windows_that_begin_otherwise_are_cached_otherwise(cache: Path, tmp_path: Path) -> None:
    tokenizer = with_template(tmp_path / "t")
    for bos in ("auto", "text", "never", "always"):
        for part in ("train", "evaluation"):
            token_windows(Encoder(tokenizer, bos=bos), BUILTIN, part, sequences=2, length=32)
    assert len(list(cache.iterdir())) == 6, "always is auto for this tokenizer"
    assert tokenizer_hash(tokenizer) == Encoder(tokenizer, bos="never").rules


def test_a_token_at_the_end_is_not_put_behind_every_text(tmp_path: Path) -> None:
    tokenizer = with_template(tmp_path / "t", ends=True)
    encoder = Encoder(tokenizer)
    assert encoder.begin == (1,)
    (letter,) = tokenizer("a", add_special_tokens=False)["input_ids"]
    assert encoder.sequence("a", "here", special=True) == [1, letter]


# -- prompts, conversations, questions -----------------------------------------------------------------


def test_a_prompt_begins_as_windows_do(begins: Any) -> None:
    (ids,) = prompt_ids(Encoder(begins), "the end").tolist()
    assert ids == begins("the end")["input_ids"]
    (ids,) = prompt_ids(Encoder(begins, bos="never"), "the end").tolist()
    assert ids == begins("the end", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("writes", [True, False])
def test_a_conversation_has_the_token_once_whether_or_not_its_template_writes_it(
    writes: bool, tmp_path: Path
) -> None:
    tokenizer = with_template(tmp_path / "t")
    turn = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    tokenizer.chat_template = ("{{ bos_token }}" if writes else "") + turn
    (ids,) = prompt_ids(Encoder(tokenizer), "hi").tolist()
    assert tokenizer.decode(ids) == f"{BEGIN}[hi]"


def test_questions_begin_with_the_token_and_keep_it_when_they_are_cut(
    begins: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine.evaluation import tasks

    monkeypatch.setattr(tasks, "LONGEST", 20)
    task = tokenize([Question((("x" * 100, " end"), ("", "y"), ("why? ", "so")), 0)], Encoder(begins))
    assert [row.ids[0] for row in task.rows] == [begins.bos_token_id] * 3
    assert len(task.rows[0].ids) == 20
    for row, text in zip(task.rows, (" end", "y", " so"), strict=True):
        assert begins.decode(row.ids[-row.scored :]).strip() == text.strip()
        assert row.scored < len(row.ids), "the token itself is no answer"


# -- tokens that the embedding lacks -------------------------------------------------------------------


def test_an_added_token_ends_only_the_run_whose_text_has_it(tmp_path: Path) -> None:
    tokenizer = like_smollm(tmp_path / "t")
    rows = len(tokenizer)
    image = with_token(tokenizer, "<image>")
    encoder = Encoder(tokenizer, rows=rows)
    assert image == rows
    for part in ("train", "evaluation"):
        token_windows(encoder, BUILTIN, part, sequences=4, length=32)
    (tmp_path / "a.txt").write_text("a text with an <image> in it " * 200)
    data = DataConfig(source=str(tmp_path / "a.txt"))
    for part in ("train", "evaluation"):
        for cached in (False, True):
            if cached:  # by a model whose embedding has the row
                token_windows(Encoder(tokenizer), data, part, sequences=4, length=32)
            with pytest.raises(DataError, match=f"<image>.* token {image}.* only {rows} rows") as refused:
                token_windows(encoder, data, part, sequences=4, length=32)
            assert refused.value.exit_code == ExitCode.DATA
    for ask in (
        lambda: prompt_ids(encoder, "an <image>"),
        lambda: tokenize([Question((("an", " <image>"), ("an", "x")), 0)], encoder),
    ):
        with pytest.raises(DataError, match="<image>"):
            ask()
    assert prompt_ids(encoder, "no image").shape[0] == 1


@pytest.mark.parametrize("bos", ["auto", "never"])
def test_a_token_of_the_tokenizer_s_own_is_refused_only_where_it_is_needed(bos: Any, tmp_path: Path) -> None:
    tokenizer = like_smollm(tmp_path / "t")
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"eos_token": "<|late|>"})
    encoder = Encoder(tokenizer, rows=rows, bos=bos)
    token_windows(encoder, BUILTIN, "evaluation", sequences=2, length=32)
    with pytest.raises(PreflightError, match=r"documents are separated by <\|late\|>"):
        token_windows(encoder, BUILTIN, "train", sequences=2, length=32)
    tokenizer.add_special_tokens({"eos_token": END, "bos_token": "<|first|>"})
    Encoder(tokenizer, rows=rows, bos=bos)
    with pytest.raises(PreflightError, match=r"sequences begin with <\|first\|>"):
        Encoder(tokenizer, rows=rows, bos="always")


def test_text_that_a_tokenizer_has_no_tokens_for_is_a_data_error(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"a b": 0}, unk_token="?"))
    encoder = Encoder(PreTrainedTokenizerFast(tokenizer_object=words))
    with pytest.raises(DataError, match="no tokens for it"):
        encoder.bare(["something else"], "here")
