"""The well-known texts: one row a corpus, wherever it comes from; and what files of text are called.

A corpus is reached by its short name, by its repository on the hub, or as a local copy, which its file's name
gives away. All three are one text: who calibrates on a copy and judges on the original is to be warned.

Rows come from the hub as :mod:`engine.data.hub` streams them; nothing here opens a file or asks a server.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import msgspec

from engine.config.data import BUILTIN, OWN, DataConfig
from engine.errors import DataError

ENDINGS = (".txt", ".jsonl", ".json", ".parquet", ".arrow")
"""Endings of files that text is read from."""
COMPRESSIONS = (".gz", ".zst")
"""Endings of compressed ones."""
JSON_SUFFIXES = (".json", *(f".json{packed}" for packed in COMPRESSIONS))
"""Endings of files that are one JSON array, or lines after all."""
SUFFIXES = (
    *ENDINGS,
    *(kind + packed for kind in (".txt", ".jsonl", ".json") for packed in COMPRESSIONS),
)
"""All endings of readable files."""

BUILTIN_CHARACTERS = 70_000
"""Length of the evaluation part of the built-in corpus."""

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")


class HubSource(msgspec.Struct, frozen=True):
    """One hub data set, and how its rows become documents."""

    repo: str
    subset: str | None = None
    column: str = "text"
    revision: str | None = None
    splits: dict[str, str] = {}
    """Part to split, where known; a part without an entry is held out of ``train``."""
    files: dict[str, float] = {}
    """Read these JSON-lines files of the repository, drawing from them in these proportions."""
    articles: bool = False
    """Rows are lines of articles: join them."""
    split: str | None = None
    """The user's explicit split, for every part."""

    @property
    def where(self) -> str:
        """For messages."""
        return self.repo + (f" ({self.subset})" if self.subset else "")


class Corpus(msgspec.Struct, frozen=True, kw_only=True):
    """A text that many models are calibrated or judged on."""

    name: str
    """What ``data.source`` calls it, and reports."""
    source: HubSource
    """Where the name leads."""
    copies: tuple[str, ...] = ()
    """Other hub ids, in lower case, under which the same text or one that contains it lies."""
    files: str
    """Pattern of what a local copy's file, or the folder it lies in, is called, in lower case."""
    test_characters: int | None = None
    """Length of the evaluation text; none where it is not known."""


CORPORA: dict[str, Corpus] = {
    corpus.name: corpus
    for corpus in (
        Corpus(
            name="wikitext2",
            source=HubSource(
                repo="Salesforce/wikitext",
                subset="wikitext-2-raw-v1",
                splits={"train": "train", "validation": "validation", "evaluation": "test"},
                articles=True,
            ),
            copies=("wikitext",),
            files=r"wiki(text)?[-_. ]?2|wiki\.(train|valid|validation|test)\b",
            test_characters=1_290_000,
        ),
        Corpus(
            name="c4",
            source=HubSource(
                repo="allenai/c4",
                subset="en",
                splits={"train": "train", "validation": "validation", "evaluation": "validation"},
            ),
            files=r"(^|[-_.])c4([-_.]|$)",
        ),
        Corpus(
            name="redpajama",
            # The repository still carries a loading script, which `datasets` no longer runs: its files are
            # read directly. They are sorted by origin, so they are drawn from in proportion to their size
            # (MB).
            source=HubSource(
                repo="togethercomputer/RedPajama-Data-1T-Sample",
                splits={"train": "train"},
                files={
                    "arxiv_sample.jsonl": 93,
                    "book_sample.jsonl": 111,
                    "c4_sample.jsonl": 866,
                    "cc_2019-30_sample.jsonl": 689,
                    "cc_2020-05_sample.jsonl": 836,
                    "cc_2021-04_sample.jsonl": 802,
                    "cc_2022-05_sample.jsonl": 737,
                    "cc_2023-06_sample.jsonl": 857,
                    "github_sample.jsonl": 222,
                    "stackexchange_sample.jsonl": 80,
                    "wikipedia_sample.jsonl": 119,
                },
            ),
            files=r"red_?-?pajama",
        ),
        Corpus(
            name="slimpajama",
            # A random sample of SlimPajama-627B in parquet; the full set is zstd-compressed JSON lines.
            source=HubSource(
                repo="DKYoon/SlimPajama-6B",
                splits={"train": "train", "validation": "validation", "evaluation": "test"},
            ),
            copies=("cerebras/slimpajama-627b",),
            files=r"slim_?-?pajama",
        ),
        Corpus(
            name="fineweb-edu",
            source=HubSource(
                repo="HuggingFaceFW/fineweb-edu", subset="sample-10BT", splits={"train": "train"}
            ),
            files=r"fineweb[-_]?edu",
        ),
    )
}
"""By name, in the order in which they are offered, and in which a file's name is compared with them. The
built-in corpus is none of them: no hub has it."""


