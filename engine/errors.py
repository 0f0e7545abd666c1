"""One line that says what is wrong, where, and what to do; and the exit code that goes with it."""

from __future__ import annotations

from enum import IntEnum
from pathlib import PurePath


class ExitCode(IntEnum):
    """What the engine process (and a foreground ``eqat run``) exits with."""

    DONE = 0
    BUG = 1
    USAGE = 2
    PREFLIGHT = 3
    DATA = 4
    NON_FINITE = 5
    OUT_OF_MEMORY = 6
    DISK_FULL = 7
    IDENTITY = 8
    STOPPED = 75
    ABORTED = 130
    KILLED = 137
    TERMINATED = 143


class EqatError(Exception):
    """A failure the user can act on: shown as one line, never as a traceback.

    ``message`` says what is wrong, ``where`` names the field, file, layer or step, ``hint`` says what
    to do about it, and ``exit_code`` is one of those the README lists.
    """

    def __init__(self, message: str, *, exit_code: ExitCode, where: str = "", hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.hint = hint
        self.exit_code = exit_code

    def __str__(self) -> str:
        line = f"{self.where}: {self.message}" if self.where else self.message
        return f"{line} ({self.hint})" if self.hint else line


class UsageError(EqatError):
    """A wrong flag, preset or configuration value."""

    def __init__(self, message: str, *, where: str = "", hint: str = "") -> None:
        super().__init__(message, exit_code=ExitCode.USAGE, where=where, hint=hint)


class PreflightError(EqatError):
    """The run cannot start here: missing model, unsupported layer, too little memory or disk."""

    def __init__(self, message: str, *, where: str = "", hint: str = "") -> None:
        super().__init__(message, exit_code=ExitCode.PREFLIGHT, where=where, hint=hint)


class DataError(EqatError):
    """The calibration or evaluation text is missing, too short or of the wrong form."""

    def __init__(self, message: str, *, where: str = "", hint: str = "") -> None:
        super().__init__(message, exit_code=ExitCode.DATA, where=where, hint=hint)


class NonFiniteError(EqatError):
    """Training diverged and could not be rescued."""

    def __init__(self, message: str, *, where: str = "", hint: str = "") -> None:
        super().__init__(message, exit_code=ExitCode.NON_FINITE, where=where, hint=hint)


class IdentityError(EqatError):
    """A checkpoint belongs to another model, data or configuration."""

    def __init__(self, message: str, *, where: str = "", hint: str = "") -> None:
        super().__init__(message, exit_code=ExitCode.IDENTITY, where=where, hint=hint)


def run_is_gone(path: PurePath) -> PreflightError:
    """What is said of a run whose directory was deleted, or put elsewhere, while its engine worked."""
    return PreflightError(
        "the run's directory is gone: it was deleted or moved while its engine worked",
        where=str(path),
        hint="a moved one goes on with eqat resume where it is now; nothing is made anew in its place",
    )


class DamagedRun(IdentityError):
    """A part of what a run has trained is damaged; resuming it trains that part again, also where the run was
    done."""


class StopRequested(Exception):
    """Raised where a run can be left, once a stop or an abort was asked for."""

    def __init__(self, *, abort: bool = False, exit_code: ExitCode = ExitCode.STOPPED) -> None:
        super().__init__("abort requested" if abort else "stop requested")
        self.abort = abort
        self.exit_code = exit_code


def first_line(error: BaseException, most: int = 300) -> str:
    """The first line of what an error says, at most so many letters of it; its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:most]
