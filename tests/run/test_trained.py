"""What counts as trained, by what the log tells."""

from __future__ import annotations

from engine.run.events import BlockFinished, PhaseFinished, PhaseStarted, RunStarted
from engine.run.state import RunState
from engine.run.trained import has_trained

BOTH = {"block_ap": {"enabled": True}, "e2e_qp": {"enabled": True}}
ONE = {"block_ap": {"enabled": True}, "e2e_qp": {"enabled": False}}
NONE = {"block_ap": {"enabled": False}, "e2e_qp": {"enabled": False}}


def after(*phases: str) -> RunState:
    """The state of a run that has finished ``phases``, each that makes blocks with one."""
    state = RunState(id="run").apply(
        RunStarted(id="run", pid=1, host="here", device="cpu", versions={}, argv=[])
    )
    for index, phase in enumerate(phases):
        state = state.apply(PhaseStarted(phase=phase, index=index, phases=len(phases)))
        if phase in ("rtn", "block_ap"):
            state = state.apply(BlockFinished(phase=phase, block=0, seconds=1.0))
        state = state.apply(PhaseFinished(phase=phase, seconds=1.0))
    return state


def test_every_stage_that_is_wanted_must_be_over() -> None:
    assert has_trained(after("rtn", "block_ap", "e2e_qp"), BOTH)
    assert not has_trained(after("rtn", "block_ap"), BOTH)
    assert has_trained(after("rtn", "block_ap"), ONE)


def test_rounding_alone_is_something_too_and_nothing_is_not() -> None:
    assert has_trained(after("rtn"), NONE)
    assert not has_trained(after(), NONE)
    assert not has_trained(after("evaluate_fp"), NONE)


def test_a_configuration_that_cannot_be_read_wants_nothing_more_than_blocks() -> None:
    assert has_trained(after("rtn"), None)
    assert not has_trained(after(), {"block_ap": "on"})
