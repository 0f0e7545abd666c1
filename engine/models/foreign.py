"""Calling libraries on what somebody else wrote, and telling their failure from a bug of ours.

transformers, tokenizers and a model's own code raise whatever they like on a configuration or a tokenizer
that they do not understand: any list of expected exceptions is too short. Where nothing but a model's content
can be at fault, every failure is one refusal that names the model; anywhere else an unexpected exception
stays what it is, a bug with a traceback.
"""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator

import torch

from engine.errors import EqatError, PreflightError, StopRequested, first_line
from engine.system.files import full_disk

_NOT_THE_MODELS_FAULT = (EqatError, StopRequested, MemoryError, torch.OutOfMemoryError)


@contextlib.contextmanager
def foreign(
    doing: str, where: str, hint: str = "check config.json, or update transformers"
) -> Iterator[None]:
    """Whatever is raised inside becomes a PreflightError: ``doing``, and the first line of what was said.

    Memory and disks that are full, and refusals that were made already, pass as they are.
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
        raise PreflightError(f"{doing}: {reason(error)}", where=where, hint=hint) from error


def reason(error: BaseException) -> str:
    """The first line of its message, with its kind where that alone would not tell enough."""
    # "'foo'" is all that a KeyError says.
    kind = f"{type(error).__name__}: " if isinstance(error, KeyError | IndexError | AssertionError) else ""
    return kind + first_line(error)


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
