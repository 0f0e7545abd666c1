"""The text that methods learn from: one source, or a mixture of several with shares.

A part of a mixture is written on one line, so that it is typed, stored and shown alike::

    SOURCE[?subset=…&split=…&column=…&revision=…]:SHARE          c4:0.8    en.jsonl?column=content:20

Shares are proportions and need not add up to one. ``%3F``, ``%26`` and ``%25`` stand for ``?``, ``&`` and
``%`` in the value of an option; a source is taken as it is.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NamedTuple
from urllib.parse import unquote

import msgspec

from engine.config import checks
from engine.config.corpora import by_repository, corpus_name, local_path, origin
from engine.config.data import BUILTIN, NOT_READ, OPTIONS, OTHER_TEXT, DataConfig
from engine.config.lists import members
from engine.errors import UsageError

_SHARE = re.compile(r"\s*([0-9]{1,9}(?:\.[0-9]{0,9})?|\.[0-9]{1,9})\s*")
_OPTIONS = re.compile(r"[A-Za-z_]+=[^&]*(&[A-Za-z_]+=[^&]*)*")
_FORM = "SOURCE:SHARE, like c4:0.8"
OWN_WORDS = "the model's own text"
"""What ``self`` is for people."""


class CalibrationConfig(DataConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the text comes from that methods learn from."""

    mix: tuple[str, ...] | None = None
    """Sequences come from several sources in these shares, like c4:0.8,wikitext2:0.2; what belongs to one is
    written with it, like c4?subset=de:0.8."""

    def check(self, name: str) -> None:
        DataConfig.check(self, name)
        if self.mix is None:
            return
        _check_mixture(f"{name}.mix", self.mix)
        if self.source != BUILTIN:
            raise UsageError(
                f"names several texts, and {name}.source another: {self.source}",
                where=f"{name}.mix",
                hint=f"leave one of them out, or make it a part: {self.source}:SHARE",
            )
        for option in OPTIONS:
            if getattr(self, option) is not None:
                raise UsageError(
                    f"belongs to {name}.source, and {name}.mix names the texts",
                    where=f"{name}.{option}",
                    hint=f"write it with its part: SOURCE?{option}={getattr(self, option)}:SHARE",
                )

    @classmethod
    def younger(cls) -> tuple[str, ...]:
        return ("mix",)


class Member(NamedTuple):
    """One text of those that are learned from."""

    data: DataConfig
    share: Fraction
    """Of all sequences; those of all texts are one together."""


def mixture(data: DataConfig) -> tuple[str, ...]:
    """The parts of a mixture as they are written; none where there is one text."""
    return (data.mix or ()) if isinstance(data, CalibrationConfig) else ()


def texts_of(data: DataConfig) -> tuple[Member, ...]:
    """The texts that a configuration names: those of its mixture, or the one of its source.

    Raises:
        UsageError: for a part that cannot be read.
    """
    if not (mix := mixture(data)):
        alone = DataConfig(**{field: getattr(data, field) for field in DataConfig.__struct_fields__})
        return (Member(alone, Fraction(1)),)
    parts = [read_part("data.mix", part) for part in mix]
    total = sum(part.share for part in parts)
    return tuple(Member(part.data, part.share / total) for part in parts)


