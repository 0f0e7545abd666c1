"""Whether a run can be shared out over several GPUs: every batch evenly, by every stage that it makes."""

from __future__ import annotations

from engine.config.run import RunConfig
from engine.config.stages import stages_of
from engine.errors import UsageError


def check_ranks(config: RunConfig) -> None:
    """Refuse what a run on several GPUs cannot do.

    Raises:
        UsageError: names the field.
    """
    gpus = config.runtime.gpus
    if gpus == 1:
        return
    for stage in stages_of(config):
        if not stage.ranks:
            raise UsageError(
                f"{stage.label} is not made by several GPUs", where="runtime.gpus", hint="runtime.gpus = 1"
            )
        batch = getattr(getattr(config, stage.name, None), "batch_size", 0)
        if stage.ranks == "together" and batch % gpus:
            raise UsageError(
                f"{batch} sequences cannot be shared out evenly over {gpus} GPUs",
                where=f"{stage.name}.batch_size",
                hint=_fitting(batch, gpus),
            )


def _fitting(batch: int, gpus: int) -> str:
    """The next batches that can be, and the most GPUs that this one keeps busy."""
    below = batch // gpus * gpus
    batches = " or ".join(str(one) for one in (below, below + gpus) if one)
    most = max(number for number in range(1, min(batch, gpus) + 1) if batch % number == 0)
    return f"a batch of {batches}, or --gpus {most}"
