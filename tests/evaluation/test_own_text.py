"""Text that a model writes itself: what it is drawn from, how it is cut, and that it leaves no trace."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from engine.config.model import ModelConfig
from engine.config.runtime import LARGEST_SEED
from engine.data.encoding import Encoder
from engine.errors import DataError, StopRequested
from engine.evaluation import own_text, writing
from engine.evaluation.own_text import own_windows
from engine.models.causal_lm import CausalLM
from engine.models.source import ModelSource
from engine.plan.own_text import DOCUMENT_TOKENS

STORIES = Path(__file__).parents[2].parent / "shared/models/stories260K"


@pytest.fixture
def lm() -> CausalLM:
    source = ModelSource.open(ModelConfig(source="random://tiny-llama"))
    return CausalLM(source, torch.device("cpu"), torch.float32)


def encoder(lm: CausalLM, bos: str = "auto") -> Encoder:
    return Encoder(lm.source.tokenizer(), rows=lm.vocab_size, bos=bos)  # type: ignore[arg-type]


def write(
    lm: CausalLM, *, windows: int = 6, length: int = 20, seed: int = 0, bos: str = "always"
) -> torch.Tensor:
    return own_windows(lm, encoder(lm, bos), windows=windows, length=length, seed=seed, documents=4)


@pytest.mark.parametrize("length", [2, 20, DOCUMENT_TOKENS + 1, DOCUMENT_TOKENS + 7])
@pytest.mark.parametrize("bos", ["always", "never"])
def test_every_window_is_full_and_begins_as_sequences_do(lm: CausalLM, bos: str, length: int) -> None:
    windows = write(lm, windows=3, length=length, bos=bos)
    assert windows.shape == (3, length)
    assert windows.dtype == torch.int64
    begin = encoder(lm, bos).begin
    assert len(begin) == (bos == "always")
    assert (windows[:, : len(begin)] == torch.tensor(begin)).all()
    assert int(windows.min()) >= 0
    assert int(windows.max()) < lm.vocab_size
    # Each document begins with text: its first token is a letter of the byte tokenizer.
    tokenizer = lm.source.tokenizer()
    for row in windows[:, len(begin) :]:
        firsts = [tokenizer.decode([token]) for token in row[::DOCUMENT_TOKENS].tolist()]
        assert all(any(map(str.isalpha, first)) for first in firsts)


def test_the_seed_decides_and_random_numbers_of_others_are_as_they_were(lm: CausalLM) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one = write(lm)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(write(lm), one)
    assert write(lm, windows=2, length=4, seed=LARGEST_SEED).shape == (2, 4)
    assert not torch.equal(write(lm, seed=1), one)
    assert len({tuple(row.tolist()) for row in one}) == len(one)


def test_tokens_are_drawn_from_what_the_model_predicts(lm: CausalLM) -> None:
    # Sharper predictions, so that drawing evenly, or always the likeliest, would be seen.
    with torch.no_grad():
        head = lm.model.get_output_embeddings().weight
        head *= 2.5 / head.norm(dim=1).mean()
    windows = write(lm, windows=40, length=30)
    with lm.whole(lm.load_block) as model, torch.no_grad():
        predicted = model(windows).logits[:, 1:-1].log_softmax(-1)  # what comes after the first token of text
    surprise = -predicted.gather(-1, windows[:, 2:, None]).mean()
    entropy = -(predicted.exp() * predicted).sum(-1).mean()
    assert entropy < 0.8 * torch.tensor(lm.vocab_size).log(), "the test needs sharper predictions"
    assert abs(surprise - entropy) < 0.1 * entropy
    assert -predicted.max(-1).values.mean() < 0.8 * entropy


@pytest.mark.parametrize("recorded", [False, True])
def test_progress_is_told_and_a_stop_is_heard_at_the_next_token(
    lm: CausalLM, recorded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_text, "_is_recorded", lambda *of_model: recorded)
    monkeypatch.setattr(writing, "TOLD", 1)
    told: list[tuple[int, int]] = []

    def hear(done: int, total: int) -> None:
        told.append((done, total))
        if len(told) == 3:
            raise StopRequested

    own_windows(
        *(lm, encoder(lm, bos="always")),
        windows=3,
        length=9,
        seed=0,
        documents=2,
        told=lambda *n: told.append(n),
    )
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1][0] <= told[-1][1]
    told.clear()
    before = lm.model.generation_config
    with pytest.raises(StopRequested):
        own_windows(lm, encoder(lm), windows=3, length=9, seed=0, documents=2, told=hear)
    assert len(told) == 3
    assert lm.model.generation_config is before
    assert all(p.device.type == "meta" for p in lm._blocks.parameters()), "the model is in one piece still"


def test_a_vocabulary_without_text_is_named(lm: CausalLM) -> None:
    plain = Tokenizer(models.WordLevel({str(n): n for n in range(lm.vocab_size)}, unk_token="0"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    numbers = Encoder(PreTrainedTokenizerFast(tokenizer_object=plain), rows=lm.vocab_size)
    with pytest.raises(DataError, match="no token that is text"):
        own_windows(lm, numbers, windows=1, length=9, seed=0, documents=2)


@pytest.mark.skipif(not STORIES.exists(), reason="the shared model stories260K is not here")
def test_a_tokenizer_of_a_real_model_gives_words() -> None:
    source = ModelSource.open(ModelConfig(source=str(STORIES)))
    lm = CausalLM(source, torch.device("cpu"), torch.float32)
    windows = own_windows(lm, encoder(lm), windows=4, length=120, seed=0, documents=8)
    texts = [source.tokenizer().decode(row, skip_special_tokens=True) for row in windows]
    assert sum(" the " in text or " and " in text or " to " in text for text in texts) >= 3
