"""What a GGUF file says of its tokenizer, where the installed transformers reads it otherwise.

Of Gemma's tokenizer transformers made a unigram model until it learnt better (5.17 does so still), with the
file's ranks for log-probabilities: ``hello`` became ``he`` and ``llo``, no text began with ``<bos>``, and the
perplexity of Gemma 3 270M was 219 in place of 27. What the file calls ``llama`` is SentencePiece's
byte-pair encoding, whose merges follow from tokens and scores.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import models
from transformers.convert_slow_tokenizer import generate_merges


def mend(tokenizer: Any, metadata: Mapping[str, Any]) -> Any:
    """``tokenizer``, as the file with these settings describes it."""
    backend = tokenizer.backend_tokenizer
    if metadata.get("tokenizer.ggml.model") == "llama" and isinstance(backend.model, models.Unigram):
        backend.model = _byte_pairs(json.loads(backend.to_str())["model"])
    if metadata.get("tokenizer.ggml.add_bos_token") is True and tokenizer.bos_token_id is not None:
        _begin_with(tokenizer)
    return tokenizer


def _byte_pairs(unigram: Mapping[str, Any]) -> models.BPE:
    """A model that merges the likeliest pair first, of the tokens and scores of one that does not."""
    tokens = [token for token, _ in unigram["vocab"]]
    vocab = {token: index for index, token in enumerate(tokens)}
    scores = dict(unigram["vocab"])
    return models.BPE(
        vocab=vocab,
        merges=generate_merges(vocab, scores),
        unk_token=tokens[unigram["unk_id"] or 0],
        fuse_unk=True,
        byte_fallback=bool(unigram.get("byte_fallback")),
    )


def _begin_with(tokenizer: Any) -> None:
    """Texts begin with begin-of-text; nothing where they do already."""
    if tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]:
        return
    tokenizer.add_bos_token = True
    if hasattr(tokenizer, "update_post_processor"):
        tokenizer.update_post_processor()
