"""Where text becomes tokens: what a sequence begins with, and that the model knows every token.

Many models were always shown a begin-of-text token (BOS) first and read nothing well without it: on
12 windows of 512 tokens of WikiText-2, Gemma 3 270M has a perplexity of 66.5 where they lack it and of 26.9
where they have it. Whether a model is one of them is asked of its tokenizer: what it puts before a text,
whether by its post-processor, by ``add_bos_token`` or by the class it is of, is what every sequence begins
with, unless ``model.bos`` decides otherwise:

=========  ===============================================================================================
auto       every window, prompt and question begins with what the tokenizer begins a text with
always     the same, with the begin-of-text token also where the tokenizer begins with none
text       only a whole text does, windows are cut afterwards: how Llama perplexities were published
never      nothing does
=========  ===============================================================================================

A tokenizer can also know tokens that the embedding has no row for, because somebody added them. That harms
nobody as long as no text has them; where one does, the run ends with the token's name before anything is
computed, while a GPU would end with an assertion far from here.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy
from numpy.typing import NDArray

from engine.architecture.special_tokens import OTHER_MODEL, beyond_embedding
from engine.config.model import BeginOfText
from engine.errors import DataError, EqatError, PreflightError, first_line

Ids = NDArray[numpy.int64]

_PROBE = "a b"


class Encoder:
    """A tokenizer, as the sequences of one model need it.

    ``rows`` is how many tokens the model's embedding knows; none asks nothing about it.
    """

    def __init__(self, tokenizer: Any, *, rows: int | None = None, bos: BeginOfText = "auto") -> None:
        self.tokenizer = tokenizer
        self.rows = rows
        self.bos = bos
        self.begin = self._begin()
        """What every sequence begins with; nothing where windows are cut without regard to it."""

    @functools.cached_property
    def rules(self) -> str:
        """The tokenizer's :func:`tokenizer_hash`; that of a large vocabulary takes a second."""
        return tokenizer_hash(self.tokenizer)

    def words(self) -> str:
        """How sequences begin, for people; empty where it is nothing that anybody would expect otherwise."""
        if self.begin:
            return f"each sequence begins with {self._named(self.begin)}"
        own = _leading(self.tokenizer)
        if not own:
            return ""
        if self.bos == "text":
            return f"{self._named(own)} begins the text, not each sequence"
        return f"no sequence begins with {self._named(own)}, which the tokenizer would write"

    def separators(self) -> tuple[list[int], list[int]]:
        """Tokens put before and after a document: begin-of-text where the tokenizer itself would, and
        end-of-text where there is one.

        Raises:
            PreflightError: for one that the embedding has no row for.
        """
        before, after = _separators(self.tokenizer)
        if self.bos == "never":
            before, after = [], [token for token in after if token == self.tokenizer.eos_token_id]
        for token in (*before, *after):
            self._need(token, "documents are separated by", OTHER_MODEL)
        return before, after

    def bare(self, texts: list[str], where: str) -> list[Ids]:
        """Token ids of each text and nothing else."""
        with _tokenizing(where):
            encoded = self.tokenizer(
                texts, add_special_tokens=False, return_attention_mask=False, verbose=False
            )
            return [numpy.array(ids, dtype=numpy.int64) for ids in encoded["input_ids"]]

    def with_places(
        self, texts: Sequence[str], places: Sequence[Sequence[tuple[int, int]]], where: str
    ) -> list[tuple[Ids, NDArray[numpy.bool_]]]:
        """Token ids of each text and nothing else, and which of them begin within one of its places:
        characters, first and one behind the last."""
        if not texts:
            return []
        if not getattr(self.tokenizer, "is_fast", False):
            # It cannot tell where a token lies: what lies apart is written apart.
            return [self._piecewise(text, inside, where) for text, inside in zip(texts, places, strict=True)]
        with _tokenizing(where):
            encoded = self.tokenizer(
                list(texts),
                add_special_tokens=False,
                return_attention_mask=False,
                return_offsets_mapping=True,
                verbose=False,
            )
        found = []
        for ids, offsets, inside in zip(encoded["input_ids"], encoded["offset_mapping"], places, strict=True):
            begins = numpy.array([begin for begin, _ in offsets], dtype=numpy.int64)
            within = numpy.zeros(len(begins), dtype=bool)
            for begin, end in inside:
                within |= (begins >= begin) & (begins < end)
            found.append((numpy.array(ids, dtype=numpy.int64), within))
        return found

    def _piecewise(
        self, text: str, inside: Sequence[tuple[int, int]], where: str
    ) -> tuple[Ids, NDArray[numpy.bool_]]:
        borders = [0, *(border for place in inside for border in place), len(text)]
        pieces = [text[begin:end] for begin, end in itertools.pairwise(borders)]
        parts = self.bare(pieces, where)
        within = [numpy.full(len(ids), number % 2 == 1) for number, ids in enumerate(parts)]
        return numpy.concatenate(parts), numpy.concatenate(within)

    def text(self, text: str, where: str) -> Ids:
        """Token ids of a whole text that is cut into windows afterwards: bare where each window gets a
        beginning of its own, else as the tokenizer writes a text."""
        with _tokenizing(where):
            special = not self.begin and self.bos != "never"
            options = {} if special else {"add_special_tokens": False}
            encoded = self.tokenizer(text, return_attention_mask=False, verbose=False, **options)
            ids = numpy.array(encoded["input_ids"], dtype=numpy.int64)
        return ids[len(self.begin) :] if self.begins(ids) else ids

    def sequence(self, text: str, where: str, *, special: bool) -> list[int]:
        """Token ids of a text that is a sequence by itself, with its beginning, which stands there once even
        where the text has it already.

        ``special`` says whether the tokenizer writes its special tokens where nothing else is decided.
        """
        ids = self.text(text, where) if special else self.bare([text], where)[0]
        own = [] if self.begins(ids) else list(self.begin)
        return [*own, *self.known(ids, where).tolist()]

    def begins(self, ids: Ids) -> bool:
        """Whether token ids have the beginning already."""
        size = len(self.begin)
        return size > 0 and tuple(ids[:size].tolist()) == self.begin

    def known(self, ids: Ids, where: str) -> Ids:
        """``ids``, once the embedding is known to have a row for each.

        Raises:
            DataError: naming the first that it has none for.
        """
        if self.rows is None or not ids.size:
            return ids
        least, most = int(ids.min()), int(ids.max())
        wrong = next((token for token in (least, most) if not self._known(token)), None)
        if wrong is not None:
            raise DataError(
                f"the text holds {self._named([wrong])}, the tokenizer's token {wrong}, and the model's "
                f"embedding has only {self.rows} rows",
                where=where,
                hint=f"take it out of the text, or {OTHER_MODEL}",
            )
        return ids

    def _known(self, token: int) -> bool:
        return self.rows is None or 0 <= token < self.rows

    def _named(self, tokens: Sequence[int]) -> str:
        try:
            names = self.tokenizer.convert_ids_to_tokens(list(tokens))
        except Exception:  # a tokenizer that cannot tell: the number is named as well
            names = tokens
        return " ".join(ascii(str(name))[1:-1][:60] for name in names)

    def _begin(self) -> tuple[int, ...]:
        if self.bos in ("text", "never"):
            return ()
        found = _leading(self.tokenizer)
        if not found and self.bos == "always":
            token = self.tokenizer.bos_token_id
            if token is None:
                raise PreflightError(
                    "the tokenizer has no begin-of-text token",
                    where="model.bos",
                    hint="auto begins sequences as the tokenizer does",
                )
            found = (token,)
        for token in found:
            self._need(token, "sequences begin with", f"{OTHER_MODEL}, or set model.bos=never")
        return found

    def _need(self, token: int, what_for: str, hint: str) -> None:
        """PreflightError for a token of the tokenizer's own that the embedding has no row for."""
        if not self._known(token):
            raise beyond_embedding(what_for, self._named([token]), token, self.rows or 0, hint)


