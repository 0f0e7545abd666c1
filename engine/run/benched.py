"""How fast a run's exports are and what memory they take, as ``eqat bench`` measured it: ``eval/bench.json``.

The file has one result a loader, a format and a device, the newest; a new measurement replaces its own and
leaves the others.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import msgspec

from engine.errors import EqatError
from engine.run.contents import BENCH
from engine.run.directory import FOLDER_MODE, RunDirectory
from engine.system.files import atomic_write_json, make_folder
from engine.system.guarded import read_struct

MOST_TOKENS = 1_000_000
"""Of a prompt, or after it."""
MOST_RESULTS = 100
"""That are shown; a machine has not as many loaders."""
Token = Annotated[int, msgspec.Meta(ge=0)]
Positive = Annotated[float, msgspec.Meta(gt=0)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**60)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What the process that measures is asked on its standard input."""

    loader: str = ""
    """A row of the table of loaders; empty where only a prompt is wanted."""
    format: str
    folder: str
    """The export."""
    run: str
    """Its run, whose model's tokenizer makes the prompt where the export has none that transformers reads."""
    trust_remote_code: bool = False
    device: str = "auto"
    prompt_tokens: int
    new_tokens: int
    prompt: tuple[Token, ...] = ()
    forced: tuple[Token, ...] = ()
    """Tokens that follow the prompt, whatever this model finds likelier: what it predicts of each is told."""


class Measured(msgspec.Struct, kw_only=True):
    """One loader with one export."""

    loader: str
    format: str
    device: str
    """In words; the processor's is ``cpu``."""
    precision: str = ""
    """What it computes in, where that is known."""
    prefill: Positive
    """Tokens of the prompt in a second; the median of ``repeats``."""
    decode: Positive
    """Tokens after it in a second, one at a time; the same."""
    repeats: Count
    prompt_tokens: Count
    new_tokens: Count
    threads: Count
    load_seconds: float
    memory: str = "host"
    """Whose memory the two below are: ``host`` or ``gpu``."""
    model_bytes: Count | None = None
    """By how much loading and using the model made the process grow; on a GPU what is allocated."""
    peak_bytes: Count | None = None
    """The most that the process held at any time, its libraries with it; on a GPU the most allocated."""
    file_bytes: Count = 0
    """The export's files of weights."""
    agreement: Share | None = None
    """Of the tokens that ``compared_with`` predicted, the share that this one predicts there too."""
    compared_with: str | None = None
    versions: dict[str, str] = {}
    t: float = 0.0
    """When, in seconds since 1970."""

    @property
    def key(self) -> tuple[str, str, str]:
        return self.loader, self.format, self.device


class _File(msgspec.Struct, kw_only=True):
    schema: int = 1
    results: list[Measured] = []


def benched(run: RunDirectory) -> list[Measured]:
    """What was measured; nothing where nothing was, or where the file is none of ours."""
    try:
        return read_struct(run.eval_dir / BENCH, _File, root=run.path).results[:MOST_RESULTS]
    except EqatError:
        return []


def keep(run: RunDirectory, measured: Iterable[Measured]) -> None:
    """Write results beside those that are there.

    Raises:
        EqatError: where the run is not this user's, or the disk is full.
    """
    run.require_own()
    results = {one.key: one for one in (*benched(run), *measured)}
    make_folder(run.eval_dir, root=run.path, mode=FOLDER_MODE)
    atomic_write_json(run.eval_dir / BENCH, _File(results=list(results.values())), root=run.path)
