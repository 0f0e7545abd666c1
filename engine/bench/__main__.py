"""One loader and one export, or a prompt for all of them: ``python -m engine.bench``, asked on its stdin.

It says lines of JSON on stdout: ``{"done": .., "of": ..}`` while it measures, and at the end one object:
``{"prompt": [..]}``, ``{"measured": {..}, "tokens": [..]}`` or ``{"error": {..}}`` in the words of an
EqatError. Whatever a library does to this process, it does to nothing else.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as the engine does, before anything loads OpenMP

import msgspec

from engine.bench.threads import threads
from engine.config.loaders import LOADERS
from engine.config.tables import load_extensions, load_named
from engine.errors import EqatError, ExitCode, PreflightError
from engine.run.benched import Request

MOST_WORDS = 300
"""Letters of what a library says."""


def main() -> int:
    """Returns the exit code."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # who asked is told by whoever started this
    request = msgspec.json.decode(sys.stdin.buffer.read(), type=Request)
    try:
        load_extensions()
        say(_answer(request))
    except EqatError as error:
        return _refused(error)
    except (MemoryError, RuntimeError) as error:
        if "out of memory" not in str(error) and not isinstance(error, MemoryError):
            return _refused(_failed(error))
        return _refused(EqatError("memory ran out", exit_code=ExitCode.OUT_OF_MEMORY))
    except Exception as error:  # of libraries that may raise anything
        return _refused(_failed(error))
    return ExitCode.DONE


def _answer(request: Request) -> dict[str, Any]:
    if not request.loader:
        from engine.bench.prompt import prompt_tokens

        return {"prompt": prompt_tokens(request)}
    loader = LOADERS[request.loader]
    try:
        model = load_named(loader.code)
        _limit_threads()
    except ImportError as error:
        raise PreflightError(
            f"cannot be imported here: {_words(error)}", where=loader.label, hint=loader.install
        ) from error
    from engine.bench.measuring import measure

    measured, tokens = measure(
        loader,
        lambda: model(request),
        request,
        model.memory(request.device),
        threads=threads(),
        heard=lambda done, of: say({"done": done, "of": of}),
    )
    return {"measured": msgspec.to_builtins(measured), "tokens": tokens}


def _limit_threads() -> None:
    """Those of torch, where it is what computes."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(threads())


def _failed(error: Exception) -> EqatError:
    return EqatError(f"failed: {type(error).__name__}: {_words(error)}", exit_code=ExitCode.BUG)


def _words(error: Exception) -> str:
    return " ".join(str(error).split())[:MOST_WORDS] or "without a word"


def _refused(error: EqatError) -> int:
    said = {"message": error.message, "where": error.where, "hint": error.hint}
    say({"error": {**said, "exit_code": int(error.exit_code)}})
    return int(error.exit_code)


def say(tree: dict[str, Any]) -> None:
    """A line for whoever started this; where nobody reads any more, nothing more is to be measured."""
    try:
        print(json.dumps(tree), flush=True)
    except BrokenPipeError:
        os._exit(int(ExitCode.ABORTED))


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # threads of libraries, and what they do when Python ends, are of no interest
