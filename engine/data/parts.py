"""What every source of text answers, and how one text is told apart into parts.

Every source answers the same three questions. *What is your text for this part?* A part is ``train``
(what a method learns from), ``validation`` (what it is stopped by) or ``evaluation`` (what is
reported); within one source the first two never share a document, and a source that can afford it
keeps the third apart as well. *Which corpus is it?* so that a report can warn when a model is judged on
the corpus it was calibrated on. *What exactly was read?* as an identity that goes into cache keys and
checkpoints.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Literal, Protocol

Part = Literal["train", "validation", "evaluation"]
PARTS: tuple[Part, ...] = ("train", "validation", "evaluation")

VALIDATION_FRACTION = 0.10
EVALUATION_FRACTION = 0.15


class TextSource(Protocol):
    """Text in parts."""

    corpus: str
    """Name of the corpus: equal for two configurations that draw on the same one."""
    streams: bool
    """True when reading further costs network traffic and the source shuffles by itself."""

    def documents(self, part: Part, seed: int = 0) -> Iterator[str]:
        """The part's documents; ``seed`` decides the order where the source is too large to shuffle."""
        ...

    def skipped(self) -> list[str]:
        """What is to be told of rows without text among those that were read for the last
        :meth:`documents`: a sentence, or none.

        Raises:
            DataError: when most rows were such.
        """
        ...

    def identity(self, part: Part) -> dict[str, str]:
        """What is read for ``part``: equal identities mean equal text."""
        ...


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