def tokenizer_hash(tokenizer: Any) -> str:
    """Hash of what decides how text becomes tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        for state in ("truncation", "padding"):  # left behind by earlier calls; no part of the rules
            rules.pop(state, None)
    else:
        rules = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    special = {"separators": _separators(tokenizer), "empty": tokenizer("")["input_ids"]}
    return hashlib.sha256(json.dumps([rules, special], sort_keys=True).encode()).hexdigest()


def _leading(tokenizer: Any) -> tuple[int, ...]:
    """What the tokenizer puts before a text of its own accord."""
    whole = list(tokenizer(_PROBE)["input_ids"])
    text = list(tokenizer(_PROBE, add_special_tokens=False)["input_ids"])
    starts = range(len(whole) - len(text) + 1) if text else ()
    start = next((start for start in starts if whole[start : start + len(text)] == text), 0)
    return tuple(whole[:start])


def _separators(tokenizer: Any) -> tuple[list[int], list[int]]:
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    own = tokenizer("")["input_ids"]
    before = [begin] if begin is not None and begin in own and begin != end else []
    after = [end] if end is not None else ([begin] if begin is not None and not before else [])
    return before, after


@contextlib.contextmanager
def _tokenizing(where: str) -> Iterator[None]:
    """What a tokenizer cannot read is told as such: one without a token for the unknown raises, panics or
    gives no number."""
    try:
        yield
    except (EqatError, MemoryError):
        raise
    except BaseException as error:
        # A panic of a library written in Rust is no Exception, but is one of its ways to refuse a text.
        if not (isinstance(error, Exception) or type(error).__name__ == "PanicException"):
            raise
        raise DataError(
            f"the tokenizer has no tokens for it: {first_line(error, 200)}",
            where=where,
            hint="use other text, or check the model's tokenizer files",
        ) from error
