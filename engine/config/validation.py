"""Every rule about a configuration's values, in one place.

A refusal names the field as ``--set`` would (``block_ap.batch_size``), says what is wrong with the value,
and hints at what works. Rules that need the model or the machine (does the group size divide a layer, does
it fit in memory) are the plan's; nothing here opens a file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import msgspec

from engine.config.base import describe, field_types, is_section
from engine.config.block_ap import BlockAPConfig
from engine.config.data import DataConfig
from engine.config.e2e_qp import E2EQPConfig
from engine.config.evaluation import TASKS, EvaluationConfig
from engine.config.formats import refuse_unknown
from engine.config.grid import BITS, GROUP_SIZES, GridConfig
from engine.config.run import RunConfig
from engine.config.runtime import RuntimeConfig
from engine.errors import UsageError

_LARGEST = 2**31 - 1
_LARGEST_SEED = 2**63 - 1  # what TOML and torch.manual_seed both hold


def convert(tree: Mapping[str, Any]) -> RunConfig:
    """A tree of plain values as a :class:`RunConfig`; a wrong type is a :class:`UsageError`."""
    try:
        return msgspec.convert(tree, RunConfig)
    except msgspec.ValidationError as error:
        # msgspec says "Expected `int`, got `str` - at `$.block_ap.train[0]`".
        what, _, path = str(error).partition(" - at `$")
        where = path.strip(".`")
        raise UsageError(what.replace("`", ""), where=where or "config", hint=_takes(where)) from error


def _takes(where: str) -> str:
    """What the field at ``where`` takes, in words."""
    kind: Any = RunConfig
    for part in re.sub(r"\[.*?\]", "", where).split("."):
        kind = field_types(kind).get(part) if is_section(kind) else None
    return describe(kind) if kind is not None else ""


def validate(config: RunConfig) -> None:
    """Raise :class:`UsageError` for the first field whose value cannot work."""
    convert(msgspec.to_builtins(config))  # structs made in Python are not type-checked when made
    _text("name", config.name)
    _text("model.source", config.model.source, hint="--model takes a directory, a hub id or a .gguf file")
    _optional_text("model.revision", config.model.revision)
    _grid(config.grid)
    _data("data", config.data)
    _block_ap(config.block_ap, symmetric=config.grid.symmetric)
    _e2e_qp(config.e2e_qp, symmetric=config.grid.symmetric)
    _evaluation(config.evaluation)
    refuse_unknown("export.formats", config.export.formats)
    _unique("export.formats", config.export.formats)
    # A file has a header; below a KiB there would be more files than a folder can hold.
    _between("export.shard_gib", config.export.shard_gib, 1e-6, 1e6)
    _runtime(config.runtime)


def _grid(grid: GridConfig) -> None:
    if grid.bits not in BITS:
        raise UsageError(f"cannot be {grid.bits}", where="grid.bits", hint=f"one of {_list(BITS)}")
    if grid.group_size not in GROUP_SIZES:
        raise UsageError(
            f"cannot be {grid.group_size}",
            where="grid.group_size",
            hint=f"one of {_list(GROUP_SIZES)}, where -1 is the whole row",
        )
    # Far above 10 the largest error alone decides, and |error|^p leaves the range of float32.
    _between("grid.search_norm", grid.search_norm, 0.1, 10.0)


def _data(name: str, data: DataConfig) -> None:
    _text(f"{name}.source", data.source, hint="builtin, a shortcut such as c4, a hub id, or a path")
    for field in ("subset", "split", "column", "revision"):
        _optional_text(f"{name}.{field}", getattr(data, field))


def _block_ap(block_ap: BlockAPConfig, *, symmetric: bool) -> None:
    name = "block_ap"
    train = tuple(what for what in block_ap.train if not (symmetric and what == "zero_points"))
    _trained(f"{name}.train", block_ap.train, train, enabled=block_ap.enabled)
    _sequences(name, block_ap)
    _learning_rate(f"{name}.lr_weight", block_ap.lr_weight)
    _learning_rate(f"{name}.lr_quant", block_ap.lr_quant)
    _schedule(name, block_ap)


def _e2e_qp(e2e_qp: E2EQPConfig, *, symmetric: bool) -> None:
    name = "e2e_qp"
    if symmetric and "zero_points" in e2e_qp.train and e2e_qp.enabled:
        raise UsageError(
            "a symmetric grid has no zero points to train",
            where=f"{name}.train",
            hint='["scales"], or grid.symmetric = false',
        )
    _trained(f"{name}.train", e2e_qp.train, e2e_qp.train, enabled=e2e_qp.enabled)
    _sequences(name, e2e_qp)
    _count(f"{name}.micro_batch_size", e2e_qp.micro_batch_size)
    if e2e_qp.batch_size % e2e_qp.micro_batch_size:
        divisors = [n for n in range(1, min(e2e_qp.batch_size, 1024) + 1) if e2e_qp.batch_size % n == 0]
        raise UsageError(
            f"{e2e_qp.micro_batch_size} does not divide {name}.batch_size = {e2e_qp.batch_size}",
            where=f"{name}.micro_batch_size",
            hint=f"one of {_list(divisors)}",
        )
    _learning_rate(f"{name}.lr", e2e_qp.lr)
    _between(f"{name}.warmup_fraction", e2e_qp.warmup_fraction, 0.0, 1.0)
    _schedule(name, e2e_qp)


def _sequences(name: str, phase: BlockAPConfig | E2EQPConfig) -> None:
    _count(f"{name}.sequences", phase.sequences)
    _count(f"{name}.val_sequences", phase.val_sequences, least=0)
    # The last token of a sequence has no next one: with fewer than two there is nothing to predict.
    _count(f"{name}.sequence_length", phase.sequence_length, least=2)
    _count(f"{name}.batch_size", phase.batch_size)
    _count(f"{name}.epochs", phase.epochs)
    if phase.enabled and phase.batch_size > phase.sequences:
        raise UsageError(
            f"{phase.batch_size} is more than {name}.sequences = {phase.sequences}",
            where=f"{name}.batch_size",
            hint=f"at most {phase.sequences}",
        )


def _schedule(name: str, phase: BlockAPConfig | E2EQPConfig) -> None:
    _between(f"{name}.lr_final_fraction", phase.lr_final_fraction, 0.0, 1.0)
    _between(f"{name}.weight_decay", phase.weight_decay, 0.0, 1.0)
    _not_negative(f"{name}.grad_clip", phase.grad_clip, hint="0 turns clipping off")
    _count(f"{name}.patience", phase.patience, least=0)
    if phase.enabled and phase.patience and not phase.val_sequences:
        raise UsageError(
            f"early stopping needs a validation loss, and {name}.val_sequences is 0",
            where=f"{name}.patience",
            hint=f"{name}.patience = 0, or {name}.val_sequences = 16",
        )


def _evaluation(evaluation: EvaluationConfig) -> None:
    _data("evaluation.data", evaluation.data)
    _count("evaluation.sequence_length", evaluation.sequence_length, least=2)
    _count("evaluation.windows", evaluation.windows, least=0)
    _count("evaluation.batch_size", evaluation.batch_size)
    _count("evaluation.task_limit", evaluation.task_limit, least=0)
    names = [name if name in TASKS else PurePath(name).stem for name in evaluation.tasks]
    for name in evaluation.tasks:
        if name not in TASKS and not name.endswith(".jsonl"):
            raise UsageError(
                f"there is no task {name!r}",
                where="evaluation.tasks",
                hint=f"{', '.join(TASKS)}, or a .jsonl file of questions",
            )
    if len(set(names)) < len(names):
        raise UsageError("two tasks have the same name", where="evaluation.tasks", hint="name each once")


def _runtime(runtime: RuntimeConfig) -> None:
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", runtime.device, re.ASCII):
        raise UsageError(
            f"cannot be {runtime.device!r}", where="runtime.device", hint="auto, cpu, cuda or cuda:N"
        )
    _count("runtime.seed", runtime.seed, least=0, most=_LARGEST_SEED)
    _count("runtime.threads", runtime.threads, least=0, most=4096)
    _not_negative("runtime.host_memory_gib", runtime.host_memory_gib, hint="0 takes what is free")
    # At most a year: 0 is how to have none.
    _between("runtime.checkpoint_minutes", runtime.checkpoint_minutes, 0.0, 525_600.0)
    _between("runtime.checkpoint_share", runtime.checkpoint_share, 0.0001, 1.0)


# -- the checks themselves -----------------------------------------------------------------------------


def _text(name: str, value: str, *, hint: str = "") -> None:
    if not value.strip():
        raise UsageError("is empty", where=name, hint=hint)
    if not value.isprintable():
        raise UsageError(f"holds characters that cannot be printed: {value!r}", where=name)


def _optional_text(name: str, value: str | None) -> None:
    if value is not None:
        _text(name, value, hint="leave it out for the default")


def _count(name: str, value: int, *, least: int = 1, most: int = _LARGEST) -> None:
    if not least <= value <= most:
        limit = f"at least {least}" if value < least else f"at most {most}"
        raise UsageError(f"cannot be {value}", where=name, hint=limit)


def _finite(name: str, value: float) -> None:
    if not math.isfinite(value):
        raise UsageError(f"cannot be {value}", where=name, hint="a finite number")


def _not_negative(name: str, value: float, *, hint: str) -> None:
    _finite(name, value)
    if value < 0:
        raise UsageError(f"cannot be {value:g}", where=name, hint=f"at least 0; {hint}")


def _between(name: str, value: float, least: float, most: float) -> None:
    _finite(name, value)
    if not least <= value <= most:
        raise UsageError(f"cannot be {value:g}", where=name, hint=f"from {least:g} to {most:g}")


def _learning_rate(name: str, value: float | None) -> None:
    if value is None:
        return
    _finite(name, value)
    if value <= 0:
        raise UsageError(
            f"cannot be {value:g}", where=name, hint="above 0; what is not to move is left out of `train`"
        )


def _trained(name: str, given: tuple[str, ...], effective: tuple[str, ...], *, enabled: bool) -> None:
    _unique(name, given)
    if enabled and not effective:
        phase = name.split(".", 1)[0]
        reason = "a symmetric grid has no zero points to train" if given else "trains nothing"
        raise UsageError(reason, where=name, hint=f"name what to train, or {phase}.enabled = false")


def _unique(name: str, values: tuple[str, ...]) -> None:
    twice = [value for index, value in enumerate(values) if value in values[:index]]
    if twice:
        raise UsageError(f"names {twice[0]!r} twice", where=name)


def _list(values: tuple[int, ...] | list[int]) -> str:
    return ", ".join(map(str, values))
