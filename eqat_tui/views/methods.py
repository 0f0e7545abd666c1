"""The choice of method on the setup screen: which stages a run makes, as the table of stages has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from engine.config.fields import field_names
from engine.config.run import RunConfig
from engine.config.stages import STAGES, Scope, Stage

NOTHING = "rounding only, nothing is trained"
TITLES = {
    "model": "Model",
    "grid": "Grid",
    "data": "Calibration text",
    "instructions": "Instructions",
    "evaluation": "Evaluation",
    "export": "Export",
    "runtime": "Where and how it runs",
}
"""Of the sections that are no stage's."""


def choosable(*scopes: Scope) -> list[Stage]:
    """The stages of such a scope that a configuration can switch on and off."""
    names = field_names()
    return [
        stage
        for scope in scopes
        for stage in STAGES
        if stage.scope == scope and stage.offered and switch(stage) in names
    ]


def switch(stage: Stage) -> str:
    """The field that says whether a stage is made."""
    return f"{stage.name}.enabled"


def switches() -> tuple[str, ...]:
    """The fields that the choice of a method sets."""
    return tuple(switch(stage) for stage in choosable("block", "network"))


def methods() -> Mapping[str, Sequence[Stage]]:
    """What can be chosen, in words: of the stages of blocks and of those of the network one each, or none."""
    by_block = [*((stage,) for stage in choosable("block")), ()]
    of_network = [*((stage,) for stage in choosable("network")), ()]
    return {words_of((*one, *other)): (*one, *other) for one in by_block for other in of_network}


def method_of(config: RunConfig) -> str:
    """What a configuration has chosen, in words; it may enable more than can be chosen, at once or at all."""
    scopes: tuple[Scope, ...] = ("block", "network")
    return words_of(
        [stage for scope in scopes for stage in STAGES if stage.scope == scope and stage.wanted(config)]
    )


def words_of(stages: Sequence[Stage]) -> str:
    """A method in words: its stages in order, and under which name they were published together."""
    if not stages:
        return NOTHING
    words = ", then ".join(stage.label for stage in stages)
    if len(stages) > 1:
        published = {stage.part_of for stage in stages}
        words = f"{published.pop()}: {words}" if len(published) == 1 and "" not in published else words
    else:
        words += " only"
    return words if stages[0].scope == "block" else f"{words}, on rounded weights"


def about() -> str:
    """What the stages do that can be chosen from."""
    return "; ".join(stage.about.rstrip(".") for stage in choosable("block", "network") if stage.about) + "."


def sections() -> dict[str, str]:
    """The sections of the form and their titles; those of the stages stand together, called as they are."""
    hidden = {stage.name for stage in STAGES if not stage.offered}
    every = dict.fromkeys(name.partition(".")[0] for name in field_names() if "." in name)
    names = [name for name in every if name not in hidden]
    of_stages = {stage.name: stage.label for stage in STAGES if stage.name in names}
    others = [name for name in names if name not in of_stages]
    first = next((place for place, name in enumerate(names) if name in of_stages), len(others))
    ordered = [*others[:first], *of_stages, *others[first:]]
    return {name: of_stages.get(name) or TITLES.get(name, name) for name in ordered}
