"""The tokenizer of a GGUF file, kept in the user's cache in a form that loads in a moment.

transformers reads all that the file says twice, one number at a time: of SmolLM2's 49 152 tokens and their
merges that took 12 s on a busy machine, of Gemma's 262 144 over a minute, before anything else could begin.
What it made of them is the same every time, so it is written down as transformers itself saves a tokenizer,
and kept only if what loads from that is the same: half a second, and nine.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
import transformers
from transformers import AutoTokenizer

from engine.system.user_cache import publish, token_cache

SUFFIX = ".tokenizer.json"
_SCHEME = 1  # raise it when another tokenizer would be made of the same file
_TRIED = ("a b", " The  quick\nbrown 12,345 ünï <|im_start|>", "")


def kept_tokenizer(header: bytes, make: Callable[[], Any]) -> Any:
    """What ``make`` makes of a file with this header, or made of it before.

    A cache that cannot be read or written costs time and nothing else.
    """
    versions = f"{_SCHEME} {transformers.__version__} {tokenizers.__version__}"
    key = hashlib.sha256(f"{versions}\n".encode() + header).hexdigest()[:40]
    path = token_cache() / f"{key}{SUFFIX}"
    found = _loaded(path)
    if found is not None:
        return found
    tokenizer = make()
    _keep(path, tokenizer)
    return tokenizer


def _loaded(path: Path) -> Any | None:
    """None where there is none, or not what was written."""
    try:
        kept = json.loads(path.read_bytes())
        files = kept["files"]
        return _of_files(files) if kept["sha256"] == _digest(files) else None
    except Exception:  # a damaged file raises whatever the damage suggests, and is written anew
        return None


def _keep(path: Path, tokenizer: Any) -> None:
    try:
        with tempfile.TemporaryDirectory(prefix="eqat-tokenizer-") as place:
            tokenizer.save_pretrained(place)
            files = {file.name: file.read_text("utf-8") for file in Path(place).iterdir() if file.is_file()}
        if not _same(tokenizer, _of_files(files)):
            return
        publish(path, json.dumps({"sha256": _digest(files), "files": files}).encode())
    except Exception:  # whatever a family's tokenizer cannot do, it is made of the file again
        return


def _of_files(files: dict[str, str]) -> Any:
    with tempfile.TemporaryDirectory(prefix="eqat-tokenizer-") as place:
        for name, text in files.items():
            (Path(place) / os.path.basename(name)).write_text(text, "utf-8")
        return AutoTokenizer.from_pretrained(place, trust_remote_code=False)


def _same(one: Any, other: Any) -> bool:
    def facts(tokenizer: Any) -> list[Any]:
        backend = tokenizer.backend_tokenizer
        return [
            type(tokenizer),
            backend.to_str(),
            tokenizer.special_tokens_map,
            tokenizer.all_special_ids,
            tokenizer.chat_template,
            *([tokenizer(text)["input_ids"] for text in _TRIED]),
            *([tokenizer(text, add_special_tokens=False)["input_ids"] for text in _TRIED]),
        ]

    return facts(one) == facts(other)


def _digest(files: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
