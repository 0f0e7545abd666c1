"""Which phases a run has, in which order."""

from __future__ import annotations

from engine.run.config import RunConfig
from engine.run.event_kinds import Phase


def phases_of(config: RunConfig) -> list[Phase]:
    """The phases that ``config`` asks for.

    Full precision is measured before anything is trained: a model that is broken says so at once. What plain
    rounding gives is only there to be compared with the trained blocks, so training does not wait for it.
    """
    evaluates, block_ap, e2e_qp = (
        part.enabled for part in (config.evaluation, config.block_ap, config.e2e_qp)
    )
    wanted: list[tuple[Phase, bool]] = [
        ("prepare", True),
        ("evaluate_fp", evaluates),
        ("block_ap", block_ap),
        ("rtn", not block_ap),
        ("evaluate_rtn", evaluates),
        ("evaluate_block_ap", evaluates and block_ap),
        ("e2e_qp", e2e_qp),
        ("evaluate_e2e_qp", evaluates and e2e_qp),
        ("export", bool(config.export.formats)),
    ]
    return [name for name, included in wanted if included]
