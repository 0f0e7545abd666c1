"""Training blocks K... of a run again with other settings: a new run that shares what came before.

The new run's directory holds ``origin.json``, which names the other run. Its engine begins with that run's
checkpoint: finished blocks below K are hard links to the same objects, so they cost no time and no disk, and
deleting either run does not hurt the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import msgspec

from engine.config.derived import resolve
from engine.config.fields import field_names, value_of
from engine.config.overrides import apply_overrides
from engine.config.run import RunConfig
from engine.config.sameness import equivalent_command
from engine.config.stages import STAGES
from engine.config.validation import validate
from engine.errors import PreflightError, UsageError
from engine.run.directory import RunDirectory
from engine.run.events import BULK
from engine.run.state import load_state
from engine.system.guarded import BadFile, NoFile, read_struct

MOST_BLOCKS = 10**5
"""More than any model has: a number above is none that this program wrote."""


class Origin(msgspec.Struct, frozen=True, kw_only=True):
    """``origin.json``."""

    path: str
    """The other run's directory."""
    id: str
    from_block: Annotated[int, msgspec.Meta(ge=0, le=MOST_BLOCKS)]
    """The first block that is trained again; as many as there are blocks: only the end-to-end training."""


def read_origin(run: RunDirectory) -> Origin | None:
    """Which run this one redoes a part of, or none."""
    try:
        return read_struct(run.origin_path, Origin)
    except NoFile:
        return None
    except BadFile as error:
        raise PreflightError(f"cannot be read: {error.message}", where=error.where) from error


def make_redo(run: RunDirectory, from_block: int, overrides: Mapping[str, object]) -> RunDirectory:
    """A new run beside ``run`` that trains its blocks from ``from_block`` on, with ``overrides`` set.

    Raises:
        UsageError: as :func:`redo_config`.
    """
    config = redo_config(run, from_block, overrides)
    # Its own name, not that of a link by which it was found: the engine will speak of it.
    origin = Origin(path=str(run.path), id=run.path.name, from_block=from_block)
    # Together with the run: one that had lost its origin would train every block with the new settings.
    return RunDirectory.create(run.path.parent, config, files={"origin.json": origin})


def redo_config(run: RunDirectory, from_block: int, overrides: Mapping[str, object]) -> RunConfig:
    """The configuration that :func:`make_redo` gives the new run; writes nothing.

    Raises:
        UsageError: for blocks that are not finished, and for settings that the shared blocks depend on.
    """
    _check_blocks(run, from_block)
    before = run.config()
    config = resolve(apply_overrides(before, overrides))
    validate(config)
    if from_block:  # else no block is shared, and nothing has to agree
        _check_settings(resolve(before), config)
    return config


def _check_blocks(run: RunDirectory, from_block: int) -> None:
    """Blocks 0 to K-1 must be finished."""
    state = load_state(run, skip=BULK)
    finished = sum(row.finished for row in state.trained_blocks())
    if 0 <= from_block <= finished:
        return
    end_to_end = f"; with {finished}, only the end-to-end training is done again"
    all_of_them = finished and finished == (state.plan or {}).get("blocks")
    raise UsageError(
        f"cannot be {from_block}: {_finished_words(finished)}",
        where="--from-block",
        hint=(f"0 to {finished}" if finished else "only 0") + (end_to_end if all_of_them else ""),
    )


def _finished_words(finished: int) -> str:
    if finished <= 1:
        return "only block 0 is finished" if finished else "no block is finished yet"
    return f"blocks 0 to {finished - 1} are finished"


def is_shared(name: str) -> bool:
    """Whether the shared blocks depend on a field, so that every later one must agree with it: those of model
    and grid, and which method makes the blocks."""
    methods = (f"{stage.name}.enabled" for stage in STAGES if stage.scope == "block")
    return name.startswith(("model.", "grid.")) or name in methods


def _check_settings(before: RunConfig, now: RunConfig) -> None:
    for name in field_names():
        if not is_shared(name) or name == "model.trust_remote_code":
            continue
        old, new = value_of(before, name), value_of(now, name)
        if old != new:
            raise UsageError(
                f"is {_words(old)} in the blocks that would be shared and cannot become {_words(new)}",
                where=name,
                hint=f"start a new run instead: {equivalent_command(now)}",
            )


def _words(value: object) -> str:
    """A value as ``--set`` takes it."""
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
