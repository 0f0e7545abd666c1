"""Runs that are to be made in their turn, by a sweep or by the queue: what is known of one."""

from __future__ import annotations

from typing import Annotated

import msgspec

from engine.errors import EqatError
from engine.run.directory import RunDirectory
from engine.run.liveness import look
from engine.run.task import is_job

WAITING, GONE, UNREADABLE = "waiting", "gone", "unreadable"
"""Of a run that is still to be made, one that was deleted or moved, and one that is damaged."""

RunId = Annotated[str, msgspec.Meta(pattern=r"^[^/.\x00][^/\x00]*\Z", max_length=255)]


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """Why a run could not be made or started; what happens later is told by the run itself."""

    message: str
    where: str = ""
    hint: str = ""
    exit_code: int = 1


def failure_of(error: EqatError) -> Failure:
    """The same as what is written down."""
    code = int(error.exit_code)
    return Failure(message=error.message, where=error.where, hint=error.hint, exit_code=code)


def is_at_work(run: RunDirectory | None) -> bool:
    """Whether an engine works on the run itself, and not on something beside it."""
    if run is None:
        return False
    try:
        work = look(run).work
    except EqatError:  # which is told in its turn
        return False
    return work is not None and not is_job(work.task)


def state_of(run: RunDirectory) -> str:
    """The state of a run; none that there is where its log cannot be read, which its turn tells."""
    try:
        return look(run).state
    except EqatError:
        return UNREADABLE
