"""Windows of several texts: exact shares, an order that the seed decides, each text as it is by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from engine.config.calibration import CalibrationConfig
from engine.config.run import RunConfig
from engine.config.validation import convert
from engine.data import text as text_module
from engine.data.encoding import Encoder
from engine.data.hub import HubText
from engine.data.tokens import token_windows
from engine.errors import DataError
from engine.phases.text import Tokens, draw_tokens
from engine.reporter import Reporter

LENGTH = 32


class Heard:
    """What a run would hear of its text."""

    def __init__(self) -> None:
        self.warnings: list[tuple[str, str]] = []

    def warning(self, code: str, message: str) -> None:
        self.warnings.append((code, message))

    def leave_if_asked(self) -> None: ...

    def expect_silence(self, seconds: float) -> None: ...


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Files whose every word says which one it is."""
    for name in ("red", "green", "blue"):
        lines = (f"{name} {name} {n}" for n in range(3000))
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
    rows = [json.dumps({"about": f"no {n}", "body": "gold gold " * 100}) for n in range(60)]
    (tmp_path / "gold.jsonl").write_text("\n".join(rows))
    return tmp_path


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EQAT_CACHE_DIR", str(tmp_path / "cache"))


def nobodys(part: Any, sequences: int, length: int) -> Tensor:
    raise AssertionError("no text of the model's own is asked for")


def config(mix: tuple[str, ...] | None, sequences: int = 20, seed: int = 0, **data: Any) -> RunConfig:
    text = {"mix": list(mix)} if mix else data
    stage = {"sequences": sequences, "val_sequences": 10, "sequence_length": LENGTH}
    return convert(
        {
            "data": text,
            "block_ap": stage,
            "e2e_qp": {**stage, "enabled": False},
            "evaluation": {"enabled": False},
            "runtime": {"seed": seed},
        }
    )


def drawn(tokenizer: Any, asked: RunConfig, heard: Heard | None = None) -> Tokens:
    return draw_tokens(asked, Encoder(tokenizer), cast(Reporter, heard or Heard()), nobodys)


def names(tokenizer: Any, windows: Tensor) -> list[str]:
    """Which file each window is from."""
    found = []
    for text in tokenizer.batch_decode(windows):
        (name,) = {name for name in ("red", "green", "blue", "gold", "hub") if name in text}
        found.append(name)
    return found


def test_each_text_gives_its_share_of_training_and_of_validation(tokenizer: Any, texts: Path) -> None:
    mix = (f"{texts}/red.txt:0.6", f"{texts}/green.txt:0.3", f"{texts}/gold.jsonl?column=body:0.1")
    windows = drawn(tokenizer, config(mix)).of("block_ap")
    assert windows.tokens_NT.shape == (30, LENGTH)
    train = names(tokenizer, windows.tokens_NT[: windows.train])
    assert [train.count(name) for name in ("red", "green", "gold")] == [12, 6, 2]
    validation = names(tokenizer, windows.tokens_NT[windows.train :])
    assert [validation.count(name) for name in ("red", "green", "gold")] == [6, 3, 1]
    assert train != sorted(train, key=("red", "green", "gold").index), "the texts are mixed"


def test_the_seed_decides_windows_and_order(tokenizer: Any, texts: Path) -> None:
    mix = (f"{texts}/red.txt:1", f"{texts}/green.txt:1")
    one, again, other = (drawn(tokenizer, config(mix, seed=seed)) for seed in (1, 1, 2))
    assert one.digests() == again.digests() != other.digests()
    order, another = (names(tokenizer, tokens.of("block_ap").tokens_NT) for tokens in (one, other))
    assert order != another
    other_way = drawn(tokenizer, config(mix[::-1], seed=1))
    assert sorted(names(tokenizer, other_way.of("block_ap").tokens_NT)) == sorted(order)


def test_the_windows_of_a_part_are_those_of_its_text_alone(tokenizer: Any, texts: Path) -> None:
    asked = config((f"{texts}/red.txt:3", f"{texts}/blue.txt:1"), seed=5)
    windows = drawn(tokenizer, asked).of("block_ap")
    red = {
        tuple(row) for row in windows.tokens_NT[: windows.train].tolist() if "red" in tokenizer.decode(row)
    }
    source = CalibrationConfig(source=f"{texts}/red.txt")
    alone = token_windows(Encoder(tokenizer), source, "train", sequences=15, length=LENGTH, seed=5)
    assert red == {tuple(row) for row in alone.tolist()}


def test_a_mixture_of_one_is_the_text_itself(tokenizer: Any, texts: Path) -> None:
    path = f"{texts}/red.txt"
    alone = drawn(tokenizer, config(None, source=path)).of("block_ap").tokens_NT
    assert torch.equal(drawn(tokenizer, config((f"{path}:7",))).of("block_ap").tokens_NT, alone)


def test_a_text_that_is_too_short_is_named_with_what_is_missing(tokenizer: Any, texts: Path) -> None:
    (texts / "short.txt").write_text("a short text about nothing much. " * 12)
    mix = (f"{texts}/red.txt:0.5", f"{texts}/short.txt:0.5")
    with pytest.raises(DataError) as caught:
        drawn(tokenizer, config(mix, sequences=400))
    error = caught.value
    assert error.where == f"data.mix: {texts}/short.txt"
    available, needed, missing = (
        int(word.replace(",", ""))
        for word in error.message.replace(": ", " ").split()
        if word.replace(",", "").isdigit() and word not in ("200", "32", "4")
    )
    assert needed == 200 * LENGTH
    assert missing == needed // 4 - available > 0
    assert "data.mix" in error.hint
    # With so much more, of a token or more a word, it suffices.
    with (texts / "short.txt").open("a") as file:
        file.write(" word" * 2 * missing)
    assert len(drawn(tokenizer, config(mix, sequences=400)).of("block_ap").tokens_NT) == 410


def test_a_part_without_a_sequence_is_not_opened(tokenizer: Any, texts: Path) -> None:
    windows = drawn(tokenizer, config((f"{texts}/red.txt:100", f"{texts}/gone.txt:1")))
    assert set(names(tokenizer, windows.of("block_ap").tokens_NT)) == {"red"}
    with pytest.raises(DataError, match="no such file"):
        drawn(tokenizer, config((f"{texts}/red.txt:1", f"{texts}/gone.txt:1")))


def test_built_in_local_and_hub_texts_mix(
    tokenizer: Any, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # `datasets` reads a folder exactly as it reads a repository: all of the path but the network is real.
    rows = [json.dumps({"words": f"hub hub {n} " * 100, "n": n}) for n in range(400)]
    (texts / "repo").mkdir()
    (texts / "repo" / "train.jsonl").write_text("\n".join(rows))
    asked: list[Any] = []

    def hub(source: Any, corpus: str, hint: str) -> HubText:
        asked.append(source)
        return HubText(
            source.__class__(repo=str(texts / "repo"), column=source.column, split=source.split), corpus
        )

    monkeypatch.setattr(text_module, "HubText", hub)
    mix = ("some/where?split=train&column=words&revision=v1:0.5", f"{texts}/red.txt:0.3", "builtin:0.2")
    windows = drawn(tokenizer, config(mix)).of("block_ap")
    train = tokenizer.batch_decode(windows.tokens_NT[: windows.train])
    assert [sum(name in text for text in train) for name in ("hub hub", "red red")] == [10, 6]
    assert {(source.repo, source.revision) for source in asked} == {("some/where", "v1")}
