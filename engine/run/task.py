"""What an attempt may be asked to do, and what it needs to know for that."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import msgspec

from engine.errors import UsageError
from engine.run.measured import How

Task = Literal["run", "eval", "export", "generate"]
"""The run itself, or something with a finished one."""
RUN: Task = "run"
JOBS: Mapping[str, tuple[str, str]] = {
    "eval": ("evaluation", "eqat eval"),
    "export": ("export", "eqat export"),
    "generate": ("sample", "eqat generate"),
}
"""What is done with a finished run, each a job of its own beside it: its name, and the command that does
it."""
LONGEST_NAME = 16
"""Letters of a task that is not known here."""
NEW_TOKENS = 64
"""A sample has at most so many, where nobody says how many."""
BENCH_PROMPT_TOKENS, BENCH_NEW_TOKENS = 128, 32
"""What is read at once and what is written after it, where exports are timed and nobody says how many."""


def job_name(task: str) -> str:
    """What a task is called in a sentence; one that is not known here by its own name."""
    return JOBS[task][0] if task in JOBS else task[:LONGEST_NAME]


def is_job(task: str) -> bool:
    """Whether a task is something with a run, and not the run itself."""
    return task != RUN


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """What one attempt is asked to do."""

    task: Task = "run"
    overrides: Mapping[str, object] = {}
    """Operational settings by their dotted names, for this attempt only."""
    prompt: str = ""
    """What the models continue in the task ``generate``, by at most ``new_tokens`` tokens."""
    new_tokens: int = NEW_TOKENS
    how: How = How()
    """How the task ``eval`` measures; as it stands, it repeats the run's own measure."""
    export_to: Path | None = None
    """Where the task ``export`` copies its checkpoints as well."""
    allows_other_size: bool = False
    """The run may go on with another number of GPUs than its checkpoint was made with."""


def check_prompt(prompt: str, new_tokens: int) -> None:
    """What is wrong with a prompt is said before the model is opened.

    Raises:
        UsageError: for one that is empty or no text, or for no token to write.
    """
    if not prompt.strip():
        raise UsageError("is empty", where="--prompt", hint="give the models something to continue")
    try:
        # Bytes of an argument that are no text reach Python as lone surrogates.
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UsageError("is not valid UTF-8", where="--prompt", hint="type it anew") from error
    if new_tokens < 1:
        raise UsageError(f"{new_tokens} is no number of tokens", where="--new-tokens", hint="1 or more")
