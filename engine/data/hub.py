"""Text from the Hugging Face hub, streamed: only what is read is downloaded.

What is known of the usual corpora is in :mod:`engine.config.corpora`. A stream is shuffled by the seed (its
files, then a window of rows), and documents of a data set without a validation or test split of its own are
assigned to parts by what they say.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from engine.config.corpora import CORPORA, HubSource, by_repository
from engine.config.data import BUILTIN, DataConfig
from engine.data.columns import Rows
from engine.data.parts import Part, held_out_bucket
from engine.errors import DataError, first_line
from engine.system.hub_answers import answer_of, asking_again

HINT = (
    "check name, subset, split and network; offline, data.source and evaluation.data may be "
    f"{BUILTIN} or files"
)
"""For a data set that cannot be read."""
_SHUFFLE_ROWS = 1000  # rows held while shuffling a stream: documents of 5 KB make 5 MB
_HELD_OUT = {"validation": range(10), "evaluation": range(10, 20)}
_ARTICLE = re.compile(r"^ = [^=]")  # WikiText: " = Title = " opens an article, " = = … = = " a section


def hub_source(data: DataConfig) -> HubSource:
    """The data set that a configuration names, with the configuration's own choices on top."""
    known = CORPORA.get(data.source) or by_repository(data.source)
    source = known.source if known is not None else HubSource(repo=data.source)
    if data.subset and data.subset != source.subset:
        # another subset of a known repository shares nothing with the known one but the name
        source = HubSource(repo=source.repo, subset=data.subset, articles=data.subset.startswith("wikitext"))
    return msgspec.structs.replace(
        source,
        column=data.column or source.column,
        revision=data.revision or source.revision,
        split=data.split,
    )


class HubText:
    """A hub data set as a text source."""

    streams = True

    def __init__(self, source: HubSource, corpus: str, hint: str = HINT) -> None:
        self.source = source
        self.corpus = corpus
        self._hint = hint
        self._read = Rows(source.column, uniform=True)

    def documents(self, part: Part, seed: int = 0) -> Iterator[str]:
        split, buckets = self._route(part)
        self._read = Rows(self.source.column, uniform=True)
        # evaluation has one order: the published one
        rows = self._rows(split, seed=None if part == "evaluation" or self.source.articles else seed)
        texts = _join_articles(rows) if self.source.articles else rows
        for text in texts:
            if buckets is None or held_out_bucket(text) in buckets:
                yield text
        self._read.refuse_most()

    def skipped(self) -> list[str]:
        return self._read.words(self.corpus)

    def identity(self, part: Part) -> dict[str, str]:
        source = self.source
        # The requested revision, not the commit behind it: an offline run must find its tokens again.
        return {
            "kind": "hub",
            "corpus": self.corpus,
            "repo": source.repo,
            "subset": source.subset or "",
            "split": source.split or source.splits.get(part, ""),
            "column": source.column,
            "revision": source.revision or "main",
            "part": part,
        }

    def _route(self, part: Part) -> tuple[str, range | set[int] | None]:
        """The split that holds a part, and which of its documents belong to the part."""
        source = self.source
        everything = set(range(100))
        if source.split:
            if part == "evaluation":
                return source.split, None
            held_out = _HELD_OUT["validation"]
            return source.split, held_out if part == "validation" else everything - set(held_out)
        splits = source.splits or self.discover_splits()
        if part != "train":
            return (splits[part], None) if part in splits else (splits["train"], _HELD_OUT[part])
        for other, held_out in _HELD_OUT.items():
            if other not in splits:
                everything -= set(held_out)
        return splits["train"], everything if len(everything) < 100 else None

    def discover_splits(self) -> dict[str, str]:
        """Splits of a data set that no shortcut describes."""
        from datasets import get_dataset_split_names

        source = self.source
        with self._reported():
            names = list(
                asking_again(
                    lambda: get_dataset_split_names(source.repo, source.subset, revision=source.revision)
                )
            )
        splits = {"train": "train" if "train" in names else names[0]}
        validation = next((name for name in ("validation", "valid", "val", "dev") if name in names), None)
        evaluation = "test" if "test" in names else validation
        if validation and validation != splits["train"]:
            splits["validation"] = validation
        if evaluation and evaluation != splits["train"]:
            splits["evaluation"] = evaluation
        return splits

    def _rows(self, split: str, seed: int | None) -> Iterator[str]:
        from datasets import load_dataset

        source = self.source
        if source.files:
            revision = f"@{source.revision}" if source.revision else ""
            root = f"hf://datasets/{source.repo}{revision}"

            def load(file: str) -> Any:
                return load_dataset("json", data_files=f"{root}/{file}", split="train", streaming=True)

            streams = [self._texts(functools.partial(load, file), seed) for file in source.files]
            yield from _interleave(streams, list(source.files.values()), seed or 0)
            return
        yield from self._texts(
            lambda: load_dataset(
                source.repo, source.subset, split=split, revision=source.revision, streaming=True
            ),
            seed,
        )

    def _texts(self, load: Callable[[], Any], seed: int | None) -> Iterator[str]:
        """The column of one stream; whatever goes wrong on the way is a :class:`DataError`."""
        rows_read, where = self._read, self._where
        with self._reported():
            stream = asking_again(load)
            if seed is not None:
                stream = stream.shuffle(seed=seed, buffer_size=_SHUFFLE_ROWS)
            rows = iter(stream)
        while True:
            with self._reported():
                row = next(rows, None)
            if row is None:
                return
            text = rows_read.text(row, where)
            # an empty row of an article is a blank line of it
            if text is not None and (text.strip() or self.source.articles):
                yield text

    @property
    def _where(self) -> str:
        return self.source.where

    def _reported(self) -> contextlib.AbstractContextManager[None]:
        return _reported(self._where, self._hint)


