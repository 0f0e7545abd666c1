"""The prompt that all loaders read: English text that comes with Python, in the model's own tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from engine.config.model import BeginOfText
from engine.data.builtin import BuiltinText
from engine.data.encoding import Encoder
from engine.errors import PreflightError
from engine.export.layout import Layout, form_of
from engine.models.skeleton import text_config
from engine.phases.imported import open_source
from engine.run.benched import Request
from engine.run.directory import RunDirectory

WHERE = "the prompt"


def prompt_tokens(request: Request) -> list[int]:
    """As many tokens as are asked for.

    Raises:
        PreflightError: for more than the model reads, or without a tokenizer that can be read.
    """
    tokenizer, config, bos = _opened(request)
    positions = getattr(config, "max_position_embeddings", None)
    wanted = request.prompt_tokens + request.new_tokens
    if positions is not None and wanted > positions:
        raise PreflightError(
            f"a prompt of {request.prompt_tokens} tokens and {request.new_tokens} more are {wanted}, and the "
            f"model reads at most {positions}",
            where="--prompt-tokens",
            hint="ask for fewer",
        )
    encoder = Encoder(tokenizer, rows=int(config.vocab_size), bos=bos)
    found: list[int] = []
    for text in _texts():
        if found:
            found += encoder.known(encoder.bare([text], WHERE)[0], WHERE).tolist()
        else:
            found = encoder.sequence(text, WHERE, special=True)
        if len(found) >= request.prompt_tokens:
            break
    return found[: request.prompt_tokens]


def _texts() -> Iterator[str]:
    """Without end."""
    while True:
        yield from BuiltinText().documents("evaluation")


def _opened(request: Request) -> tuple[Any, Any, BeginOfText]:
    """Tokenizer and configuration, of the export where it has them in Hugging Face's form, else of the run's
    model; and how texts begin."""
    config = RunDirectory.open(request.run).config()
    if not isinstance(form_of(request.format), Layout):
        source = open_source(config)
        return source.tokenizer(), text_config(source.config), config.model.bos
    code = {"trust_remote_code": request.trust_remote_code}
    tokenizer = AutoTokenizer.from_pretrained(request.folder, **code)
    return tokenizer, text_config(AutoConfig.from_pretrained(request.folder, **code)), config.model.bos
