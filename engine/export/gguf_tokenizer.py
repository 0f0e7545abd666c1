"""A tokenizer in a GGUF file: llama.cpp has tokenizers of its own, and the file says which, with what words.

Two of them hold what language models of today use:

* ``gpt2``: byte-level BPE. What is split before it, llama.cpp knows by a name (``tokenizer.ggml.pre``); the
  name is found by the pattern itself, so tokenizers that share a pattern share the name.
* ``llama``: sentencepiece's BPE, where spaces are letters and unknown ones fall back to bytes. It joins the
  pair whose word has the highest score; ours come from the order of the merges.

A tokenizer that neither computes is refused before anything is trained, for a model whose text is cut into
other tokens than in training looks alive and is not.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from engine.errors import PreflightError
from engine.export.gguf_metadata import Value

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""What kinds of tokens there are, as GGUF counts them."""
SPACE = "\u2581"
UNUSED_SCORE, ADDED_SCORE = -10000.0, -1000.0

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"
_WORD, _SIGNS = r"|[^\r\n\p{L}\p{N}]?\p{L}+", r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
_LLAMA3 = _CONTRACTIONS + _WORD + r"|\p{N}{1,3}" + _SIGNS + _REST
_QWEN2 = _CONTRACTIONS + _WORD + r"|\p{N}" + _SIGNS + _REST
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEGIN = r"[^\r\n\p{L}\p{N}]?"
_TEKKEN = (
    f"{_BEGIN}{_UPPER}*{_LOWER}+|{_BEGIN}{_UPPER}+{_LOWER}*|" + r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _REST
)
_GPT4O = (
    f"{_BEGIN}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_BEGIN}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _REST
)
_QWEN35 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + _REST
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*" + _REST
)

