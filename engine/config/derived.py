"""What follows from a configuration and the machine it is made on: values that were left out, whole paths.

Fields that may be left out (``None``) are derived by their section (``resolved``) from the grid and from its
other fields, so a resolved configuration has no learning rate left that training would have to guess.
"""

from __future__ import annotations

import os

import msgspec

from engine.config.base import field_types
from engine.config.calibration import mixture, with_source
from engine.config.fields import value_of
from engine.config.run import RunConfig, silent_sections
from engine.config.stage_section import StageSection
from engine.config.tasks import TASKS, lm_task
from engine.config.validation import convert
from engine.config.writing import to_dict


def resolve(config: RunConfig) -> RunConfig:
    """``config`` with every derived value filled in; resolving twice changes nothing.

    The section of an extension that the run does not use stays as it is: it says nothing, and is to stay so.
    """
    used = [name for name in field_types(type(config)) if name not in silent_sections(config)]
    sections = {name: getattr(config, name) for name in used}
    derived = {
        name: section.resolved(config.grid)
        for name, section in sections.items()
        if isinstance(section, StageSection)
    }
    return msgspec.structs.replace(config, **derived)


def absolute_paths(config: RunConfig) -> RunConfig:
    """``config`` with local sources made absolute, so that a run resumes from any working directory."""

    def absolute(source: str) -> str:
        path = os.path.expanduser(source)  # os.path, not Path: it takes any text without raising
        return os.path.realpath(path) if source and os.path.exists(path) else source

    names = (
        "model.source",
        "imported.reference",
        "data.source",
        "instructions.source",
        "evaluation.data.source",
    )
    sources = {name: found for name in names if (found := value_of(config, name)) is not None}
    tree = to_dict(config)
    for name, source in sources.items():
        *sections, field = name.split(".")
        node = tree
        for section in sections:
            node = node[section]
        node[field] = absolute(source)
    if mix := mixture(config.data):
        tree["data"]["mix"] = [with_source(part, absolute) for part in mix]
    evaluation = tree["evaluation"]
    evaluation["texts"] = [with_source(text, absolute, share=False) for text in evaluation["texts"]]
    evaluation["tasks"] = [
        name if name in TASKS or lm_task(name) is not None else absolute(name) for name in evaluation["tasks"]
    ]
    evaluation["task_folder"] = absolute(evaluation["task_folder"])
    return convert(tree)
