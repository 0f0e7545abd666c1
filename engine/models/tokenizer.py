"""A byte-level tokenizer made in code, for random models: no download, any text, exact round trip."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

SPECIAL = ("<|pad|>", "<|begin|>", "<|end|>")
"""Ids 0, 1 and 2, where Llama's configuration has them."""


def byte_tokenizer(vocab_size: int) -> PreTrainedTokenizerBase:
    """Three special tokens, one token per byte, and unused ones up to ``vocab_size``.

    The embedding may have more rows than that; the unused tokens only make the sizes agree.
    """
    symbols = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    if vocab_size < len(symbols):
        raise ValueError(f"a byte-level vocabulary needs at least {len(symbols)} entries, not {vocab_size}")
    symbols += [f"<|unused{index}|>" for index in range(len(symbols), vocab_size)]
    vocab = {symbol: index for index, symbol in enumerate(symbols)}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    pad, begin, end = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, bos_token=begin, eos_token=end, model_max_length=1_000_000
    )
