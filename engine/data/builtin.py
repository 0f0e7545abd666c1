"""The built-in corpus: a text for demonstrations and tests, without a network and without a file."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator

from engine.config.data import BUILTIN
from engine.data.parts import EVALUATION_FRACTION, PARTS, VALIDATION_FRACTION, Part
from engine.errors import DataError

# Paragraphs shorter than this (headings, one-line examples) may legitimately appear in two topics.
_SHARED_PARAGRAPH_CHARS = 60


class BuiltinText:
    """English reference prose that every Python ships: the topics of its language reference.

    Many topics quote one another (``specialnames`` contains ``attribute-access`` whole), so splitting by
    topic alone would leak evaluation text into training. Each paragraph is therefore kept once, and every
    topic that shared a paragraph with another one belongs to training. The rest is dealt out, largest
    first, to whichever part is furthest from its share. The corpus differs between Python versions;
    nothing here depends on its size.
    """

    corpus = BUILTIN
    streams = False

    def __init__(self) -> None:
        self._parts = _split_topics(_reference_topics())

    def documents(self, part: Part, seed: int = 0) -> Iterator[str]:
        return iter(self._parts[part])

    def skipped(self) -> list[str]:
        return []

    def identity(self, part: Part) -> dict[str, str]:
        digest = hashlib.sha256("\0".join(self._parts[part]).encode()).hexdigest()
        return {"kind": BUILTIN, "corpus": self.corpus, "part": part, "sha256": digest}


def _reference_topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions ship Python without its reference text
        raise DataError(
            "this Python comes without its reference text (pydoc_data)",
            where=f"data.source = {BUILTIN!r}",
            hint="use a text file instead, or a Python that has it",
        ) from None
    return dict(topics)


def _split_topics(topics: dict[str, str]) -> dict[Part, list[str]]:
    largest_first = sorted(topics, key=lambda name: (-len(topics[name]), name))
    paragraphs = {name: re.split(r"\n[ \t]*\n", topics[name].strip()) for name in largest_first}
    owner: dict[str, str] = {}
    shared: set[str] = set()
    texts: dict[str, str] = {}
    for name in largest_first:
        kept = []
        for paragraph in paragraphs[name]:
            key = " ".join(paragraph.split())
            first = owner.setdefault(key, name) if len(key) >= _SHARED_PARAGRAPH_CHARS else name
            if first == name:
                kept.append(paragraph)
            else:
                shared.update((first, name))
        texts[name] = "\n\n".join(kept) + "\n"

    total = sum(map(len, texts.values()))
    missing: dict[Part, float] = {
        "train": (1 - VALIDATION_FRACTION - EVALUATION_FRACTION) * total,
        "validation": VALIDATION_FRACTION * total,
        "evaluation": EVALUATION_FRACTION * total,
    }
    parts: dict[Part, list[str]] = {part: [] for part in PARTS}
    for name in sorted(texts, key=lambda name: (name not in shared, -len(texts[name]), name)):
        part = "train" if name in shared else max(PARTS, key=lambda part: missing[part])
        parts[part].append(texts[name])
        missing[part] -= len(texts[name])
    return parts
