"""From text to windows of tokens, reproducibly, and only once.

*Training and validation* windows are drawn: documents are tokenized whole, put in an order that the seed
decides with the tokenizer's own end- and begin-of-text tokens between them, and the resulting stream is
cut into windows of equal length, of which the seed picks as many as asked for. A text shorter than the
windows need is read up to ``MAX_PASSES`` times, each time in another order and cut at another place: the
same tokens then appear in other contexts, which is worth less than more text (a warning says so) but
more than a refusal. Beyond that the text is too little.

*Evaluation* windows are never drawn: they are the consecutive, non-overlapping windows from the start of
the text, tokenized in one piece as published perplexities are.

Where sequences begin with a begin-of-text token (:mod:`engine.data.encoding`), every window of ``T`` tokens
is that token and ``T - 1`` tokens of the text. In such a window each of those is predicted from what
precedes it, the first one from the begin-of-text token alone, and each counts, as in lm-eval's rolling
likelihood: of ``N`` windows ``N * (T - 1)`` tokens are predicted either way, and with the token none of the
text is left out.

Reading stops as soon as there is enough, so a streamed source costs what it gives. The result is cached
under everything that decides it; a cached file carries a checksum, is published by a rename, and a broken
one is replaced by reading the text again.
"""

from __future__ import annotations

import hashlib
import json
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from engine.config.data import DataConfig
from engine.data.encoding import Encoder
from engine.data.parts import Part, TextSource, evaluation_text
from engine.data.text import open_source
from engine.errors import DataError
from engine.system.user_cache import publish, token_cache

MAX_PASSES = 4
"""A text is drawn from at most this many times over."""

_SCHEME = 1  # raise it when the same inputs would give other windows: old cache entries then die out
_PIECE_CHARS_PER_TOKEN = 8  # two windows of English
_SHORTEST_PIECE_CHARS = 1 << 12
_LOCAL_SURPLUS = 1 << 20
"""Most tokens of a local text beyond those that are needed. They make a better sample where few are needed;
tens of millions, which take a minute, are one by themselves."""
_CHARS_PER_TOKEN = 5
_SMALLEST_BATCH_CHARS = 1 << 16
_LARGEST_BATCH_CHARS = 1 << 22  # the tokenizer needs some 40 bytes a character meanwhile
_SHUFFLE_CHARS = 64 << 20
_LARGEST_EVALUATION_CHARS = 1 << 30
_UNKNOWN = "<unk>"
_UNKNOWN_SHARE = 0.001
"""Of the words of a text, from which on it counts as one whose rare words were taken out: of WikiText-2's
tokenised form they are 25 in a thousand, of its raw one none."""

Warn = Callable[[str, str], None]
"""Receives a short code and a message."""
Said = list[tuple[str, str]]
"""Codes and messages about a text."""


def token_windows(
    encoder: Encoder,
    data: DataConfig,
    part: Part,
    *,
    sequences: int,
    length: int,
    seed: int = 0,
    cache_dir: Path | None = None,
    warn: Warn | None = None,
) -> Tensor:
    """Windows of tokens, int64 ``[sequences, length]`` on the CPU.

    For ``evaluation``, ``sequences`` is the largest number of windows (0: the whole text) and the seed has
    no effect. ``cache_dir`` none means the user's cache (``EQAT_CACHE_DIR`` overrides it). What is said to
    ``warn`` about the text is said again where the windows come from the cache.

    Raises:
        DataError: when the text cannot be read, is too short, or holds tokens that the model does not know.
        PreflightError: when the tokenizer needs such a token for itself.
    """
    if length < 2 or sequences < 0 or (sequences == 0 and part != "evaluation"):
        raise ValueError(f"{sequences} windows of {length} tokens of {part} text")
    if length <= len(encoder.begin):
        raise DataError(f"a window of {length} tokens has no room for text", where="sequence_length")
    warn = warn or _warn
    source = open_source(data)
    key = _cache_key(encoder, source, part, sequences, length, seed)
    path = (cache_dir or token_cache()) / f"{key}.safetensors"
    found = load_windows(path, length, warn)
    if found is None:
        said: Said = []
        if part == "evaluation":
            windows = _consecutive_windows(encoder, source, sequences, length)
        else:
            windows = _drawn_windows(encoder, source, part, sequences, length, seed, said)
        encoder.known(windows.numpy(), source.corpus)
        said += [("text-rows", line) for line in source.skipped()]
        store_windows(path, windows, source.identity(part), said, warn)
    else:
        windows, said = found
        encoder.known(windows.numpy(), source.corpus)
    for code, message in said:
        warn(code, message)
    return windows.to(torch.int64)


