"""What a sweep varies: fields with several values each, of which every combination makes a run.

Typed, values are separated by commas. Where a value holds commas itself, as those of lists do, ``|``
separates values and each is written as after ``--set``::

    grid.bits=2,3,4        export.formats=gptq_v2|gptq_v2,mlx        data.mix=c4:0.8,wikitext2:0.2|c4:1

In a file it is the table ``[sweep]``, of fields with lists of values; text in it is read as typed text is::

    [sweep]
    "grid.bits" = [2, 3, 4]
    "data.mix" = ["c4:0.8,wikitext2:0.2", ["c4:1"]]

What differs in several fields at once is a case, of which each has a name. Every case is combined with every
value of the other fields; typed, ``case=peqa`` chooses some of them::

    [sweep.case.peqa]
    e2e_qp.enabled = true

    [sweep.case.full-qat]
    e2e_qat.enabled = true
    e2e_qat.start = "latents"
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from engine.config.derived import absolute_paths, resolve
from engine.config.fields import field_type, value_of
from engine.config.lists import members, value_words
from engine.config.overrides import apply_overrides, takes_list
from engine.config.run import CASE, LABELS, SWEEP, RunConfig
from engine.config.validation import validate
from engine.errors import UsageError

MOST_RUNS = 500
"""Of a sweep; more are a mistake in typing."""
_TYPED = re.compile(r"\s*([a-z0-9_]+(?:\.[a-z0-9_]+)*)\s*=(.*)", re.DOTALL)
_CASE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}")
_OPTION = "--sweep"


class Axis(NamedTuple):
    """A field and the values that it has in turn, or ``case`` and the names of cases."""

    name: str
    values: tuple[Any, ...]
    """Each as text that is still to be read, or as the value itself."""
    cases: Mapping[str, Mapping[str, Any]] = MappingProxyType({})
    """What each case sets, by its name."""

    @property
    def fields(self) -> set[str]:
        """Every field that it sets."""
        return {field for case in self.cases.values() for field in case} if self.name == CASE else {self.name}

    def overrides(self, value: Any) -> Mapping[str, Any]:
        """What one of its values sets."""
        return self.cases[value] if self.name == CASE else {self.name: value}


class Combination(NamedTuple):
    """One run of a sweep."""

    settings: dict[str, Any]
    """The value of each swept field, as plain JSON."""
    config: RunConfig
    """Complete, valid, and the same from any working directory."""


def typed_axis(text: str) -> Axis:
    """What was typed after ``--sweep``.

    Raises:
        UsageError: for what is not of the form, a field that there is not, and a list whose commas could mean
            either.
    """
    match = _TYPED.fullmatch(text)
    if match is None:
        raise UsageError(
            f"{text!r} is not of the form key=value,value", where=_OPTION, hint="like --sweep grid.bits=2,3,4"
        )
    name, typed = match.groups()
    if "|" in typed:
        parts = typed.split("|")
    elif name == CASE or not takes_list(field_type(name)):
        parts = typed.split(",")
    elif len(members(typed)) > 1:
        raise UsageError(
            "is a list, whose members commas separate; its values are separated by |",
            where=name,
            hint=f"--sweep '{name}={'|'.join(members(typed))}', or --set for one list",
        )
    else:
        parts = [typed]
    if not all(part.strip() for part in parts):
        raise UsageError(f"{typed!r} has an empty value", where=name, hint="like --sweep grid.bits=2,3,4")
    return Axis(name, tuple(part.strip() for part in parts))


def written_axes(table: Mapping[str, Any], prefix: str = "") -> Iterator[Axis]:
    """The fields of a table ``[sweep]``, by dotted names or as tables in it.

    Raises:
        UsageError: for a field that has no list of values.
    """
    for key, value in table.items():
        name = f"{prefix}{key}"
        if name == CASE:
            yield _written_cases(value)
        elif isinstance(value, Mapping):
            yield from written_axes(value, f"{name}.")
        elif not isinstance(value, list) or not value:
            raise UsageError("must be a list of values", where=f"{SWEEP}.{name}", hint="like [2, 3, 4]")
        else:
            yield Axis(name, tuple(value))


def _written_cases(table: Any) -> Axis:
    """The tables ``[sweep.case.NAME]``."""
    where = f"{SWEEP}.{CASE}"
    if not isinstance(table, Mapping) or not table:
        raise UsageError("must be tables of settings", where=where, hint=f"like [{where}.peqa]")
    cases = {}
    for name, settings in table.items():
        if not _CASE_NAME.fullmatch(name):
            raise UsageError(
                f"{name!r} is no name for a case", where=where, hint="letters, digits, - and _, like full-qat"
            )
        if not isinstance(settings, Mapping):
            raise UsageError("must be a table of settings", where=f"{where}.{name}")
        cases[name] = dict(_flat(settings))
    return Axis(CASE, tuple(cases), cases)


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Fields by dotted names, however they are written."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def axes_of(written: Iterable[Axis], typed: Sequence[Axis], fixed: Collection[str]) -> list[Axis]:
    """The axes of a sweep: those of a file, in the place of which what is typed comes; the first varies
    slowest.

    Raises:
        UsageError: where nothing is swept, or a field twice, or one that is set (``fixed``) as well.
    """
    found: dict[str, Axis] = {}
    for axes in (written, typed):
        named: set[str] = set()
        for axis in axes:
            if axis.name in named:
                raise UsageError("is swept twice", where=axis.name, hint="name all its values at once")
            named.add(axis.name)
            found[axis.name] = _chosen(axis, found.get(CASE)) if axis.name == CASE else axis
    seen: set[str] = set()
    for axis in found.values():
        for name in sorted(axis.fields):
            _check_field(name, seen, fixed)
    if not found:
        raise UsageError(
            "nothing is swept",
            where=_OPTION,
            hint="like --sweep grid.bits=2,3,4, or a table [sweep] in a file",
        )
    return list(found.values())


def _chosen(axis: Axis, written: Axis | None) -> Axis:
    """Cases by their names: those of the file, or what was typed of them."""
    if axis.cases:
        return axis
    known = written.cases if written is not None else {}
    for name in axis.values:
        if name not in known:
            hint = f"there are {', '.join(known)}" if known else f"a file has them as [{SWEEP}.{CASE}.NAME]"
            raise UsageError(f"there is no case {name!r}", where=CASE, hint=hint)
    return Axis(CASE, axis.values, known)


def _check_field(name: str, seen: set[str], fixed: Collection[str]) -> None:
    field_type(name)
    if name in LABELS:
        raise UsageError("is a label, by which no two runs differ", where=name, hint="sweep another field")
    if name in seen:
        raise UsageError("is swept, and set by a case", where=name, hint="leave one of them out")
    if name in fixed:
        raise UsageError("is set and swept", where=name, hint="leave one of them out")
    seen.add(name)


def combinations(base: RunConfig, axes: Sequence[Axis]) -> list[Combination]:
    """Every combination of the values on top of ``base``; the last field varies fastest.

    Raises:
        UsageError: for a value that cannot be read, one that is there twice, a combination that cannot work
            (it is named), and more than anybody means.
    """
    count = math.prod(len(axis.values) for axis in axes)
    if count > MOST_RUNS:
        raise UsageError(f"asks for {count} runs, and {MOST_RUNS} are the most", where=_OPTION)
    for axis in axes:
        _check_values(base, axis)
    made = itertools.product(*(axis.values for axis in axes))
    return [_combined(base, axes, values, number) for number, values in enumerate(made, 1)]


def _check_values(base: RunConfig, axis: Axis) -> None:
    seen: list[Any] = []
    for value in axis.values:
        found = value if axis.name == CASE else value_of(apply_overrides(base, {axis.name: value}), axis.name)
        if found in seen:
            raise UsageError(f"has the value {value_words(found)} twice", where=axis.name)
        seen.append(found)


def _combined(base: RunConfig, axes: Sequence[Axis], values: Sequence[Any], number: int) -> Combination:
    overrides: dict[str, Any] = {}
    for axis, value in zip(axes, values, strict=True):
        overrides |= axis.overrides(value)
    config = apply_overrides(base, overrides)
    settings: dict[str, Any] = {}
    for axis, value in zip(axes, values, strict=True):
        found = value if axis.name == CASE else value_of(config, axis.name)
        settings[axis.name] = list(found) if isinstance(found, tuple) else found
    config = resolve(config)
    try:
        validate(config)
    except UsageError as error:
        where = f"run {number} ({settings_words(settings)}): {error.where}"
        raise UsageError(error.message, where=where, hint=error.hint) from error
    return Combination(settings, absolute_paths(config))


def settings_words(settings: Mapping[str, Any]) -> str:
    """The settings of one run: ``grid.bits=2, runtime.seed=0``."""
    return ", ".join(f"{name}={value_words(value)}" for name, value in settings.items())
