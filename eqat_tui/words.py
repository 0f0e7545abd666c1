"""What the parts of a run are called when they are shown to a person."""

from __future__ import annotations

PHASES = {
    "prepare": "prepare",
    "evaluate_fp": "evaluate full precision",
    "evaluate_rtn": "evaluate round-to-nearest",
    "block_ap": "Block-AP",
    "rtn": "round to nearest",
    "evaluate_block_ap": "evaluate Block-AP",
    "e2e_qp": "E2E-QP",
    "evaluate_e2e_qp": "evaluate E2E-QP",
    "export": "export",
    "generate": "sample texts",
}

STAGES = {
    "fp": "full precision",
    "rtn": "round-to-nearest",
    "block_ap": "Block-AP",
    "e2e_qp": "E2E-QP",
    "packed": "packed checkpoint",
}


def phase_name(phase: str | None) -> str:
    """A phase in words; one from a newer version by its own name."""
    return PHASES.get(phase, phase) if phase else "starting"


def stage_name(stage: str) -> str:
    """What was evaluated, in words."""
    return STAGES.get(stage, stage)


def model_name(source: str | None) -> str:
    """The last part of a model's source, as people say it."""
    name = (source or "").rstrip("/").rsplit("/", 1)[-1]
    return name.removesuffix(".gguf") or "?"