PRE_TOKENIZERS: dict[tuple[tuple[str, ...], bool], str] = {
    ((_GPT2,), False): "gpt-2",
    ((r"\p{N}", _GPT2), False): "smollm",
    ((_LLAMA3,), True): "llama-bpe",
    ((_LLAMA3,), False): "smaug-bpe",
    ((_QWEN2,), False): "qwen2",
    ((_QWEN35,), False): "qwen35",
    ((_TEKKEN,), True): "tekken",
    ((_GPT4O,), False): "gpt-4o",
    ((r"\p{N}{1,3}", r"[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK3), False): "deepseek-v3",
}
"""llama.cpp's names (``llama-vocab.cpp``), by the patterns that text is split at, one after another, and
whether a word that is a token is taken for it without merging (``ignore_merges``)."""


def tokenizer_metadata(tokenizer: Any, rows: int, config: Any) -> dict[str, Value]:
    """What a file says of a tokenizer whose model has an embedding of so many rows.

    Raises:
        PreflightError: for a tokenizer that llama.cpp has no like of.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refused("it is none of the tokenizers library's")
    content = json.loads(backend.to_str())
    model = content["model"]
    if model.get("type") != "BPE":
        raise _refused(f"it is of the kind {str(model.get('type'))[:40]}, and no byte-pair encoding")
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise _refused(f"its model has a {key}")
    merges = [tuple(each.split(" ", 1)) if isinstance(each, str) else tuple(each) for each in model["merges"]]
    added = {each["id"]: each for each in content.get("added_tokens") or [] if each["id"] < rows}
    words = {number: word for word, number in model["vocab"].items() if number < rows}
    parts = list(_parts(content.get("pre_tokenizer"), "pretokenizers"))
    if any(part["type"] == "ByteLevel" for part in parts):
        said = _byte_level(content, model, parts, merges)
        scores: list[float] = []
    else:
        said, scores = _sentencepiece(content, model, parts, words, merges, added, rows)
    tokens, types = _tokens(words, added, rows, model.get("unk_token"), bool(scores))
    said |= {"tokens": tokens, "token_type": types, **_special(tokenizer, config, rows)}
    if scores:
        said["scores"] = scores
    found = {f"tokenizer.ggml.{key}": Value(value) for key, value in said.items()}
    return found | _templates(tokenizer)


def _byte_level(
    content: Mapping[str, Any], model: Mapping[str, Any], parts: list[Any], merges: Sequence[tuple[str, ...]]
) -> dict[str, Any]:
    for step in _parts(content.get("normalizer"), "normalizers"):
        if step["type"] != "NFC":  # llama.cpp leaves it out, as for every Qwen
            raise _refused(f"it normalizes text ({step['type']})")
    patterns = tuple(_patterns(parts))
    pre = PRE_TOKENIZERS.get((patterns, bool(model.get("ignore_merges"))), "" if merges else "gpt-2")
    if not pre:
        shown = " then ".join(patterns)[:80] or "nothing"
        raise _refused(f"llama.cpp has no name for how it splits text before merging ({shown})")
    return {"model": "gpt2", "pre": pre, "merges": [_joined(pair) for pair in merges]}


def _joined(pair: tuple[str, ...]) -> str:
    """A merge as GGUF has it: two words with a space between, of which byte-level words hold none."""
    return " ".join(pair)


def _patterns(parts: list[Any]) -> Iterator[str]:
    """The patterns that text is split at, one after another."""
    for part in parts:
        kind = part["type"]
        if kind == "ByteLevel":
            if part.get("add_prefix_space"):
                raise _refused("it puts a space before every text")
            if part.get("use_regex"):
                yield _GPT2
        elif kind == "Digits":
            yield r"\p{N}" if part.get("individual_digits") else r"\p{N}+"
        elif kind == "Split" and part.get("behavior") == "Isolated" and not part.get("invert"):
            yield str(part["pattern"].get("Regex") or part["pattern"].get("String"))
        else:
            raise _refused(f"it splits text in a way of its own ({kind})")


def _sentencepiece(
    content: Mapping[str, Any],
    model: Mapping[str, Any],
    parts: list[Any],
    words: Mapping[int, str],
    merges: Sequence[tuple[str, ...]],
    added: Mapping[int, Any],
    rows: int,
) -> tuple[dict[str, Any], list[float]]:
    if not model.get("byte_fallback"):
        raise _refused("it is neither byte-level nor falls back to bytes")
    prefix = _begins_with_space(content, parts, words)
    ranks: dict[str, list[int]] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair), []).append(rank)
    _require_every_split(ranks, merges, words, {each["content"] for each in added.values()})
    numbers = {word: number for number, word in words.items()}
    scores = [UNUSED_SCORE] * rows
    for word, number in numbers.items():
        # Letters and bytes are what merging begins with: nothing is joined into them.
        scores[number] = -float(ranks[word][0]) if word in ranks else -float(len(merges))
    for number in added:
        scores[number] = ADDED_SCORE
    said = {"model": "llama", "pre": "default", "add_space_prefix": prefix}
    return said, scores


def _begins_with_space(content: Mapping[str, Any], parts: list[Any], words: Mapping[int, str]) -> bool:
    """Whether a space comes before a text; everything else that is done to it has to be spaces alone."""
    prefix = False
    for step in _parts(content.get("normalizer"), "normalizers"):
        if step["type"] == "Prepend" and step.get("prepend") == SPACE:
            prefix = True
        elif step["type"] != "Replace" or (step["pattern"].get("String"), step["content"]) != (" ", SPACE):
            raise _refused(f"it normalizes text ({step['type']})")
    for part in parts:
        if part["type"] == "Metaspace" and part.get("replacement") == SPACE:
            prefix = prefix or part.get("prepend_scheme", "always") != "never"
            inside = (word for word in words.values() if SPACE in word[1:].lstrip(SPACE))
            if part.get("split", True) and (word := next(inside, None)):
                raise _refused(f"it splits text at spaces and has the word {word[:40]!r}")
        elif part["type"] != "Split" or part["pattern"].get("String") != " ":
            raise _refused(f"it splits text in a way of its own ({part['type']})")
    return prefix


def _require_every_split(
    ranks: Mapping[str, list[int]],
    merges: Sequence[tuple[str, ...]],
    words: Mapping[int, str],
    added: set[str],
) -> None:
    """sentencepiece joins any two neighbours that make a word, the best word first. A tokenizer does the same
    only where every way to make a word is one of its merges, and those of a word stand together."""
    known, pairs = set(words.values()) - added, set(merges)
    for word in known:
        if word in ranks and max(ranks[word]) - min(ranks[word]) >= len(ranks[word]):
            raise _refused(f"its merges into {word[:40]!r} stand apart")
        for cut in range(1, len(word)):
            pair = word[:cut], word[cut:]
            if pair not in pairs and pair[0] in known and pair[1] in known and not _is_byte(word):
                raise _refused(f"its merges lack {pair[0][:40]!r} with {pair[1][:40]!r}, which make a word")


def _tokens(
    words: Mapping[int, str], added: Mapping[int, Any], rows: int, unknown: object, spaces: bool
) -> tuple[list[str], list[int]]:
    """Every row's word and its kind; rows without one get a name that no text has."""
    tokens, types = [], []
    for number in range(rows):
        if spaces and _is_byte(words.get(number, "")):
            tokens.append(words[number])
            types.append(BYTE)
        elif number in added:
            word = str(added[number]["content"])
            special = bool(added[number].get("special"))
            tokens.append(word if special else word.replace(SPACE, " "))
            types.append(UNKNOWN if word == unknown and spaces else CONTROL if special else USER_DEFINED)
        elif number in words:
            word = words[number]
            tokens.append(word)
            types.append(UNKNOWN if word == unknown else NORMAL)
        else:
            tokens.append(f"[PAD{number}]")
            types.append(UNUSED)
    return tokens, types


def _is_byte(word: str) -> bool:
    return len(word) == 6 and word.startswith("<0x") and word.endswith(">")


def _special(tokenizer: Any, config: Any, rows: int) -> dict[str, Any]:
    """Numbers of special tokens, and whether the tokenizer writes them before and after a text itself."""
    said: dict[str, Any] = {}
    for key, name in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        number = getattr(tokenizer, f"{name}_token_id", None)
        if number is None:
            number = getattr(config, f"{name}_token_id", None)
        if isinstance(number, list):
            number = next(iter(number), None)
        if isinstance(number, int) and 0 <= number < rows:
            said[f"{key}_token_id"] = number
    written, plain = (list(tokenizer("a", add_special_tokens=each)["input_ids"]) for each in (True, False))
    begin, end = said.get("bos_token_id"), said.get("eos_token_id")
    said["add_bos_token"] = len(written) > len(plain) and written[0] == begin
    said["add_eos_token"] = len(written) > len(plain) + said["add_bos_token"] and written[-1] == end
    if len(written) != len(plain) + said["add_bos_token"] + said["add_eos_token"]:
        raise _refused("it writes other tokens around a text than those of its begin and its end")
    return said


def _templates(tokenizer: Any) -> dict[str, Value]:
    """Chat templates: one, or several by name."""
    found = getattr(tokenizer, "chat_template", None)
    named = found if isinstance(found, dict) else {"default": found} if isinstance(found, str) else {}
    said = {}
    for name, template in named.items():
        key = "tokenizer.chat_template" + ("" if name == "default" else f".{name}")
        said[key] = Value(template)
    if others := [name for name in named if name != "default"]:
        said["tokenizer.chat_templates"] = Value(others)
    return said


def _parts(step: Any, inner: str) -> Iterator[Any]:
    """The steps of a sequence, or the one there is."""
    if step is None:
        return
    if step["type"] == "Sequence":
        for each in step[inner]:
            yield from _parts(each, inner)
    else:
        yield step


def _refused(why: str) -> PreflightError:
    return PreflightError(
        f"a GGUF file cannot hold the tokenizer: {why}",
        where="export.formats",
        hint="leave gguf out of export.formats; the other formats take the tokenizer's files as they are",
    )
