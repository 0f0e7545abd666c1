"""Small real tokenizers of the kinds that models come with: who begins a text, and how."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

BEGIN, END, UNKNOWN = "<s>", "</s>", "<unk>"
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def _saved(folder: Path, tokenizer: Any) -> Any:
    """Written as files and read again, as a model's tokenizer always is."""
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def _byte_level(specials: list[str]) -> Tokenizer:
    """One token a byte and a few pairs."""
    vocab = {symbol: number for number, symbol in enumerate([*specials, *ALPHABET])}
    merges = [("t", "h"), ("th", "e"), ("a", "n")]
    for pair in merges:
        vocab.setdefault("".join(pair), len(vocab))
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def with_template(folder: Path, *, ends: bool = False) -> Any:
    """As Llama 3 and Gemma have it: the post-processor writes the begin-of-text token."""
    backend = _byte_level([UNKNOWN, BEGIN, END])
    single = f"{BEGIN} $A" + (f" {END}" if ends else "")
    backend.post_processor = processors.TemplateProcessing(
        single=single, pair=f"{BEGIN} $A {BEGIN} $B", special_tokens=[(BEGIN, 1), (END, 2)]
    )
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=BEGIN, eos_token=END)
    return _saved(folder, made)


def like_gpt2(folder: Path) -> Any:
    """One token begins and ends a text, and the tokenizer writes it nowhere."""
    backend = _byte_level([END])
    return _saved(folder, PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=END, eos_token=END))


def like_opt(folder: Path) -> Any:
    """One token begins and ends a text, and the tokenizer writes it first."""
    backend = _byte_level([UNKNOWN, END])
    backend.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 1)])
    return _saved(folder, PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=END, eos_token=END))


def like_smollm(folder: Path) -> Any:
    """A begin-of-text token of its own, which the tokenizer writes nowhere."""
    backend = _byte_level([UNKNOWN, BEGIN, END])
    return _saved(folder, PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=BEGIN, eos_token=END))


def like_llama(folder: Path) -> Any:
    """transformers' class for sentencepiece vocabularies: spaces are letters, and the class writes the
    begin-of-text token."""
    from transformers import LlamaTokenizer

    pieces = [UNKNOWN, BEGIN, END, *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581"]
    pieces += [chr(letter) for letter in range(33, 127)]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    vocab["\u2581a"] = len(vocab)
    made = LlamaTokenizer(vocab=vocab, merges=[("\u2581", "a")], add_bos_token=True)
    return _saved(folder, made)


def with_token(tokenizer: Any, content: str, *, special: bool = False) -> int:
    """Add a token behind the vocabulary; its number."""
    tokenizer.add_tokens([AddedToken(content, special=special)])
    return int(tokenizer.convert_tokens_to_ids(content))
