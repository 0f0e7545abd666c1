"""A chat template that belongs to a model is a program, and is run like somebody else's program.

Jinja keeps templates away from files, not from the processor and from memory: two nested loops, ``9**(9**9)``
or ``'x' * 10**10`` would hold a run for ever or fill the machine, some of it inside a single operation that
no signal interrupts. So the template is rendered by a child of this process that can reserve only so much
memory and is killed after so many seconds. The child is a fork: what renders is the tokenizer that is loaded
already.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import time
import warnings
from collections.abc import Callable
from typing import Any

from engine.errors import PreflightError
from engine.models.foreign import memory_headroom, reason
from engine.run.control import STOP_SIGNALS

SECONDS = 20.0
"""A template that needs a hundredth of this on the slowest machine is a large one."""
HEADROOM = 1 << 30
"""Bytes of memory beyond what the process has when it is forked."""
LONGEST = 4 << 20
"""Bytes of a rendered conversation, besides what the user wrote."""


def render(tokenizer: Any, prompt: str) -> str:
    """The prompt as a user's turn, as the tokenizer's chat template writes it, ready for an answer.

    Raises:
        PreflightError: when the template fails, takes too long or too much memory, or writes too much.
    """
    longest = LONGEST + 16 * len(prompt.encode(errors="surrogatepass"))

    def written() -> str:
        turn = [{"role": "user", "content": prompt}]
        return checked(
            tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False), longest
        )

    return str(in_a_child(written, longest))


class Refused(Exception):
    """What a template wrote cannot be used; the message says why."""


def checked(text: Any, longest: int) -> str:
    """What a template wrote, if it is a text of at most so many characters.

    Raises:
        Refused: if it is not.
    """
    if not isinstance(text, str) or len(text) > longest:
        raise Refused("it writes too much" if isinstance(text, str) else "it writes no text")
    return text


def in_a_child(work: Callable[[], Any], longest: int) -> Any:
    """What ``work()`` returns, which has to be something that JSON can say in ``longest`` bytes; it renders
    templates of others, and is done by a child.

    Raises:
        PreflightError: when it fails, takes too long or too much memory.
    """
    # Imported by whoever renders first; a child should not begin by importing.
    import jinja2.sandbox  # noqa: F401

    reading, writing = os.pipe()
    with warnings.catch_warnings():
        # Python warns of forks of processes with threads, for locks that the child would wait for: it takes
        # none of another thread's, and is killed if it should.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        os.close(reading)
        _work_and_exit(work, writing)
    os.close(writing)
    try:
        answer = _received(reading, longest + 1024)
    finally:
        os.close(reading)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return _judged(answer)


def _work_and_exit(work: Callable[[], Any], writing: int) -> None:
    """The child's whole life; its last words are JSON, ``[result]`` or ``[null, problem]``."""
    try:
        # Signals to the process group are for the parent, whose handlers would write into the run.
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        # Should the parent be killed, nobody would kill this.
        resource.setrlimit(resource.RLIMIT_CPU, (int(SECONDS) + 1, int(SECONDS) + 1))
        with memory_headroom(HEADROOM):
            said = _done(work)
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(json.dumps(said).encode())
    finally:
        os._exit(0)


def _done(work: Callable[[], Any]) -> list[Any]:
    """What comes of it, or nothing and why."""
    try:
        return [work()]
    except MemoryError:
        return [None, "it takes too much memory"]
    except Exception as error:
        return [None, reason(error)]


def _received(reading: int, most: int) -> bytes | None:
    """What comes through the pipe until it is closed; None when that takes too long."""
    # JSON writes up to six bytes for a byte.
    end, pieces, size = time.monotonic() + SECONDS, [], 0
    while size <= 6 * most:
        left = end - time.monotonic()
        if left <= 0 or not select.select([reading], [], [], left)[0]:
            return None
        if not (piece := os.read(reading, 1 << 16)):
            break
        pieces.append(piece)
        size += len(piece)
    return b"".join(pieces)


def _judged(answer: bytes | None) -> Any:
    if answer is None:
        raise _failed(f"it was still at work after {SECONDS:.0f} s")
    try:
        said = json.loads(answer)
    except ValueError:  # killed by the kernel, or by what the template made Python do
        raise _failed("it ended the process that ran it") from None
    if said[0] is None:
        raise _failed(str(said[1]))
    return said[0]


def _failed(why: str) -> PreflightError:
    return PreflightError(
        f"cannot be used: {why}",
        where="the model's chat template",
        hint="correct or remove the template among the model's files",
    )
