"""What ``eqat eval`` measured of a run's quantized model otherwise than the run itself was measured: on
another text, at another context or by another protocol; ``eval/measured.json``.

The run's own measure stays what it is. The file has one result a version of the model, a text, a context and
a protocol, the newest; a new measurement replaces its own and leaves the others.
"""

from __future__ import annotations

from collections.abc import Iterable
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
from engine.run.measures import Divergence
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

    @property
    def is_asked(self) -> bool:
        """Whether anything is to be otherwise than in the run."""
        return self != How()


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


class _File(msgspec.Struct, kw_only=True):
    schema: int = 1
    results: list[Measured] = []


def as_asked(config: RunConfig, how: How) -> RunConfig:
    """``config`` as its model is to be measured.

    Raises:
        UsageError: for a text that is none, or a number that cannot be.
    """
    changes: dict[str, Any] = {"evaluation.enabled": True, "evaluation.tasks": ()}
    if how.texts:
        changes["evaluation.data"] = how.texts
    others = {
        "evaluation.sequence_length": how.sequence_length,
        "evaluation.windows": how.windows,
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
    "model.bos": "--bos",
}
"""What one types for a field where something is measured."""


def by_flags(error: EqatError) -> EqatError:
    """The same error of somebody who has typed flags."""
    where, hint = error.where, error.hint
    for field, flag in FLAGS.items():
        where, hint = where.replace(field, flag), hint.replace(field, flag)
    return EqatError(error.message, exit_code=error.exit_code, where=where, hint=hint)


def refuse_endless(config: RunConfig) -> None:
    """UsageError for a text that is streamed and has no end that anybody would wait for."""
    for data in config.evaluation.every_text() if not config.evaluation.windows else ():
        name = origin(data)
        if name in CORPORA and CORPORA[name].test_characters is None and not is_path(data.source):
            raise UsageError(f"{name} is too long to be read whole", where="--data", hint="--windows 256")


def measured(run: RunDirectory) -> list[Measured]:
    """What was measured, the oldest first; nothing where nothing was, or where the file is none of ours."""
    try:
        return read_struct(run.eval_dir / MEASURED, _File, root=run.path).results[-MOST_RESULTS:]
    except EqatError:
        return []


def keep(run: RunDirectory, found: Iterable[Measured]) -> None:
    """Write results beside those that are there.

    Raises:
        EqatError: where the run is not this user's, or the disk is full.
    """
    run.require_own()
    results = {one.key: one for one in measured(run)}
    for one in found:
        results.pop(one.key, None)  # the newest is the last
        results[one.key] = one
    make_folder(run.eval_dir, root=run.path, mode=FOLDER_MODE)
    atomic_write_json(
        run.eval_dir / MEASURED, _File(results=list(results.values())[-MOST_RESULTS:]), root=run.path
    )
