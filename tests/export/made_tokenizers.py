"""Small trained tokenizers of every kind that a GGUF file can hold."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from engine.export.gguf_tokenizer import PRE_TOKENIZERS

GPT2 = next(patterns[0] for (patterns, _), name in PRE_TOKENIZERS.items() if name == "gpt-2")
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SAMPLES = [
    "Hello world",
    "I'VE been 'told he's there, 12345 and 3.14",
    "  leading\n\n\nlines \t tabs   ",
    "我想在apple工作1314151天～ 🚀 (normal) 😶",
    "<|im_start|>user\nhi<|im_end|>\n",
    "a<|im_end|> b",
    "x = y_z[0] // 2\r\n",
    "café naïve Ünïcødé",
]
TEMPLATE = "{{ messages[0]['content'] }}"


def text() -> list[str]:
    """Something to learn words from."""
    own = Path(__file__).read_text()
    return [own, Path(__file__).with_name("packed_models.py").read_text(), *SAMPLES * 3]


def byte_level(patterns: Sequence[str], ignore_merges: bool = False) -> Any:
    """One that splits text at these patterns, one after another."""
    backend = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence([*map(_step, patterns), *_bytes(patterns)])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(text(), trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=SPECIAL[0], eos_token=SPECIAL[2], pad_token=SPECIAL[0]
    )
    made.chat_template = TEMPLATE
    return made


def _step(pattern: str) -> Any:
    if pattern == GPT2:
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if pattern == r"\p{N}":
        return pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def _bytes(patterns: Sequence[str]) -> list[Any]:
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return [] if GPT2 in patterns else [plain]


def sentencepiece(prefix: bool = True, *, without: int = -1) -> Any:
    """One of letters, spaces among them, that falls back to bytes and has every way to make a word; less the
    merge ``without``, where one is named."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    steps = [normalizers.Prepend("\u2581")] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "\u2581")])
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("(?<=[^\u2581])(?=\u2581)"), "isolated")
    base = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=base, show_progress=False)
    # Signs that are in no word fall back to bytes.
    backend.train_from_iterator([each.replace("🚀", "") for each in text()], trainer)
    content = json.loads(backend.to_str())
    words, order = content["model"]["vocab"], dict[str, int]()
    for rank, pair in enumerate(content["model"]["merges"]):
        order.setdefault("".join(pair), rank)
    merges = [
        [word[:cut], word[cut:]]
        for word in sorted(order, key=lambda each: order[each])
        for cut in range(1, len(word))
        if word[:cut] in words and word[cut:] in words
    ]
    if without >= 0:
        del merges[without]
    content["model"]["merges"], content["pre_tokenizer"] = merges, None
    # The trainer takes words only as special ones that are to be there in any case; bytes are none.
    content["added_tokens"] = [each for each in content["added_tokens"] if each["id"] < 3]
    backend = Tokenizer.from_str(json.dumps(content))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    made.add_special_tokens({"additional_special_tokens": SPECIAL[1:]})
    made.chat_template = TEMPLATE
    return made


def every() -> dict[str, Any]:
    """By llama.cpp's name of how they split text; of the other kind with and without a space before it."""
    made = {name: byte_level(*key) for key, name in PRE_TOKENIZERS.items()}
    return {**made, "spaces": sentencepiece(), "no space": sentencepiece(prefix=False)}
