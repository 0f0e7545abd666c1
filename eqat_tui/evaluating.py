"""``eqat eval``: what is to be measured, of a run or of a checkpoint that is none of a run, and the words for
what came of it."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import msgspec

from engine.config.calibration import with_source
from engine.config.corpora import is_hub_id
from engine.config.formats import FORMATS
from engine.config.lists import members
from engine.config.model import PACKAGE, RANDOM, TINY_MODEL, BeginOfText, ModelConfig
from engine.config.run import RunConfig
from engine.config.tasks import QUESTIONS, require_lm_eval
from engine.errors import DataError, EqatError, ExitCode, UsageError
from engine.plan.local_files import refuse_missing, refuse_no_text
from engine.run.directory import RunDirectory
from engine.run.measured import How, MeasureRequest, as_asked, by_flags, refuse_endless
from engine.run.proof import is_run
from engine.run.shown import json_safe
from engine.system.files import atomic_write, existing, is_virtual
from eqat_tui.asking import answer_of
from eqat_tui.divergence_text import results_table
from eqat_tui.output import (
    cell,
    colour_wanted,
    counted,
    format_seconds,
    one_line,
    print_json,
    say,
    show,
)
from eqat_tui.run_text import score_table

Tree = Mapping[str, Any]


# -- what is asked ------------------------------------------------------------------------------------


class Tasks(NamedTuple):
    """What was typed of tasks."""

    names: Sequence[str] = ()
    limit: int | None = None
    folder: str | None = None
    chat: bool = False

    def check(self) -> None:
        """UsageError for what is typed about tasks where none is named, and for a folder that is none."""
        if not self.names and (self.limit is not None or self.folder is not None or self.chat):
            raise UsageError("names no task", where="--tasks", hint="winogrande, piqa, gsm8k, mmlu:5, ...")
        if self.folder is not None and not os.path.isdir(os.path.expanduser(self.folder)):
            raise DataError("no such folder", where=self.folder, hint="check --task-folder")


def how_of(
    data: Sequence[str] | None,
    length: int | None,
    windows: int | None,
    bos: str | None,
    tasks: Tasks = Tasks(),  # noqa: B008  # it is not changed
) -> How:
    """What was typed; local texts become absolute, since an engine may work elsewhere.

    Raises:
        UsageError: for a text, a number or a protocol that cannot be.
    """
    if data is not None and not any(members(text) for text in data):
        raise UsageError("names no text", where="--data", hint="wikitext2, c4, builtin, or a path")
    if bos is not None and bos not in get_args(BeginOfText):
        raise UsageError(f"there is no {bos!r}", where="--bos", hint=", ".join(get_args(BeginOfText)))
    tasks.check()
    texts = [text for typed in data or () for text in ([typed] if _is_file(typed) else members(typed))]
    how = How(
        texts=tuple(with_source(text, _absolute, share=False) for text in texts),
        sequence_length=length,
        windows=windows,
        bos=bos,  # type: ignore[arg-type]
        tasks=tuple(_absolute(name) if name.endswith(QUESTIONS) else name for name in _names(tasks.names)),
        task_limit=tasks.limit,
        task_folder=None if tasks.folder is None else _absolute(tasks.folder),
        task_chat=tasks.chat or None,
    )
    # What is wrong with a text or a number does not depend on the model.
    try:
        config = as_asked(RunConfig(model=ModelConfig(source=TINY_MODEL)), how)
        require_lm_eval(how.tasks)
    except EqatError as error:
        raise by_flags(error) from error
    for text in config.evaluation.every_text():
        refuse_no_text(text.source, "--data")
    for task in how.tasks:
        if task.endswith(QUESTIONS):
            refuse_missing(task, "check --tasks")
    return how


def _names(typed: Sequence[str]) -> list[str]:
    return [name for text in typed for name in ([text] if _is_file(text) else members(text))]


def _is_file(text: str) -> bool:
    """A name with a comma in it is that of one file, if there is such a file."""
    return os.path.exists(os.path.expanduser(text))


def _absolute(source: str) -> str:
    path = os.path.expanduser(source)
    return os.path.realpath(path) if source and os.path.exists(path) else source


def checkpoint_of(target: str) -> str | None:
    """What is meant where it is a checkpoint, as :class:`MeasureRequest` takes it; none for a run.

    Raises:
        UsageError: for a path that is neither.
    """
    if not target:
        raise UsageError("is empty", where="RUN|MODEL", hint="name a run, or a checkpoint")
    if target.startswith((RANDOM, PACKAGE)):
        return target
    path = os.path.expanduser(target)
    if not os.path.exists(path):
        return target if is_hub_id(target) and not target.startswith(".") else None
    place = Path(path).resolve()
    run = next((folder for folder in (place, *place.parents) if is_run(folder)), None)
    if _is_checkpoint(place):
        return str(place)
    if run is not None:
        return None
    raise UsageError(
        "is not a run directory, and no checkpoint either",
        where=target,
        hint="a checkpoint has a config.json, or is a .gguf file",
    )


def _is_checkpoint(place: Path) -> bool:
    """A file or a folder that some reader may open; whether it can is for the reader to say."""
    if place.is_file():
        return place.suffix == ".gguf"
    return os.path.exists(place / "config.json") or any(
        any(place.glob(f"*.{name}")) for name in ("gguf", "onnx") if name in FORMATS
    )


def request_of(
    source: str, reference: str | None, how: How, device: str | None, trust_remote_code: bool
) -> MeasureRequest:
    """What the process that measures is asked.

    Raises:
        UsageError: for what is no device, and an empty reference.
    """
    if reference == "":
        raise UsageError("is empty", where="--reference", hint="name the model")
    refuse_endless(as_asked(RunConfig(model=ModelConfig(source=TINY_MODEL)), how), how)
    runtime = msgspec.structs.replace(RunConfig().runtime, device=device or "auto")
    runtime.check("runtime")
    return MeasureRequest(
        source=source,
        reference=os.path.expanduser(reference or ""),
        how=how,
        device=runtime.device,
        trust_remote_code=trust_remote_code,
    )


def arguments_of(run: RunDirectory, how: How) -> list[str]:
    """Of an engine that measures the run so.

    Raises:
        UsageError: where the run's settings and what is asked do not fit.
    """
    if how.is_asked:
        refuse_endless(as_asked(run.config(), how), how)
    args = [part for text in how.texts for part in ("--text", text)]
    for name, value in (("--context", how.sequence_length), ("--windows", how.windows), ("--bos", how.bos)):
        args += [] if value is None else [name, str(value)]
    for name, given in (("--task-limit", how.task_limit), ("--task-folder", how.task_folder)):
        args += [] if given is None else [name, str(given)]
    args += [part for task in how.tasks for part in ("--ask", task)]
    return [*args, *(["--task-chat"] if how.task_chat else [])]


# -- a checkpoint -------------------------------------------------------------------------------------


def measure(request: MeasureRequest, out: Path | None, *, as_json: bool) -> int:
    """Measure a checkpoint in a process of its own, print what came of it, write it to ``out``.

    Raises:
        EqatError: for what cannot be measured, or written.
    """
    if out is not None:
        out = _writable(out)
    moving = colour_wanted(sys.stderr) and not as_json
    found = answer_of("engine.export.measuring", request, "measured", where="eqat eval", heard=_told(moving))
    if moving:
        say("\r\033[K", end="")
    for warning in found["warnings"]:
        say(f"warning: {one_line(warning)}")
    tree = json_safe(found)
    if out is not None:
        atomic_write(out, msgspec.json.format(msgspec.json.encode(tree), indent=2) + b"\n")
    if as_json:
        print_json(tree)
    else:
        show(checkpoint_text(found))
    return ExitCode.DONE


def _writable(out: Path) -> Path:
    """Where the file is to be, before anything is measured.

    Raises:
        UsageError: where it cannot be written.
    """
    place = Path(os.path.expanduser(out)).absolute()
    folder = place.parent
    if place.is_dir():
        raise UsageError("is a folder", where="--out", hint="name a file")
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK) or is_virtual(existing(folder)):
        raise UsageError(f"cannot be written in {folder}", where="--out", hint="name a file elsewhere")
    return place


def _told(moving: bool) -> Callable[[Tree], None]:
    """Says on the terminal what is done, how far it is and how long it will take; where lines cannot be
    written over, only what is done."""
    begun = 0.0

    def heard(said: Tree) -> None:
        nonlocal begun
        if "doing" in said:
            say(f"\r\033[K{said['doing']}" if moving else str(said["doing"]), end="" if moving else "\n")
        elif "done" in said and moving:
            begun = begun or time.monotonic()
            done, of = int(said["done"]), max(1, int(said["of"]))
            left = (time.monotonic() - begun) * (of - done) / max(1, done)
            say(f"\r\033[Kmeasuring: {100 * done // of} %, {format_seconds(left)} left", end="")

    return heard


# -- words --------------------------------------------------------------------------------------------


def checkpoint_text(found: Tree) -> str:
    """What was measured of a checkpoint, for a person."""
    name = f"{cell(found['source'], 200)}: {found['label']}, {cell(found['model_type'])}"
    against = f"\n  against {cell(found['reference'], 200)}" if found["reference"] else ""
    tables = [results_table(found["measured"])] if found["measured"] else []
    tables += [score_table({"": found["scores"]})] if found["scores"] else []
    return "\n\n".join([f"{name} with {counted(found['blocks'], 'block')}{against}", *tables])


def told_of_run(shown: Tree) -> str:
    """What is kept of a run beside its own measure, after one more was measured."""
    tables = [results_table(shown["measured"])] if shown["measured"] else []
    tables += [score_table(shown["scores"])] if shown["scores"] else []
    return "\n\n".join(tables)
