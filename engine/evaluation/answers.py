"""Conversations as tokens of which each is known to belong to an answer or not."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import numpy

from engine.config.instructions import Template
from engine.data.conversations import Conversation
from engine.data.encoding import Encoder
from engine.data.packing import Sample
from engine.errors import PreflightError
from engine.evaluation.templates import TOGETHER, Rendered, renderer


class Written:
    """Conversations as a model reads them, and how many could not be written."""

    def __init__(self, encoder: Encoder, template: Template, corpus: str) -> None:
        self._encoder, self._corpus = encoder, corpus
        self._render = renderer(template, encoder.tokenizer)
        self.read = 0
        self.refused = 0
        self._first = ""

    def samples(self, conversations: Iterable[Conversation]) -> Iterator[Sample]:
        """Their tokens, one after the other.

        Raises:
            PreflightError: where the template cannot write most of them.
            DataError: for a token that the model does not know.
        """
        remaining = iter(conversations)
        while batch := list(itertools.islice(remaining, TOGETHER)):
            found = self._render(batch)
            self.read += len(found)
            texts = [one for one in found if isinstance(one, Rendered)]
            problems = [one for one in found if isinstance(one, str)]
            self.refused += len(problems)
            self._first = self._first or next(iter(problems), "")
            # Before any is learned: whoever has enough asks for no more.
            self._refuse_most()
            yield from self._tokens(texts)

    def _refuse_most(self) -> None:
        if self.refused * 2 > self.read:
            raise PreflightError(
                f"writes {self.read - self.refused:,} of {self.read:,} conversations so that the answers can "
                f"be told; the first that it does not: {self._first}",
                where="the model's chat template",
                hint="instructions.template=alpaca or chatml writes them otherwise",
            )

    def words(self) -> list[str]:
        """What is told of conversations that could not be written: one line, or none."""
        if not self.refused:
            return []
        return [
            f"{self._corpus}: the chat template could not write {self.refused:,} of {self.read:,} "
            f"conversations, which were left out; the first: {self._first}"
        ]

    def _tokens(self, texts: list[Rendered]) -> Iterator[Sample]:
        encoder = self._encoder
        whole = encoder.with_places([one.text for one in texts], [one.answers for one in texts], self._corpus)
        for ids, answers in whole:
            begin = () if encoder.begins(ids) else encoder.begin
            tokens = numpy.concatenate([numpy.array(begin, dtype=numpy.int64), ids])
            learned = numpy.concatenate([numpy.zeros(len(begin), dtype=bool), answers])
            yield Sample(encoder.known(tokens, self._corpus), learned)
