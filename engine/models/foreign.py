"""Calling libraries on what somebody else wrote, and telling their failure from a bug of ours.

transformers, tokenizers and a model's own code raise whatever they like on a configuration or a tokenizer
that they do not understand: any list of expected exceptions is too short. Where nothing but a model's content
can be at fault, every failure is one refusal that names the model; anywhere else an unexpected exception
stays what it is, a bug with a traceback.
"""

from __future__ import annotations

import contextlib
import re
import resource
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from engine.errors import EqatError, PreflightError, StopRequested, first_line
from engine.system.files import full_disk

_NUMERIC = re.compile(r"theta|factor|freq|eps$|attn_")
"""Fields whose values are numbers, whatever a file says."""
_NOT_THE_MODELS_FAULT = (EqatError, StopRequested, MemoryError, torch.OutOfMemoryError)


@contextlib.contextmanager
def foreign(
    doing: str,
    where: str,
    hint: str = "check config.json, or update transformers",
    fields: Callable[[], Mapping[str, Any]] = dict,
) -> Iterator[None]:
    """Whatever is raised inside becomes a PreflightError: ``doing``, and the first line of what was said.

    Memory and disks that are full, and refusals that were made already, pass as they are. ``fields`` are
    those of the configuration that was worked on, so that the one which is to blame can be named.
    """
    try:
        yield
    except _NOT_THE_MODELS_FAULT:
        raise
    except BaseException as error:
        # A panic of a library written in Rust is no Exception, but is one of its ways to refuse a file.
        panicked = type(error).__name__ == "PanicException"
        if not (isinstance(error, Exception) or panicked) or full_disk(error) is not None:
            raise
        if named := to_blame(error, fields()):
            hint = f"check {named} in config.json, or update transformers"
        raise PreflightError(f"{doing}: {reason(error)}", where=where, hint=hint) from error


def reason(error: BaseException) -> str:
    """The first line of its message, with its kind where that alone would not tell enough."""
    # "'foo'" is all that a KeyError says.
    kind = f"{type(error).__name__}: " if isinstance(error, KeyError | IndexError | AssertionError) else ""
    lines = [line.strip() for line in str(error).strip().splitlines()]
    # A line that ends so announces what is said in the next.
    said = f"{lines[0]} {lines[1]}"[:300] if len(lines) > 1 and lines[0].endswith(":") else first_line(error)
    return kind + said


def to_blame(error: BaseException, fields: Mapping[str, Any]) -> str:
    """The field of a configuration whose value made a library fail; empty where it cannot be told."""
    said = str(error)
    values = list(_values(fields))
    texts = [(name, value) for name, value in values if isinstance(value, str) and value]
    # A name that the library looked up and did not know.
    quoted = [name for name, value in texts if f"'{value}'" in said and name != "model_type"]
    if quoted:
        return quoted[0]
    if "padding_idx" in said.lower():
        return "pad_token_id"
    if isinstance(error, TypeError) and "'str'" in said:
        numbers = [name for name, value in texts if _is_number(value)]
        return next(iter([*numbers, *(name for name, _ in texts if _NUMERIC.search(name))]), "")
    if isinstance(error, TypeError) and "'NoneType'" in said:
        return next((name for name, value in values if value is None and _NUMERIC.search(name)), "")
    return ""


def _values(fields: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in fields.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}.{inner}", deep) for inner, deep in _values(value))
        else:
            yield str(name), value


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


@contextlib.contextmanager
def memory_headroom(size: int) -> Iterator[None]:
    """Inside, this process can reserve at most ``size`` bytes more than it has; then allocations fail.

    A number in a configuration would else fill the memory of the whole machine before anybody notices.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = reserved_bytes() + size
    if soft != resource.RLIM_INFINITY:
        most = min(most, soft)
    if hard != resource.RLIM_INFINITY:
        most = min(most, hard)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def reserved_bytes() -> int:
    """Bytes of this process's address space."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()
