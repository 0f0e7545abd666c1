"""Tokens that a model's files name and its embedding has no row for, found before anything is loaded.

Tokenizers get tokens added, and embeddings are not always enlarged with them. A token that nobody uses is no
matter. But documents are separated by the tokenizer's end-of-text token, and sequences of many models begin
with its begin-of-text token: without a row for those nothing can be trained. What configurations name besides
is left out of account, and said.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from engine.architecture.model_folder import ModelFolder
from engine.config.model import BeginOfText
from engine.errors import EqatError, PreflightError
from engine.system.guarded import LARGE

OTHER_MODEL = "check that tokenizer and config.json belong to the same model"
"""What to do about a tokenizer that does not fit."""
_LONGEST_NAME = 60


class _Added(msgspec.Struct):
    id: int
    content: str


class _Tokenizer(msgspec.Struct):
    """What is read of a tokenizer.json; its vocabulary is large and is not."""

    added_tokens: list[_Added] = []
    post_processor: Any = None


def beyond_embedding(what_for: str, name: str, token: int, rows: int, hint: str) -> PreflightError:
    """The error for a token of the tokenizer's own that is needed and that the embedding does not know."""
    return PreflightError(
        f"{what_for} {name}, the tokenizer's token {token}, and the model's embedding has only {rows} rows",
        where="the tokenizer",
        hint=hint,
    )


def refuse_special_tokens(folder: ModelFolder, rows: int, bos: BeginOfText, *, trains: bool) -> None:
    """PreflightError where the engine would refuse the tokenizer for a token of its own that it needs.

    Files that are missing, broken or of another kind say nothing here: the engine opens the tokenizer itself.
    """
    if not rows:
        return
    settings, found = _tokenizer_of(folder)
    numbers = {token.content: token.id for token in found.added_tokens}

    def token(field: str) -> tuple[str, int | None]:
        value = settings.get(field)
        name = value.get("content") if isinstance(value, Mapping) else value
        return (name, numbers.get(name)) if isinstance(name, str) else ("", None)

    name, end = token("eos_token")
    if trains and end is not None and end >= rows:
        raise beyond_embedding("documents are separated by", ascii(name)[1:-1], end, rows, OTHER_MODEL)
    name, begin = token("bos_token")
    writes = bos == "always" or (bos == "auto" and name in _names(found.post_processor))
    if writes and begin is not None and begin >= rows:
        hint = f"{OTHER_MODEL}, or set model.bos=never"
        raise beyond_embedding("sequences begin with", ascii(name)[1:-1], begin, rows, hint)


def begin_of_text(folder: ModelFolder, bos: BeginOfText) -> str:
    """The begin-of-text token that is written before sequences, or before the text, as far as the files show
    it; empty where they do not."""
    settings, found = _tokenizer_of(folder)
    value = settings.get("bos_token")
    name = value.get("content") if isinstance(value, Mapping) else value
    if not isinstance(name, str) or bos == "never":
        return ""
    return ascii(name)[1:-1] if bos == "always" or name in _names(found.post_processor) else ""


def begin_words(bos: BeginOfText, token: str) -> str:
    """How sequences begin where ``model.bos`` is this and the token is known, or is not (empty)."""
    token = token[:_LONGEST_NAME]
    return {
        "auto": f"each begins with {token}" if token else "each begins as the tokenizer begins a text",
        "text": f"{token or 'the begin-of-text token'} begins the whole text once, which is then cut",
        "always": f"each begins with {token or 'the begin-of-text token'}",
        "never": "no begin-of-text token is written",
    }[bos]


def _tokenizer_of(folder: ModelFolder) -> tuple[Mapping[str, Any], _Tokenizer]:
    """tokenizer_config.json and tokenizer.json; both empty where one of them cannot be read."""
    try:
        settings = folder.read_object("tokenizer_config.json")
        found = msgspec.json.decode(folder.file("tokenizer.json").read(LARGE), type=_Tokenizer)
    except (EqatError, msgspec.MsgspecError, UnicodeDecodeError):
        return {}, _Tokenizer()
    return settings, found


def unused_tokens(settings: Mapping[str, Mapping[str, Any]], rows: int) -> Iterator[str]:
    """A sentence for each special token to which a configuration, named by its file, gives a number that the
    embedding has no row for."""
    for file, fields in settings.items():
        for field in ("bos_token_id", "eos_token_id"):
            value = fields.get(field)
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, int) and not isinstance(number, bool) and number >= rows > 0:
                    yield (
                        f"{file} names {field} {number}, and the embedding has only {rows} rows: "
                        "it is left out of account"
                    )


def generation_settings(folder: ModelFolder) -> Mapping[str, Any]:
    """generation_config.json; empty where there is none, and for a broken one, which is worth no failure."""
    try:
        return folder.read_object("generation_config.json")
    except EqatError:
        return {}


def _names(value: Any) -> Iterator[str]:
    """Special tokens that a post-processor writes, in whatever it is composed of."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Mapping):
            special = value.get("SpecialToken")
            if isinstance(special, Mapping) and isinstance(special.get("id"), str):
                yield special["id"]
            waiting.extend(inner for key, inner in value.items() if key != "pair")
        elif isinstance(value, list):
            waiting.extend(value)
