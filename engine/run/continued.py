"""What a run goes on with that it was not made with: another number of GPUs, once that was allowed."""

from __future__ import annotations

from engine.config.runtime import GPUS
from engine.errors import EqatError
from engine.run.directory import RunDirectory
from engine.run.facts import GPUS_NOW
from engine.run.generations import current, read
from engine.run.objects import DamagedCheckpoint


def continued_on(run: RunDirectory) -> dict[str, object]:
    """The setting by which a run goes on with as many GPUs as its newest checkpoint was made on, where it was
    allowed to go on with that number; none where it never was, or where the checkpoint cannot say."""
    try:
        ref = current(run.checkpoints_dir)
        found = None if ref is None else read(run.checkpoints_dir, ref).facts.get(GPUS_NOW)
    except (EqatError, DamagedCheckpoint):
        return {}  # whoever goes on with it says what is damaged
    return {} if found is None else {GPUS: found}
