"""The table of stages: one row for each version of the model that a run makes or measures.

A run's *phases* follow from it, as its events name them: ``prepare``; a phase for each stage that is made,
called like the stage; ``evaluate_<stage>`` for each that is measured; ``export``. What is done with a
finished run is a phase as well (``generate``).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import msgspec

from engine.config.run import RunConfig
from engine.config.tables import Table

Scope = Literal["nothing", "block", "network"]


class Stage(msgspec.Struct, frozen=True, kw_only=True):
    """A version of the model, and how it is made."""

    name: str
    """Its section of the configuration, its phase, and what its evaluation is called."""
    label: str
    """The version in words, as a table's row."""
    scope: Scope
    """Whether one block after the other is made, all together, or (the model as it came) nothing."""
    doing: str = ""
    """Its phase in words; empty: the label."""
    result: str = ""
    """Its row in a model card; empty: the label."""
    about: str = ""
    """What it does, in a sentence that can follow the one about the stage before it."""
    part_of: str = ""
    """The published method that it is a part of, with the other stages that say the same."""
    baseline: bool = False
    """It is measured whether or not another stage makes the blocks; it makes them where none does."""
    offered: bool = True
    """It can be chosen for a model; false where a command of its own makes the runs that have it."""
    run: str = ""
    """``module:function`` that makes it: called with the run's :class:`~engine.phases.job.Job`."""
    block: str = "engine.phases.job:Job.packed_block"
    """``module:function`` that gives one block of it to whoever measures it: called with job and index."""
    costs: str = ""
    """``module:class`` of its part of the plan (:mod:`engine.plan.stages`); empty: what every stage costs."""
    reads_text: bool = False
    """It learns from calibration text: its section has ``sequences``, ``val_sequences`` and
    ``sequence_length``."""
    ranks: Literal["", "alone", "together"] = ""
    """How a run on several GPUs makes it: one process alone while the others wait, or all of them together;
    not at all, where it does not say."""
    answers: bool = False
    """It can learn the answers of conversations (``instructions``) in the place of text."""
    entries_prefix: str = ""
    """What ``entries`` is, where that is neither ``block`` nor the name of a stage of the whole network."""

    @property
    def phase_label(self) -> str:
        """Its phase in words."""
        return self.doing or self.label

    @property
    def entries(self) -> str:
        """Begins the names of what it leaves of each block in a checkpoint."""
        return self.entries_prefix or ("block" if self.scope == "block" else self.name)

    @property
    def card_label(self) -> str:
        """Its row in a model card."""
        return self.result or self.label

    def wanted(self, config: RunConfig) -> bool:
        """Whether the configuration asks for it by name."""
        section = getattr(config, self.name, None)
        return section is not None and bool(section.enabled)


STAGES = Table(
    "stage",
    Stage(
        name="fp",
        label="full precision",
        scope="nothing",
        baseline=True,
        block="engine.phases.evaluation:full_block",
        about="The model as it came.",
    ),
    Stage(
        name="rtn",
        label="round-to-nearest",
        scope="block",
        doing="round to nearest",
        result="round to nearest",
        baseline=True,
        run="engine.phases.blocks:round_blocks",
        block="engine.phases.evaluation:rounded_block",
        costs="engine.plan.stages.rtn:RoundingCosts",
        ranks="alone",
        about="Every weight goes to the nearest point of its group's grid.",
    ),
    Stage(
        name="imported",
        label="as imported",
        scope="block",
        doing="import",
        offered=False,
        run="engine.phases.imported:import_blocks",
        costs="engine.plan.stages.imported:ImportCosts",
        ranks="alone",
        about="The blocks are those of a quantized checkpoint, integer by integer.",
    ),
    Stage(
        name="block_ap",
        label="Block-AP",
        scope="block",
        result="after Block-AP",
        run="engine.phases.blocks:train_blocks",
        costs="engine.plan.stages.block_ap:BlockAPCosts",
        ranks="together",
        reads_text=True,
        about="Block-AP trains one block at a time with all its parameters.",
        part_of="EfficientQAT",
    ),
    Stage(
        name="gptq",
        label="GPTQ",
        scope="block",
        result="after GPTQ",
        run="engine.phases.blocks:quantize_blocks",
        costs="engine.plan.stages.gptq:GPTQCosts",
        ranks="together",
        reads_text=True,
        about="GPTQ rounds column by column, and what is left of a matrix makes up for it.",
    ),
    Stage(
        name="e2e_qp",
        label="E2E-QP",
        scope="network",
        result="after E2E-QP",
        run="engine.phases.end_to_end:train_end_to_end",
        costs="engine.plan.stages.e2e_qp:E2EQPCosts",
        ranks="together",
        reads_text=True,
        answers=True,
        entries_prefix="scales",
        about="E2E-QP then trains the scales of the whole model.",
        part_of="EfficientQAT",
    ),
    Stage(
        name="e2e_qat",
        label="E2E-QAT",
        scope="network",
        result="after E2E-QAT",
        run="engine.phases.end_to_end:train_weights_end_to_end",
        costs="engine.plan.stages.e2e_qat:E2EQATCosts",
        ranks="together",
        reads_text=True,
        answers=True,
        entries_prefix="integers",
        about="E2E-QAT then trains integers and scales of the whole model.",
    ),
    Stage(
        name="lr_qat",
        label="LR-QAT",
        scope="network",
        result="after LR-QAT",
        run="engine.phases.end_to_end:train_low_rank_end_to_end",
        costs="engine.plan.stages.lr_qat:LRQATCosts",
        ranks="together",
        reads_text=True,
        answers=True,
        entries_prefix="lowrank",
        about="LR-QAT then trains a low-rank change of all integers, and scales, of the whole model.",
    ),
)