def hub_rows(
    source: HubSource,
    *,
    seed: int | None = None,
    hint: str = "check the network; offline, evaluation.tasks may name .jsonl files",
) -> Iterator[dict[str, Any]]:
    """Whole rows of ``source.split``: in their order, or in one that the seed decides."""
    from datasets import load_dataset

    def reported() -> contextlib.AbstractContextManager[None]:
        return _reported(source.where, hint)

    with reported():
        stream = asking_again(
            lambda: load_dataset(
                source.repo, source.subset, split=source.split, revision=source.revision, streaming=True
            )
        )
        if seed is not None:
            stream = stream.shuffle(seed=seed, buffer_size=_SHUFFLE_ROWS)
        rows = iter(stream)
    while True:
        with reported():
            row = next(rows, None)
        if row is None:
            return
        yield row


@contextlib.contextmanager
def _reported(where: str, hint: str) -> Iterator[None]:
    """The hub libraries raise a score of unrelated types; to the user all mean: no text from there."""
    try:
        yield
    except Exception as error:
        answer = answer_of(error)
        said, remedy = answer.words() if answer is not None else ("", "")
        if said:
            raise DataError(said, where=where, hint=remedy) from error
        reason = first_line(error)
        raise DataError(f"cannot be read from the hub: {reason}", where=where, hint=hint) from error


def _join_articles(rows: Iterator[str]) -> Iterator[str]:
    """WikiText's rows are lines; a training document is an article.

    Joined by blank lines again, the articles are exactly the rows joined by blank lines.
    """
    article: list[str] = []
    for row in rows:
        if _ARTICLE.match(row) and any(line.strip() for line in article):
            yield "\n\n".join(article)
            article = []
        article.append(row)
    if article:
        yield "\n\n".join(article)


def _interleave(streams: list[Iterator[str]], weights: list[float], seed: int) -> Iterator[str]:
    """Rows of several streams, drawn in proportion to the weights until all are exhausted."""
    draw = random.Random(seed)
    alive = dict(enumerate(weights))
    while alive:
        index = draw.choices(list(alive), weights=list(alive.values()))[0]
        for text in itertools.islice(streams[index], 1):
            yield text
            break
        else:
            del alive[index]
