"""Whether a run has trained all that it wants to: what is done with a finished run needs that.

The engine asks the checkpoint, which knows. This asks the log, which is there before any engine starts, so
that nobody waits for torch to be told no.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.config.stages import STAGES
from engine.errors import UsageError
from engine.run.directory import RunDirectory
from engine.run.events import BULK
from engine.run.finding import typed
from engine.run.liveness import look
from engine.run.state import RunState, load_state

UNTRAINED = "the run has not finished training"


def has_trained(state: RunState, config: Mapping[str, Any] | None) -> bool:
    """Whether all phases of ``config``, a run's configuration as plain dicts, that train are finished."""
    finished = {row.name for row in state.phases if row.finished}
    wanted = {stage.name for stage in STAGES if _enabled(config, stage.name)}
    return bool(state.trained_blocks()) and wanted <= finished


def _enabled(config: Mapping[str, Any] | None, stage: str) -> bool:
    section = (config or {}).get(stage)
    return isinstance(section, Mapping) and section.get("enabled") is True


def refuse_untrained(run: RunDirectory, config: Mapping[str, Any]) -> None:
    """Raise :class:`UsageError` for a run that broke off before it had trained everything.

    One that is done is believed, and one that an engine works on is the launch's to refuse.
    """
    state, work = look(run)
    if work is None and state != "done" and not has_trained(load_state(run, skip=BULK), config):
        raise UsageError(f"{UNTRAINED} (it is {state})", where=run.id, hint=f"eqat resume {typed(run)}")
