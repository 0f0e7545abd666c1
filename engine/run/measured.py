"""What ``eqat eval`` measured of a run's quantized model otherwise than the run itself was measured: on
another text, at another context or by another protocol; ``eval/measured.json``.

The run's own measure stays what it is. The file has one result a version of the model, a text, a context and
a protocol, and one a number of a task, the newest; a new measurement replaces its own and leaves the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import msgspec

from engine.config.corpora import CORPORA, is_path, origin
from engine.config.derived import resolve
from engine.config.model import BeginOfText
from engine.config.overrides import apply_overrides
from engine.config.run import RunConfig
from engine.config.validation import validate
from engine.errors import EqatError, UsageError
from engine.run.contents import MEASURED
from engine.run.directory import FOLDER_MODE, RunDirectory
from engine.run.measures import MOST_SCORES, Divergence, TaskScore
from engine.system.files import atomic_write_json, make_folder
from engine.system.guarded import read_struct

MOST_RESULTS = 200
"""That are kept and shown, the newest."""
Positive = Annotated[float, msgspec.Meta(gt=0)]
Number = Annotated[float, msgspec.Meta(ge=0)]
Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]


class How(msgspec.Struct, frozen=True, kw_only=True):
    """What a measurement is asked to be; what is left out is as in the run."""

    texts: tuple[str, ...] = ()
    sequence_length: int | None = None
    windows: int | None = None
    bos: BeginOfText | None = None
    tasks: tuple[str, ...] = ()
    task_limit: int | None = None
    task_folder: str | None = None
    task_chat: bool | None = None

    @property
    def is_asked(self) -> bool:
        """Whether anything is to be otherwise than in the run."""
        return self != How()

    @property
    def reads_texts(self) -> bool:
        """Whether perplexity is measured: not where only tasks are named."""
        return not self.tasks or bool(self.texts) or (self.sequence_length, self.windows) != (None, None)


class MeasureRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What the process is asked on its standard input that measures a checkpoint which is none of a run."""

    source: str
    """As ``model.source`` takes it, or the folder of a quantized checkpoint."""
    reference: str = ""
    """The model whose predictions it is compared with; empty where it is not."""
    how: How = How()
    device: str = "auto"
    trust_remote_code: bool = False


class Measured(msgspec.Struct, kw_only=True):
    """A model on one text."""

    stage: str = ""
    """The version of a run's model; empty for a checkpoint that is none of a run."""
    corpus: str
    sequence_length: Count
    begin: str = ""
    """How sequences begin, in words, where that is worth a word."""
    windows: Count
    tokens: Count
    perplexity: Positive | None
    """None when it was not a finite number."""
    full_precision: Positive | None = None
    """Perplexity of the original on the same tokens, where it was read as well."""
    divergence: Divergence | None = None
    block_errors: tuple[Number | None, ...] = ()
    device: str = ""
    seconds: float = 0.0
    """For all texts that were measured at once."""
    t: float = 0.0
    """When, in seconds since 1970."""

    @property
    def key(self) -> tuple[str, str, int, str, int]:
        return self.stage, self.corpus, self.sequence_length, self.begin, self.tokens


class Asked(msgspec.Struct, kw_only=True):
    """A number of a task that a version of the model was asked."""

    stage: str
    score: TaskScore
    device: str = ""
    t: float = 0.0
    """When, in seconds since 1970."""

    @property
    def key(self) -> tuple[str, str]:
        return self.stage, self.score.name


class _File(msgspec.Struct, kw_only=True):
    schema: int = 1
    results: list[Measured] = []
    scores: list[Asked] = []


def as_asked(config: RunConfig, how: How) -> RunConfig:
    """``config`` as its model is to be measured.

    Raises:
        UsageError: for a text that is none, or a number that cannot be.
    """
    changes: dict[str, Any] = {"evaluation.enabled": True, "evaluation.tasks": how.tasks}
    if not how.tasks:
        changes["evaluation.task_folder"] = ""
    if how.texts:
        changes["evaluation.data"] = how.texts
    others = {
        "evaluation.sequence_length": how.sequence_length,
        "evaluation.windows": how.windows,
        "evaluation.task_limit": how.task_limit,
        "evaluation.task_folder": how.task_folder,
        "evaluation.task_chat": how.task_chat,
        "model.bos": how.bos,
    }
    changes |= {name: value for name, value in others.items() if value is not None}
    changed = resolve(apply_overrides(config, changes))
    validate(changed)
    return changed


FLAGS = {
    "evaluation.sequence_length": "--sequence-length",
    "evaluation.windows": "--windows",
    "evaluation.texts": "--data",
    "evaluation.data.source": "--data",
    "evaluation.data": "--data",
    "evaluation.task_limit": "--task-limit",
    "evaluation.task_folder": "--task-folder",
    "evaluation.task_chat": "--task-chat",
    "evaluation.tasks": "--tasks",
    "model.bos": "--bos",
}
"""What one types for a field where something is measured."""


def by_flags(error: EqatError) -> EqatError:
    """The same error of somebody who has typed flags."""
    where, hint = error.where, error.hint
    for field, flag in FLAGS.items():
        where, hint = where.replace(field, flag), hint.replace(field, flag)
    return EqatError(error.message, exit_code=error.exit_code, where=where, hint=hint)


def refuse_endless(config: RunConfig, how: How) -> None:
    """UsageError for a text that is streamed and has no end that anybody would wait for."""
    if not how.reads_texts:
        return
    for data in config.evaluation.every_text() if not config.evaluation.windows else ():
        name = origin(data)
        if name in CORPORA and CORPORA[name].test_characters is None and not is_path(data.source):
            raise UsageError(f"{name} is too long to be read whole", where="--data", hint="--windows 256")


def measured(run: RunDirectory) -> list[Measured]:
    """What was measured, the oldest first; nothing where nothing was, or where the file is none of ours."""
    return _kept(run).results[-MOST_RESULTS:]


def asked_later(run: RunDirectory) -> list[Asked]:
    """Numbers of tasks, likewise."""
    return [one for one in _kept(run).scores[-MOST_SCORES:] if one.score.is_sound]


def with_later(
    scores: Mapping[str, Iterable[TaskScore]], later: Iterable[Asked]
) -> dict[str, tuple[TaskScore, ...]]:
    """Numbers of tasks by stage: those of the run, and what was asked later, which is newer."""
    found = {stage: {one.name: one for one in known} for stage, known in scores.items()}
    for one in later:
        found.setdefault(one.stage, {})[one.score.name] = one.score
    return {stage: tuple(named.values())[:MOST_SCORES] for stage, named in found.items()}


def _kept(run: RunDirectory) -> _File:
    try:
        return read_struct(run.eval_dir / MEASURED, _File, root=run.path)
    except EqatError:
        return _File()


def keep(run: RunDirectory, found: Iterable[Measured], scores: Iterable[Asked] = ()) -> None:
    """Write results beside those that are there.

    Raises:
        EqatError: where the run is not this user's, or the disk is full.
    """
    run.require_own()
    results = {one.key: one for one in measured(run)}
    for one in found:
        results.pop(one.key, None)  # the newest is the last
        results[one.key] = one
    asked = {one.key: one for one in asked_later(run)}
    for score in scores:
        asked.pop(score.key, None)
        asked[score.key] = score
    file = _File(results=list(results.values())[-MOST_RESULTS:], scores=list(asked.values())[-MOST_SCORES:])
    make_folder(run.eval_dir, root=run.path, mode=FOLDER_MODE)
    atomic_write_json(run.eval_dir / MEASURED, file, root=run.path)