def mixed_up(windows: Sequence[Tensor], *, seed: int, part: Part) -> Tensor:
    """The windows of several texts in an order that the seed decides; those of one text as they are."""
    if len(windows) == 1:
        return windows[0]
    together = torch.cat(list(windows))
    order = list(range(len(together)))
    random.Random(f"mixture/{seed}/{part}").shuffle(order)
    return together[order]


# --- drawing ----------------------------------------------------------------------------------------


def _drawn_windows(
    encoder: Encoder, source: TextSource, part: Part, sequences: int, length: int, seed: int, said: Said
) -> Tensor:
    step = length - len(encoder.begin)  # tokens of the text in a window
    needed = sequences * step
    # What is streamed costs traffic; what is local costs tokenizing, and more of it is a better sample.
    enough = needed + length + (0 if source.streams else min(needed, _LOCAL_SURPLUS))
    words = _Words()
    documents = list(_tokenized(encoder, source, part, enough, length, seed, words))
    available = sum(map(len, documents))
    # Four times over, but never less than one window of it.
    missing = max(-(-needed // MAX_PASSES), step) - available
    if missing > 0:
        raise DataError(
            f"too little {part} text: {available:,} tokens, but {sequences} sequences of {length} need "
            f"{needed:,} (a text is read at most {MAX_PASSES} times): {missing:,} tokens are missing",
            where=source.corpus,
            hint="use more text, fewer sequences or shorter ones, or a smaller share of it in data.mix",
        )
    draw = random.Random(f"order/{seed}/{part}")
    passes: list[Tensor] = []
    missing = sequences
    while missing > 0:
        draw.shuffle(documents)
        stream = torch.cat(documents)
        whole = len(stream) // step
        # cut somewhere else each time, without losing a window that is needed
        slack = len(stream) - min(whole, missing) * step
        start = draw.randrange(min(slack, step - 1) + 1)
        count = (len(stream) - start) // step
        chosen = draw.sample(range(count), min(count, missing))
        passes.append(_begun(encoder, stream, start + step * torch.tensor(chosen), step))
        missing -= len(chosen)
    if len(passes) > 1:
        repeated = (
            f"{source.corpus}: {available:,} tokens of {part} text were read {len(passes)} times over for "
            f"{sequences} sequences of {length}; more text would serve better"
        )
        said.append(("text-repeated", repeated))
    said += words.said(source.corpus)
    return torch.cat(passes).to(torch.int32)


def _begun(encoder: Encoder, stream: Tensor, starts: Tensor, step: int) -> Tensor:
    """Windows of ``step`` tokens of the stream from each of ``starts``, behind what a sequence begins with.

    Where a window begins with a document, the stream has the beginning already: such a window lies that much
    further in the text, and none begins twice.
    """
    begin = torch.tensor(encoder.begin, dtype=stream.dtype)
    size = len(begin)
    # The last window may begin so: what it lacks then is taken from the stream's own start.
    around = torch.cat([stream, stream[:size]])
    if size:
        doubled = (around[starts[:, None] + torch.arange(size)] == begin).all(1)
        starts = starts + size * doubled
    windows = around[starts[:, None] + torch.arange(step)]
    return torch.cat([begin.expand(len(windows), size), windows], 1)


class _Words:
    """How many of a text's words were taken out of it, as far as it was read."""

    def __init__(self) -> None:
        self.all = self.unknown = 0

    def count(self, texts: Sequence[str]) -> None:
        for text in texts:
            self.all += text.count(" ") + text.count("\n")
            self.unknown += text.count(_UNKNOWN)

    def said(self, corpus: str) -> Said:
        """A model learns to expect the mark where its own words were: full QAT of SmolLM2 at 3 bits reads
        WikiText-2's test text with 27.7 from the tokenised training text, with 25.8 from the raw one."""
        if self.unknown <= _UNKNOWN_SHARE * self.all:
            return []
        message = (
            f"{corpus}: rare words were taken out of this text and replaced by {_UNKNOWN}; as it was written "
            "it serves better (of WikiText-2 that is wikitext-2-raw-v1)"
        )
        return [("text-unknown", message)]


def _tokenized(
    encoder: Encoder, source: TextSource, part: Part, enough: int, length: int, seed: int, words: _Words
) -> Iterator[Tensor]:
    """Documents as token tensors with separators, in random order, until there are enough tokens.

    Of a streamed document at most one window is kept, at a random place: otherwise a few books would be
    the whole sample.
    """
    before, after = (numpy.array(ids, dtype=numpy.int64) for ids in encoder.separators())
    draw = random.Random(f"text/{seed}/{part}")
    total = 0
    piece_chars = max(_PIECE_CHARS_PER_TOKEN * length, _SHORTEST_PIECE_CHARS)
    pieces = _pieces(source, part, seed, draw, piece_chars)
    while batch := _batch(pieces, enough - total):
        words.count(batch)
        for ids in encoder.bare(batch, source.corpus):
            if source.streams and len(ids) > length:
                start = draw.randrange(len(ids) - length + 1)
                ids = ids[start : start + length]
            # One that says where it begins needs no second word of it.
            own = before if not encoder.begins(ids) else before[:0]
            tokens = torch.from_numpy(numpy.concatenate([own, ids, after]))
            total += len(tokens)
            yield tokens
            if total >= enough:
                return


def _pieces(
    source: TextSource, part: Part, seed: int, draw: random.Random, piece_chars: int
) -> Iterator[str]:
    """Documents, cut where they are long, in random order.

    A streamed source shuffles itself. Of a local one the first 64 MiB are shuffled as a whole; a short
    sample of one long file thus comes from all over the file, at the price of tokenizing only the sample.
    """
    documents = source.documents(part, seed)
    if source.streams:
        yield from documents
        return
    pieces: list[str] = []
    characters = 0
    for text in documents:
        pieces.extend(_cut(text, piece_chars))
        characters += len(text)
        if characters > _SHUFFLE_CHARS:
            break
    draw.shuffle(pieces)
    yield from pieces
    for text in documents:
        yield from _cut(text, piece_chars)


def _cut(text: str, piece_chars: int) -> Iterator[str]:
    """Pieces of whole lines where lines are short enough."""
    start = 0
    while len(text) - start > piece_chars:
        end = text.rfind("\n", start, start + piece_chars) + 1 or start + piece_chars
        yield text[start:end]
        start = end
    yield text[start:]


def _batch(texts: Iterator[str], tokens: int) -> list[str]:
    """The next texts, about as many as ``tokens`` more tokens take. The tokenizer spreads a list over the
    cores, so a long list is quick; what is tokenized does not depend on how it is cut into lists."""
    characters = min(max(_CHARS_PER_TOKEN * tokens, _SMALLEST_BATCH_CHARS), _LARGEST_BATCH_CHARS)
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        characters -= len(text)
        if characters <= 0:
            break
    return batch


# --- evaluation -------------------------------------------------------------------------------------


def _consecutive_windows(encoder: Encoder, source: TextSource, sequences: int, length: int) -> Tensor:
    """Windows from the start of the text. The text is tokenized in one piece: where it is cut changes
    the tokens around the cut, so it is read far enough that the cut lies behind the last window."""
    documents = source.documents("evaluation")
    read: list[str] = []
    step = length - len(encoder.begin)
    needed = sequences * step
    characters, wanted = 0, (6 * needed + 4096) if sequences else _LARGEST_EVALUATION_CHARS
    while True:
        exhausted = True
        for text in documents:
            read.append(text)
            characters += len(text)
            if characters >= wanted:
                exhausted = False
                break
        if not exhausted and not sequences:
            raise DataError(
                "the evaluation text is too long to be used whole",
                where=source.corpus,
                hint="set evaluation.windows",
            )
        text = evaluation_text(read)
        if sequences:  # one long document: no more of it than can be needed
            text = text[:wanted]
            exhausted = exhausted and characters <= wanted
        ids = encoder.text(text, source.corpus)
        if exhausted or len(ids) >= needed + 64:
            break
        wanted *= 2
    count = len(ids) // step
    if sequences:
        count = min(count, sequences)
    if count == 0:
        raise DataError(
            f"too little evaluation text: {len(ids):,} tokens, but one window needs {step:,}",
            where=source.corpus,
            hint="use more text or a shorter evaluation.sequence_length",
        )
    windows = torch.from_numpy(ids[: count * step]).view(count, step)
    begin = torch.tensor(encoder.begin, dtype=torch.int64).expand(count, -1)
    return torch.cat([begin, windows], 1).to(torch.int32)


# --- cache ------------------------------------------------------------------------------------------


def _cache_key(
    encoder: Encoder, source: TextSource, part: Part, sequences: int, length: int, seed: int
) -> str:
    decides: dict[str, Any] = {
        "scheme": _SCHEME,
        "tokenizer": encoder.rules,
        "text": source.identity(part),
        "sequences": sequences,
        "length": length,
        "seed": 0 if part == "evaluation" else seed,
    }
    # What changes nothing about a window is not named, so entries from before it was known stay good.
    if encoder.begin or encoder.bos == "never":
        decides["begin"] = encoder.begin
    if part != "evaluation" and not source.streams and sequences * length > _LOCAL_SURPLUS:
        decides["surplus"] = _LOCAL_SURPLUS
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:40]


def load_windows(path: Path, length: int, warn: Warn) -> tuple[Tensor, Said] | None:
    """The cached windows and what was said about their text; none if there are none, or if they are not what
    was stored."""
    from safetensors import safe_open

    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            windows: Tensor = file.get_tensor("windows")
            stored = json.loads((file.metadata() or {})["eqat"])
        said = [(str(code), str(message)) for code, message in stored.get("said", [])]
        if windows.dim() == 2 and windows.shape[1] == length and stored["sha256"] == _checksum(windows):
            return windows, said
        reason = "its checksum is wrong"
    except Exception as error:  # a damaged header raises whatever the damage suggests
        reason = str(error) or type(error).__name__
    warn("token-cache", f"the cached tokens in {path} are damaged ({reason}); the text is tokenized again")
    return None


def store_windows(path: Path, windows: Tensor, identity: dict[str, str], said: Said, warn: Warn) -> None:
    """Publish atomically: a reader, or another run writing the same entry, sees all of a file or none.

    A cache that cannot be written costs the next run some time, not this one its result.
    """
    try:
        publish(path, windows_file(windows, identity, said))
    except OSError as error:
        warn("token-cache", f"the tokens could not be cached in {path.parent}: {error}")


def windows_file(windows: Tensor, identity: dict[str, str], said: Said) -> bytes:
    """What :func:`load_windows` reads: int32 windows, what text they are of, and what was said about it."""
    from safetensors.torch import save

    # one entry only: safetensors writes several in random order, and equal tokens make equal files
    about: dict[str, Any] = {"sha256": _checksum(windows), "text": identity}
    if said:
        about["said"] = said
    return save({"windows": windows.contiguous()}, {"eqat": json.dumps(about, sort_keys=True)})


def _checksum(windows: Tensor) -> str:
    return hashlib.sha256(windows.contiguous().numpy().tobytes()).hexdigest()


def _warn(code: str, message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=3)
