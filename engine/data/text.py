"""Where text comes from: one interface over the built-in corpus, local files and hub data sets.

Every source answers the same three questions. *What is your text for this part?* A part is ``train``
(what a method learns from), ``validation`` (what it is stopped by) or ``evaluation`` (what is
reported); within one source the first two never share a document, and a source that can afford it
keeps the third apart as well. *Which corpus is it?* so that a report can warn when a model is judged on
the corpus it was calibrated on. *What exactly was read?* as an identity that goes into cache keys and
checkpoints.

Hub sources stream: nothing is downloaded beyond what is read. Local and built-in sources never touch
the network. This module imports neither torch nor datasets: they load when needed.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from typing import Literal, Protocol

from engine.config.data import DataConfig
from engine.errors import DataError

Part = Literal["train", "validation", "evaluation"]
PARTS: tuple[Part, ...] = ("train", "validation", "evaluation")

VALIDATION_FRACTION = 0.10
EVALUATION_FRACTION = 0.15

# Paragraphs shorter than this (headings, one-line examples) may legitimately appear in two topics.
_SHARED_PARAGRAPH_CHARS = 60
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")
# Local copies of well-known corpora, recognised by how their files are usually called.
_KNOWN_FILES = (
    (re.compile(r"wiki(text)?[-_. ]?2|wiki\.(train|valid|validation|test)\b"), "wikitext2"),
    (re.compile(r"(^|[-_.])c4([-_.]|$)"), "c4"),
    (re.compile(r"slim_?-?pajama"), "slimpajama"),
    (re.compile(r"red_?-?pajama"), "redpajama"),
    (re.compile(r"fineweb[-_]?edu"), "fineweb-edu"),
)


class TextSource(Protocol):
    """Text in parts."""

    corpus: str
    """Name of the corpus: equal for two configurations that draw on the same one."""
    streams: bool
    """True when reading further costs network traffic and the source shuffles by itself."""

    def documents(self, part: Part, seed: int = 0) -> Iterator[str]:
        """The part's documents; ``seed`` decides the order where the source is too large to shuffle."""
        ...

    def identity(self, part: Part) -> dict[str, str]:
        """What is read for ``part``: equal identities mean equal text."""
        ...


def open_source(data: DataConfig) -> TextSource:
    """The source that ``data.source`` names: ``builtin``, a shortcut, a path, or a hub id."""
    from engine.data.hub import SHORTCUTS, HubText, hub_source
    from engine.data.local import SUFFIXES, LocalText

    name = data.source.strip()
    if name == "builtin":
        return BuiltinText()
    if name in SHORTCUTS:
        return HubText(hub_source(data), corpus=name)
    path = _path(name)
    if name and os.path.exists(path):
        return LocalText(path, column=data.column, split=data.split, corpus=_local_corpus(path))
    if name.startswith(("/", ".", "~")) or path.name.endswith(SUFFIXES):
        raise DataError("no such file or folder", where=name, hint="check data.source")
    if _HUB_ID.match(name):
        return HubText(hub_source(data), corpus=_hub_corpus(name))
    choices = ", ".join(["builtin", *SHORTCUTS])
    raise DataError(
        "is neither a file, nor a hub id (owner/name), nor a known name",
        where=f"data.source = {name!r}",
        hint=f"known names: {choices}",
    )


def documents(data: DataConfig, part: Part, seed: int = 0) -> Iterator[str]:
    """The documents of one part of the configured text, in the source's order."""
    return open_source(data).documents(part, seed)


def corpus_name(data: DataConfig) -> str:
    """Name of the corpus behind a configuration; the same corpus from two places has the same name.

    Nothing is opened: a report names the text long after it was read, whether or not it is still there.
    """
    name = data.source.strip()
    if name == "builtin" or name in _shortcuts():
        return name
    path = _path(name)
    if os.path.exists(path) or not _HUB_ID.match(name):
        return _local_corpus(path)
    return _hub_corpus(name)


def evaluation_text(rows: Iterable[str]) -> str:
    """Rows as one evaluation text.

    A blank line between rows is the convention under which WikiText-2 perplexities are published, so the
    hub's rows give the usual tokens; a single local file is its own text, unchanged.
    """
    return "\n\n".join(rows)


def held_out_bucket(text: str) -> int:
    """A number in 0..99 that depends on nothing but the text.

    A streaming source has no tail that could be held out and may be shuffled differently each time; what
    its documents *say* decides which part they belong to, so parts stay disjoint whatever the order, even
    when a document occurs twice.
    """
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") % 100


def _path(name: str) -> Path:
    # pathlib raises on the home of a user that there is not.
    return Path(os.path.expanduser(name))


def _shortcuts() -> Container[str]:
    from engine.data.hub import SHORTCUTS

    return SHORTCUTS


def _local_corpus(path: Path) -> str:
    resolved = Path(os.path.realpath(path))
    for component in (resolved.name.lower(), resolved.parent.name.lower()):
        for pattern, corpus in _KNOWN_FILES:
            if pattern.search(component):
                return corpus
    return str(resolved)


def _hub_corpus(repo: str) -> str:
    from engine.data.hub import SHORTCUTS

    for shortcut, source in SHORTCUTS.items():
        if source.repo.lower() == repo.lower():
            return shortcut
    return repo


class BuiltinText:
    """English reference prose that every Python ships: the topics of its language reference.

    Many topics quote one another (``specialnames`` contains ``attribute-access`` whole), so splitting by
    topic alone would leak evaluation text into training. Each paragraph is therefore kept once, and every
    topic that shared a paragraph with another one belongs to training. The rest is dealt out, largest
    first, to whichever part is furthest from its share. The corpus differs between Python versions;
    nothing here depends on its size.
    """

    corpus = "builtin"
    streams = False

    def __init__(self) -> None:
        self._parts = _split_topics(_reference_topics())

    def documents(self, part: Part, seed: int = 0) -> Iterator[str]:
        return iter(self._parts[part])

    def identity(self, part: Part) -> dict[str, str]:
        digest = hashlib.sha256("\0".join(self._parts[part]).encode()).hexdigest()
        return {"kind": "builtin", "corpus": self.corpus, "part": part, "sha256": digest}


def _reference_topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions ship Python without its reference text
        raise DataError(
            "this Python comes without its reference text (pydoc_data)",
            where="data.source = 'builtin'",
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