PACKED = "packed"
"""What a reloaded export is called beside the stages, where one is measured."""
EVALUATE = "evaluate_"
"""Begins the phase that measures a stage."""
PHASES = {"prepare": "prepare", "export": "export", "generate": "sample texts"}
"""The phases that belong to no stage, and their words."""


def stages_of(config: RunConfig) -> tuple[Stage, ...]:
    """The stages that ``config`` makes, in order: one that makes the blocks, then those of the whole network.

    Where several make the blocks, :func:`~engine.config.validation.validate` has refused the configuration.
    """
    by_block = [stage for stage in STAGES if stage.scope == "block" and stage.wanted(config)]
    if not by_block:
        by_block = [stage for stage in STAGES if stage.scope == "block" and stage.baseline]
    return (*by_block, *(stage for stage in STAGES if stage.scope == "network" and stage.wanted(config)))


def phases_of(config: RunConfig) -> list[str]:
    """The phases that ``config`` asks for, in order.

    Full precision is measured before anything is trained: a model that is broken says so at once. What plain
    rounding gives is only there to be compared with the trained blocks, so training does not wait for it.
    Both need the original model, which a run of imported blocks may not have.
    """
    made = stages_of(config)
    compares = not config.imported.lacks_original
    measured = [stage for stage in STAGES if (stage.baseline and compares) or stage in made]
    measured = measured if config.evaluation.enabled else []

    def evaluations(scope: Scope) -> list[str]:
        return [f"{EVALUATE}{stage.name}" for stage in measured if stage.scope == scope]

    phases = ["prepare", *evaluations("nothing")]
    phases += [stage.name for stage in made if stage.scope == "block"]
    phases += evaluations("block")
    for stage in made:
        if stage.scope == "network":
            phases += [stage.name, *([f"{EVALUATE}{stage.name}"] if stage in measured else [])]
    return [*phases, *(["export"] if config.export.formats else [])]


def network_stages() -> tuple[Stage, ...]:
    """The stages that train all blocks together, in order: each goes on from what the one before left."""
    return tuple(stage for stage in STAGES if stage.scope == "network")


def learns_answers(config: RunConfig, stage: Stage) -> bool:
    """Whether a stage learns the answers of conversations, and no plain text."""
    return stage.answers and config.instructions.source is not None and stage.wanted(config)


def answer_length(config: RunConfig) -> int:
    """Tokens of the sequences on which answers are measured: those of the stage that learned them last."""
    learned = [stage for stage in STAGES if learns_answers(config, stage)]
    length: int = getattr(config, learned[-1].name).sequence_length if learned else 0
    return length


def last_stage(config: RunConfig) -> Stage:
    """The stage whose model is the run's result."""
    return stages_of(config)[-1]


def full_precision() -> str:
    """The name of the model as it came, which everything is compared with."""
    return next(stage.name for stage in STAGES if stage.scope == "nothing")


def measured_stage(phase: str) -> str:
    """The name of the stage that a phase measures; empty where it measures none."""
    return phase.removeprefix(EVALUATE) if phase.startswith(EVALUATE) else ""


def phase_label(phase: str | None) -> str:
    """A phase in words; one that is not known here by its own name."""
    if not phase:
        return "starting"
    measured = measured_stage(phase)
    if measured in STAGES:
        return f"evaluate {STAGES[measured].label}"
    if phase in STAGES:
        return STAGES[phase].phase_label
    return PHASES.get(phase) or _cut(phase)


def stage_label(stage: str) -> str:
    """A version of the model in words; one that is not known here by its own name."""
    if stage == PACKED:
        return "packed checkpoint"
    return STAGES[stage].label if stage in STAGES else _cut(stage)


def _cut(name: str) -> str:
    """A name out of a log, no longer than ours may be."""
    return name if len(name) <= 40 else f"{name[:39]}…"


def versions(seen: Iterable[str] = ()) -> tuple[str, ...]:
    """Names of everything that is measured, in order; behind them those ``seen`` that are not known here."""
    known = (*STAGES.names(), PACKED)
    return (*known, *(name for name in seen if name not in known))


def newest_first() -> tuple[str, ...]:
    """Names of the quantized stages, the one that comes last in a run first."""
    return tuple(stage.name for stage in reversed(list(STAGES)) if stage.scope != "nothing")
