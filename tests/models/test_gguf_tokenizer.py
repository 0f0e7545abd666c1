"""A GGUF file's tokenizer is read as the file describes it, whatever transformers makes of it."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from engine.data.encoding import Encoder
from engine.models.gguf_tokenizer import mend

PIECES = ["<pad>", "<bos>", "<unk>", "h", "e", "l", "o", "▁", "he", "ll", "llo", "hello", "▁hello"]
"""Each longer one out of two before it; the earlier, the likelier."""
SPECIAL = 3
GEMMA = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.add_bos_token": True}


def unigram() -> PreTrainedTokenizerFast:
    """As transformers 5.17 reads Gemma's: ranks for log-probabilities, and no begin-of-text."""
    ranks = [(piece, -1000.0 if n < SPECIAL else -float(2**n)) for n, piece in enumerate(PIECES)]
    made = Tokenizer(models.Unigram(ranks, unk_id=2, byte_fallback=False))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<bos>", unk_token="<unk>", pad_token="<pad>"
    )


def test_pairs_are_merged_as_sentencepiece_merges_them() -> None:
    tokenizer = unigram()
    read = tokenizer.convert_ids_to_tokens(tokenizer("hello hello")["input_ids"])
    mended = mend(tokenizer, GEMMA)
    told = mended.convert_ids_to_tokens(mended("hello hello", add_special_tokens=False)["input_ids"])
    assert told == ["hello", "▁hello"]
    assert read != told, "the test needs a case that was read otherwise"


@pytest.mark.parametrize("asked", [True, False, None])
def test_texts_begin_as_the_file_says(asked: bool | None) -> None:
    vocab = {piece: n for n, piece in enumerate(PIECES)}
    tokenizer = LlamaTokenizer(
        vocab=vocab, merges=[("h", "e"), ("l", "l")], bos_token="<bos>", unk_token="<unk>"
    )
    tokenizer.add_bos_token = False
    tokenizer.update_post_processor()
    settings = {} if asked is None else {"tokenizer.ggml.add_bos_token": asked}
    begin = Encoder(mend(tokenizer, settings)).begin
    assert begin == ((1,) if asked else ())
    # Nothing is done twice.
    assert Encoder(mend(tokenizer, settings)).begin == begin


@pytest.mark.parametrize("model", ["t5", "bert", None])
def test_a_tokenizer_that_is_unigram_stays_one(model: str | None) -> None:
    tokenizer = mend(unigram(), {"tokenizer.ggml.model": model})
    assert isinstance(tokenizer.backend_tokenizer.model, models.Unigram)
