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
from typing import Any

from engine.errors import PreflightError
from engine.models.foreign import memory_headroom, reason

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
    # Imported by whoever renders first; a child should not begin by importing.
    import jinja2.sandbox  # noqa: F401

    longest = LONGEST + 16 * len(prompt.encode(errors="surrogatepass"))
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        # Python warns of forks of processes with threads, for locks that the child would wait for: it takes
        # none of another thread's, and is killed if it should.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        os.close(reading)
        _render_and_exit(tokenizer, prompt, writing, longest)
    os.close(writing)
    try:
        answer = _received(reading, longest + 1024)
    finally:
        os.close(reading)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return _judged(answer)


def _render_and_exit(tokenizer: Any, prompt: str, writing: int, longest: int) -> None:
    """The child's whole life; its last words are JSON, ``[text]`` or ``[null, problem]``."""
    try:
        # Signals to the process group are for the parent, whose handlers would write into the run.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        # Should the parent be killed, nobody would kill this.
        resource.setrlimit(resource.RLIMIT_CPU, (int(SECONDS) + 1, int(SECONDS) + 1))
        with memory_headroom(HEADROOM):
            said = _rendered(tokenizer, prompt, longest)
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(json.dumps(said).encode())
    finally:
        os._exit(0)


def _rendered(tokenizer: Any, prompt: str, longest: int) -> list[str | None]:
    """What the template writes, or nothing and why."""
    try:
        turn = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        if not isinstance(text, str) or len(text) > longest:
            return [None, "it writes too much" if isinstance(text, str) else "it writes no text"]
        return [text]
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


def _judged(answer: bytes | None) -> str:
    if answer is None:
        raise _failed(f"it was still at work after {SECONDS:.0f} s")
    try:
        said = json.loads(answer)
    except ValueError:  # killed by the kernel, or by what the template made Python do
        raise _failed("it ended the process that ran it") from None
    if said[0] is None:
        raise _failed(str(said[1]))
    return str(said[0])


def _failed(why: str) -> PreflightError:
    return PreflightError(
        f"cannot be used: {why}",
        where="the model's chat template",
        hint="correct or remove the template among the model's files",
    )
