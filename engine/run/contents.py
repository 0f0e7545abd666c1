"""The names of what lies in a run, so that nothing else is ever taken for ours.

Whoever deletes asks here. A pattern that is a little too wide (``*.tmp``, everything in ``cache/``) deletes a
file of the user's some day; so every name is spelled as the code that writes it spells it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal, get_args

from engine.config.formats import FORMATS
from engine.system.temporary import temporary_of

CONFIG = "config.toml"
FILES = (
    *(CONFIG, "run.json", "origin.json", "lock", "status.json", "launch.json", "submitted.json"),
    "events.jsonl",
)
"""Files at the top of a run. Only the configuration is there from the beginning."""
FOLDERS = ("control", "logs", "checkpoints", "cache", "eval", "export")
"""Folders at the top of a run, all made with it. The end of a run removes ``cache``."""
PARTIAL, FAILED, OLD = ".partial", ".failed", ".old"
LEFTOVERS = (PARTIAL, FAILED, OLD)
"""What an export that was cut off, failed its verification or was replaced is called besides its format."""
BENCH = "bench.json"
"""What ``eqat bench`` measured, in ``eval/``."""
MEASURED = "measured.json"
"""What ``eqat eval`` measured there otherwise than the run does."""

REMOVED = ".removed-"
"""Begins the name of a run whose deletion has begun."""

_REMOVED = re.compile(re.escape(REMOVED) + r".+-[0-9a-f]{8}", re.DOTALL)
StreamName = Literal["full", "quantized", "teacher"]
"""What the activation streams are called: Block-AP's two, and the one that a training learns from."""
STREAM_NAMES = "|".join(get_args(StreamName))
"""The same as a regular expression."""
# The engine's activations: where they live while it computes, and as they are stored for a resumption.
_RANK = "(?:-[1-9][0-9]{0,3})?"
_ACTIVATIONS = re.compile(
    rf"(?:(?:{STREAM_NAMES}|evaluation(?:-full)?){_RANK}|tasks-[0-9]{{1,9}})\.bin",
)
_STREAM = re.compile(rf"streams-[0-9]{{3,9}}-(?:{STREAM_NAMES})\.raw")
REQUEST = re.compile(r"([0-9]{20}-[0-9a-f]{8})\.(?:json|done)")
"""A request to an engine, open or answered; its id."""
LOG = re.compile(r"attempt-([0-9]{3,9})(?:-rank-[1-9][0-9]{0,3})?\.log")
"""The output of an attempt, of the first process of several or of another one; the attempt's number."""
JOB_LOG = re.compile(r"slurm-[0-9]{1,10}\.log")
"""What a job of a cluster's has told that makes the run."""
DIGEST = re.compile(r"[0-9a-f]{64}")
"""SHA-256 of what it is the name of."""
GENERATION = re.compile(rf"generation-([0-9]{{6,9}})(?:-({DIGEST.pattern}))?\.json")
"""A generation of checkpoints; its number and, since schema 3, its digest."""
SPARE = re.compile(rf"spare-([0-9]{{6,9}})-({DIGEST.pattern})\.json")
"""The copy of one."""
OBJECT = re.compile(rf"({DIGEST.pattern})\.safetensors")
"""Tensors of a checkpoint; their digest."""
# A folder that had a checkpoint file's name and was set aside (engine.run.objects).
_ASIDE = re.compile(r"(.+)\.aside-[0-9a-f]{8}", re.DOTALL)
# What the model wrote for a run, by a digest of what decided it.
_OWN_TEXT = re.compile(r"own-text-[0-9a-f]{40}\.safetensors")
# Tokenized text, and such a file that is being written.
_TEXT = re.compile(r"[0-9a-f]{40}\.(?:safetensors|tokenizer\.json)")
_UNFINISHED_TEXT = re.compile(r"\.[0-9a-f]{12}-[a-z0-9_]{8}")


def is_unfinished_at_top(name: str) -> bool:
    """A file at the top of a run that was being written, or that was made to see whose files are made there
    (``engine.system.ownership``)."""
    of = temporary_of(name)
    return of in (*FILES, "owner") or is_own_text(of)


def belongs_at_top(name: str) -> bool:
    """Whether a run has this at its top, or a half-written file for it."""
    return name in FILES or name in FOLDERS or is_own_text(name) or is_unfinished_at_top(name)


def own_text_name(key: str) -> str:
    """Of the file with the model's own text that ``key`` decided (``engine.phases.own_text``)."""
    return f"own-text-{key}.safetensors"


def is_own_text(name: str) -> bool:
    """Whether a run keeps the model's own text in a file of this name."""
    return _OWN_TEXT.fullmatch(name) is not None


def is_removed_run(name: str) -> bool:
    """Whether a run that is being deleted is called so."""
    return _REMOVED.fullmatch(name) is not None


def is_stream(name: str) -> bool:
    """A stored stream of activations, or one that was being written."""
    return _STREAM.fullmatch(temporary_of(name) or name) is not None


def is_cached(name: str) -> bool:
    """What the engine makes in ``cache/``: every file of it can be made again."""
    return is_stream(name) or _ACTIVATIONS.fullmatch(name) is not None


def is_unfinished_request(name: str) -> bool:
    """A request in ``control/`` that was being written."""
    return temporary_of(name).endswith(".json") and _is_request(temporary_of(name))


def is_unfinished_measurement(name: str) -> bool:
    """A file of ``eval/`` that was being written."""
    return temporary_of(name) in (BENCH, MEASURED)


def is_unfinished_checkpoint(name: str) -> bool:
    """A file of ``checkpoints/`` that was being written."""
    of = temporary_of(name)
    return of == "CURRENT" or is_generation(of)


def is_unfinished_object(name: str) -> bool:
    """An object of ``checkpoints/objects/`` that was being written."""
    return is_object(temporary_of(name))


def is_generation(name: str) -> bool:
    """A generation of checkpoints, or the copy of one."""
    return (GENERATION.fullmatch(name) or SPARE.fullmatch(name)) is not None


def is_object(name: str) -> bool:
    """Tensors of a checkpoint."""
    return OBJECT.fullmatch(name) is not None


def is_cached_text(name: str) -> bool:
    """Tokenized text in the user's cache or a tokenizer, or such a file that was being written
    (``engine.data.tokens``, ``engine.models.kept_tokenizer``)."""
    return _TEXT.fullmatch(name) is not None or _UNFINISHED_TEXT.fullmatch(name) is not None


def belongs_in(folder: str, name: str) -> bool:
    """Whether a run has an entry of this name in one of its folders (``checkpoints/objects`` is one, too)."""
    aside = _ASIDE.fullmatch(name)
    if aside is not None and folder.startswith("checkpoints"):
        name = aside[1]
    return _BELONGS[folder](name)


def _is_request(name: str) -> bool:
    return REQUEST.fullmatch(name) is not None


def _is_in_checkpoints(name: str) -> bool:
    name = temporary_of(name) or name
    return name in ("CURRENT", "objects") or is_generation(name)


def _is_in_export(name: str) -> bool:
    return any(name == made + ending for made in FORMATS.names() for ending in ("", *LEFTOVERS))


_BELONGS: dict[str, Callable[[str], bool]] = {
    "control": lambda name: _is_request(temporary_of(name) or name),
    "logs": lambda name: (LOG.fullmatch(name) or JOB_LOG.fullmatch(name)) is not None,
    "checkpoints": _is_in_checkpoints,
    "checkpoints/objects": lambda name: is_object(temporary_of(name) or name),
    "eval": lambda name: (temporary_of(name) or name) in (BENCH, MEASURED),
    "export": _is_in_export,
}