def shared_out(texts: Sequence[Member], sequences: int) -> list[int]:
    """How many of ``sequences`` each text gives: its share, rounded so that they add up (what is left after
    rounding down goes to the largest remainders, among equal ones to the first)."""
    exact = [text.share * sequences for text in texts]
    counts = [int(number) for number in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for index in by_remainder[: sequences - sum(counts)]:
        counts[index] += 1
    return counts


def text_words(data: DataConfig) -> str:
    """The text that is learned from, for people: the name of the corpus, or the shares of several."""
    found = texts_of(data)
    if len(found) == 1:
        return OWN_WORDS if found[0].data.is_own else corpus_name(found[0].data)
    return ", ".join(f"{percent(member.share)} {part_name(member.data)}" for member in found)


def percent(share: Fraction) -> str:
    """A share in words."""
    return f"{float(100 * share):.3g} %"


def part_name(data: DataConfig) -> str:
    """A text among others: its corpus, and what of it is read where that is not the usual."""
    if data.is_own:
        return OWN_WORDS
    words = [f"{option} {value}" for option in OPTIONS if (value := getattr(data, option)) is not None]
    return corpus_name(data) + (f" ({', '.join(words)})" if words else "")


def read_part(where: str, part: str) -> Member:
    """One part of a mixture with its share as it is written.

    Raises:
        UsageError: at the field ``where``.
    """
    text, colon, share = part.rpartition(":")
    if not colon:
        raise UsageError(f"{part!r} has no share", where=where, hint=_FORM)
    if not _SHARE.fullmatch(share) or not Fraction(share.strip()):
        raise UsageError(f"{part!r} has no share that is a number above 0", where=where, hint=_FORM)
    return Member(read_text(where, text, part), Fraction(share.strip()))


def read_text(where: str, text: str, part: str = "") -> DataConfig:
    """A source with its options as they are written on one line, ``c4?subset=de``; ``part`` is what it was
    typed in, for messages.

    Raises:
        UsageError: at the field ``where``.
    """
    part = part or text
    source, mark, written = text.rpartition("?")
    if not mark or not _OPTIONS.fullmatch(written.strip()):
        source, written = text, ""
    options = [option.partition("=") for option in written.strip().split("&") if option]
    names = [name for name, _, _ in options]
    for name in names:
        if name not in OPTIONS or names.count(name) > 1:
            problem = "twice" if name in OPTIONS else "which there is not"
            raise UsageError(
                f"{part!r} has {name}, {problem}", where=where, hint=f"one of {', '.join(OPTIONS)}"
            )
    values = {name: unquote(value) for name, _, value in options}
    return DataConfig(source=source.strip(), **values)


def with_source(part: str, elsewhere: Callable[[str], str], *, share: bool = True) -> str:
    """A text as it is written, with its share as a part of a mixture or alone, its source replaced by what
    ``elsewhere`` makes of it."""
    data = read_part("data.mix", part).data if share else read_text("evaluation.texts", part)
    source = elsewhere(data.source)
    return part if source == data.source else source + part.strip()[len(data.source) :]


def text_setting(value: str) -> tuple[str, str]:
    """The field that a text which somebody typed belongs to, and its value there: ``data.mix`` for what has
    shares and is no file, else ``data.source``."""
    parts = members(value)
    shares = [_SHARE.fullmatch(part.rpartition(":")[2]) for part in parts if ":" in part]
    mixed = bool(parts) and len(shares) == len(parts) and all(shares)
    return ("data.mix" if mixed and not os.path.exists(local_path(value)) else "data.source"), value


def evaluated_share(data: DataConfig, evaluation: DataConfig) -> Fraction:
    """How much of the text that is learned from is of the corpus that is evaluated."""
    judged = origin(evaluation)
    return sum((member.share for member in texts_of(data) if origin(member.data) == judged), Fraction(0))


def _check_mixture(where: str, mix: Sequence[str]) -> None:
    if not mix:
        raise UsageError("names no text", where=where, hint=f"{_FORM}; data.mix=none reads data.source")
    seen: dict[object, str] = {}
    for part in mix:
        data = read_part(where, part).data
        checks.text(where, data.source, hint=_FORM)
        for option in OPTIONS:
            checks.optional_text(where, getattr(data, option))
            if data.is_own and getattr(data, option) is not None:
                raise UsageError(f"{part!r} has {option}, which {NOT_READ}", where=where, hint=OTHER_TEXT)
        first = seen.setdefault(same_text(data), part)
        if first is not part:
            raise UsageError(
                f"names one text twice: {first} and {part}",
                where=where,
                hint="name it once, with both shares",
            )


def same_text(data: DataConfig) -> DataConfig:
    """Equal for two spellings of one text, which would give the same sequences twice."""
    path = local_path(data.source)
    if os.path.exists(path):
        source = os.path.realpath(path)
    else:
        known = by_repository(data.source)
        source = known.name if known is not None else data.source
    return msgspec.structs.replace(data, source=source)
