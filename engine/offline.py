"""Nothing is fetched from a hub while model and text are local.

The libraries look things up by themselves: a tokenizer's newer revision, a kernel that a configuration names,
code of another repository. For a run whose every input lies on this machine none of it is wanted, and a
machine without a network would wait for each of them.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

from engine.config.calibration import texts_of
from engine.config.corpora import CORPORA
from engine.config.data import BUILTIN, OWN, DataConfig
from engine.config.model import PACKAGE, RANDOM
from engine.config.run import RunConfig
from engine.config.stages import learns_answers, stages_of
from engine.config.tasks import TASKS, lm_task

_VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
_SWITCHES = (
    ("huggingface_hub.constants", "HF_HUB_OFFLINE"),
    ("datasets.config", "HF_HUB_OFFLINE"),
    ("datasets.config", "HF_DATASETS_OFFLINE"),
)
"""Where the libraries keep what the variables said when they were imported."""


def everything_is_local(config: RunConfig) -> bool:
    """Whether model, calibration text, instructions, evaluation text and tasks all lie on this machine.

    What names neither a file nor something built in might be a hub id, also where it is in a cache; text that
    no phase reads does not count.
    """
    made = stages_of(config)
    trains = any(stage.reads_text and not learns_answers(config, stage) for stage in made)
    answers = any(learns_answers(config, stage) for stage in made)
    evaluation = config.evaluation
    return (
        _model_is_local(config.model.source)
        and (not config.imported.reference or _model_is_local(config.imported.reference))
        and (not trains or all(_text_is_local(text.data) for text in texts_of(config.data)))
        and (not answers or _text_is_local(config.instructions.data))
        and (not evaluation.enabled or all(map(_text_is_local, evaluation.every_text())))
        and (not evaluation.enabled or not any(map(_may_fetch, evaluation.tasks)))
    )


def _may_fetch(task: str) -> bool:
    """Whether its questions may come from a hub; only lm-eval knows where those of its tasks are."""
    return task in TASKS or lm_task(task) is not None


def _model_is_local(source: str) -> bool:
    return source.startswith((RANDOM, PACKAGE)) or _exists(source)


def _text_is_local(data: DataConfig) -> bool:
    name = data.source.strip()
    # `open_source` takes a corpus' name for what it stands for before it looks for a file.
    return name in (BUILTIN, OWN) or (name not in CORPORA and _exists(name))


def _exists(name: str) -> bool:
    return bool(name) and os.path.exists(os.path.expanduser(name))


@contextlib.contextmanager
def offline(when: bool) -> Iterator[None]:
    """While it lasts, and if ``when``, the hub's libraries ask no server: those that are imported already and
    those still to come."""
    if not when:
        yield
        return
    variables = {name: os.environ.get(name) for name in _VARIABLES}
    before = set(sys.modules)
    switches = {place: getattr(sys.modules.get(place[0]), place[1], None) for place in _SWITCHES}
    os.environ.update(dict.fromkeys(_VARIABLES, "1"))
    _set(dict.fromkeys(_SWITCHES, True))
    try:
        yield
    finally:
        for name, value in variables.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        # A library that was imported meanwhile read the variables of this time.
        asked = any(_is_true(variables[name]) for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
        _set({place: switches[place] if place[0] in before else asked for place in _SWITCHES})


def _is_true(value: str | None) -> bool:
    return (value or "").upper() in ("1", "ON", "YES", "TRUE")


def _set(values: dict[tuple[str, str], bool | None]) -> None:
    for (module, name), value in values.items():
        # Only a library that has the switch gets a value.
        if hasattr(sys.modules.get(module), name) and value is not None:
            setattr(sys.modules[module], name, value)
