"""Conversations from files or the hub, in the same parts as text: trained on, validated by, reported.

A part that the source has files or a split of is just those; any other is held out of what is trained on,
and the question decides which conversations these are, as a document of a stream decides it by what it says
(:func:`~engine.data.parts.held_out_bucket`): a tenth validates, a tenth is reported, and no question is in
two parts, however often and with whatever answers it occurs.
"""

from __future__ import annotations

import functools
import os
import random
from collections.abc import Collection, Iterator
from typing import Any, Protocol

import msgspec

from engine.config.corpora import HubSource, hub_name, is_hub_id, is_path, local_name, local_path
from engine.config.data import DataConfig
from engine.config.instructions import READABLE
from engine.data.conversations import Conversation, Judged, question
from engine.data.hub import HubText, hub_rows, hub_source
from engine.data.local import SPLIT_NAMES, LocalText, whole_rows
from engine.data.parts import Part, held_out_bucket
from engine.errors import DataError

_READING = "1"
"""Raised when the same rows give other conversations."""
_HELD_OUT: dict[Part, range] = {"validation": range(10), "evaluation": range(10, 20)}
_EVERYTHING = range(100)
_SHUFFLE_CHARS = 64 << 20
_HINT = "check instructions.source"
_OFFLINE = "check name, subset, split and network; offline, instructions.source may name a file"


class _Rows(Protocol):
    """Rows of a place, by part."""

    corpus: str
    streams: bool

    def own_parts(self) -> Collection[Part]:
        """Parts beside the training that the place has files or a split of."""
        ...

    def rows(self, part: Part, seed: int) -> Iterator[tuple[str, Any]]:
        """Where each row is, and what it holds."""
        ...

    def identity(self, part: Part) -> dict[str, str]:
        """What is read for a part; no server is asked, so that an offline run finds what it read before."""
        ...


class Instructions:
    """The conversations that a configuration names."""

    def __init__(self, data: DataConfig) -> None:
        self._place = _opened(data)
        self.corpus = self._place.corpus
        self.streams = self._place.streams
        """Whether reading further costs network traffic."""
        self._judged = Judged(uniform=self.streams)

    def conversations(self, part: Part, seed: int = 0) -> Iterator[Conversation]:
        """The part's conversations in an order that the seed decides: of a long file the first ones are
        shuffled, a stream shuffles itself."""
        found = self._of_part(part, seed)
        if self.streams:
            yield from found
            return
        held: list[Conversation] = []
        characters = 0
        for conversation in found:
            held.append(conversation)
            characters += sum(len(turn.content) for turn in conversation)
            if characters > _SHUFFLE_CHARS:
                break
        random.Random(f"instructions/{seed}/{part}").shuffle(held)
        yield from held
        yield from found

    def _of_part(self, part: Part, seed: int) -> Iterator[Conversation]:
        own = self._place.own_parts()
        place, buckets = route(part, own)
        self._judged = judged = Judged(uniform=self.streams)
        for where, row in self._place.rows(place, seed):
            conversation = judged.conversation(row, where)
            if conversation is None:
                continue
            if len(buckets) == len(_EVERYTHING) or held_out_bucket(question(conversation)) in buckets:
                yield conversation
        judged.refuse_most()
        if not judged.read:
            raise DataError("there is no row in it", where=self.corpus, hint=_HINT)

    def skipped(self) -> list[str]:
        """What is to be told of rows that are no conversations: a sentence, or none.

        Raises:
            DataError: when most rows were such.
        """
        return self._judged.words(self.corpus)

    def identity(self, part: Part) -> dict[str, str]:
        """What is read for ``part``: equal identities mean equal conversations."""
        return {**self._place.identity(part), "part": part, "conversations": _READING}


def route(part: Part, own: Collection[Part]) -> tuple[Part, Collection[int]]:
    """Where a part is read, and which hundredths of what is read there belong to it; ``own`` are parts that
    the source has apart from the training's."""
    if part != "train":
        return (part, _EVERYTHING) if part in own else ("train", _HELD_OUT[part])
    kept = set(_EVERYTHING)
    for other, held_out in _HELD_OUT.items():
        if other not in own:
            kept -= set(held_out)
    return "train", kept


def _opened(data: DataConfig) -> _Rows:
    name = data.source.strip()
    path = local_path(name)
    if name and os.path.exists(path):
        return _Local(data)
    if is_path(name):
        raise DataError("no such file or folder", where=name, hint=_HINT)
    if is_hub_id(name):
        return _Hub(data)
    raise DataError(
        "is neither a file nor a hub id", where=f"instructions.source = {name!r}", hint=f"name {READABLE}"
    )


class _Local:
    """A file, or the files of a folder."""

    streams = False

    def __init__(self, data: DataConfig) -> None:
        path = local_path(data.source.strip())
        self.corpus = local_name(path)
        self._text = LocalText(path, column=None, split=data.split, corpus=self.corpus)
        self._split = data.split

    def own_parts(self) -> Collection[Part]:
        if self._split or not self._text.path.is_dir():
            return ()
        return [part for part in _HELD_OUT if self._text.named(SPLIT_NAMES[part])]

    def _files(self, part: Part) -> list[Any]:
        if not self._text.path.is_dir():
            return self._text.files
        words = SPLIT_NAMES[part]
        if self._split:
            words = next((known for known in SPLIT_NAMES.values() if self._split in known), (self._split,))
        found = self._text.named(words)
        if self._split and not found:
            raise DataError(
                f"the folder has no files of split {self._split!r}",
                where=str(self._text.path),
                hint="the name of a file or sub-folder starts with its split",
            )
        others = {file.path for other in self.own_parts() for file in self._text.named(SPLIT_NAMES[other])}
        return found or [file for file in self._text.files if file.path not in others]

    def rows(self, part: Part, seed: int) -> Iterator[tuple[str, Any]]:
        for file in self._files(part):
            yield from whole_rows(file)

    def identity(self, part: Part) -> dict[str, str]:
        return {
            "kind": "local",
            "path": str(self._text.path.resolve()),
            "files": self._text.fingerprint(self._files(route(part, self.own_parts())[0])),
            "apart": ", ".join(self.own_parts()),
        }


class _Hub:
    """A data set of the hub, streamed."""

    streams = True

    def __init__(self, data: DataConfig) -> None:
        self._source: HubSource = hub_source(data)
        self.corpus = hub_name(data.source.strip())

    @functools.cached_property
    def _splits(self) -> dict[Part, str]:
        if self._source.split:
            return {"train": self._source.split}
        found = HubText(self._source, self.corpus, _OFFLINE).discover_splits()
        splits: dict[Part, str] = {"train": found["train"]}
        for part in _HELD_OUT:
            # One split for both would choose the best state by what is reported.
            if part in found and found[part] not in splits.values():
                splits[part] = found[part]
        return splits

    def own_parts(self) -> Collection[Part]:
        return [part for part in _HELD_OUT if part in self._splits]

    def rows(self, part: Part, seed: int) -> Iterator[tuple[str, Any]]:
        source = msgspec.structs.replace(self._source, split=self._splits[part])
        for row in hub_rows(source, seed=seed, hint=_OFFLINE):
            yield source.where, row

    def identity(self, part: Part) -> dict[str, str]:
        source = self._source
        return {
            "kind": "hub",
            "repo": source.repo,
            "subset": source.subset or "",
            "split": source.split or "",
            "revision": source.revision or "main",
        }