def by_repository(repo: str) -> Corpus | None:
    """The corpus whose name leads to this hub id; none for any other."""
    return next((known for known in CORPORA.values() if known.source.repo.lower() == repo.lower()), None)


def names_a_text(source: str) -> bool:
    """Whether a text may lie behind ``source``: a known name, a path, or a hub id. Nobody is asked."""
    name = source.strip()
    if name in (BUILTIN, OWN) or name in CORPORA or is_path(name) or is_hub_id(name):
        return True
    return bool(name) and os.path.exists(local_path(name))


def no_text(source: str, field: str) -> DataError:
    """What to say of a name in ``field`` behind which no text can lie."""
    learned = field.startswith("data.")  # nothing is measured on text that the model writes itself
    hint = f"known names: {', '.join([BUILTIN, *([OWN] if learned else []), *CORPORA])}"
    if learned and ("," in source or ":" in source):
        hint += "; of several texts each has a share, like c4:0.8,wikitext2:0.2"
    problem = "is neither a file, nor a hub id (owner/name), nor a known name"
    return DataError(problem, where=f"{field} = {source!r}", hint=hint)


def corpus_name(data: DataConfig) -> str:
    """Name of the corpus behind a configuration; the same corpus from two places has the same name.

    Nothing is opened: a report names the text long after it was read, whether or not it is still there.
    """
    name = data.source.strip()
    if name in (BUILTIN, OWN) or name in CORPORA:
        return name
    path = local_path(name)
    if os.path.exists(path) or not is_hub_id(name):
        return local_name(path)
    return hub_name(name)


def origin(data: DataConfig) -> str:
    """:func:`corpus_name`, where a copy on the hub counts as what it is a copy of."""
    name = data.source.strip().lower()
    return next((known.name for known in CORPORA.values() if name in known.copies), corpus_name(data))


def evaluation_characters(data: DataConfig) -> int | None:
    """Length of the whole evaluation text of a well-known corpus; none where it is not known."""
    name = origin(data)
    if name == BUILTIN:
        return BUILTIN_CHARACTERS
    return CORPORA[name].test_characters if name in CORPORA else None


def local_name(path: Path) -> str:
    """The corpus that a local file or folder is a copy of; its own whole path where none is known."""
    resolved = Path(os.path.realpath(path))
    for component in (resolved.name.lower(), resolved.parent.name.lower()):
        for known in CORPORA.values():
            if re.search(known.files, component):
                return known.name
    return str(resolved)


def hub_name(repo: str) -> str:
    """The corpus that a hub id leads to; the id itself where none is known."""
    known = by_repository(repo)
    return repo if known is None else known.name


def local_path(name: str) -> Path:
    """``name`` as a path of this machine."""
    # pathlib raises on the home of a user that there is not.
    return Path(os.path.expanduser(name))


def is_path(name: str) -> bool:
    """Whether only a file or folder can be meant, whether or not it is there."""
    return name.startswith(("/", ".", "~")) or name.endswith((*ENDINGS, *COMPRESSIONS))


def is_hub_id(name: str) -> bool:
    """Whether it has the form ``owner/name``."""
    return _HUB_ID.match(name) is not None
