"""``eqat bench``: each loader that is installed measures an export in a process of its own, and is told of
here.

The first one that works is what the others are compared with: at 16 bits, where PyTorch has room for that.
They read the same prompt and are fed the same tokens after it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import msgspec

from engine.config.formats import FORMATS
from engine.config.loaders import LOADERS, loaders_of, unread
from engine.errors import EqatError, ExitCode, PreflightError, UsageError
from engine.run.benched import MOST_TOKENS, Measured, Request, keep
from engine.run.directory import RunDirectory
from engine.run.finding import typed
from engine.run.housekeeping import exports
from engine.run.liveness import look
from eqat_tui.asking import answer_of
from eqat_tui.bench_text import FAILED, MEASURED, MISSING

Heard = Callable[[str], None]


def check_tokens(prompt_tokens: int, new_tokens: int) -> None:
    """UsageError for numbers of tokens that cannot be timed."""
    for name, count, least in (("--prompt-tokens", prompt_tokens, 1), ("--new-tokens", new_tokens, 2)):
        if not least <= count <= MOST_TOKENS:
            raise UsageError(f"{count} is not between {least} and {MOST_TOKENS:,}", where=name)


def checked_device(run: RunDirectory, asked: str | None) -> str:
    """Where to measure: as asked for, else where the run was to be.

    Raises:
        UsageError: for what is no device.
    """
    runtime = run.config().runtime
    if asked is not None:
        runtime = msgspec.structs.replace(runtime, device=asked)
        runtime.check("runtime")
    return runtime.device


def exported_formats(run: RunDirectory, wanted: Sequence[str]) -> list[str]:
    """The formats that ``run`` has an export in, or those of them that are ``wanted``.

    Raises:
        UsageError: where there is none.
        PreflightError: where an engine is at work on the run.
    """
    if (work := look(run).work) is not None:
        raise PreflightError(
            "an engine works on it, which would be measured too",
            where=run.id,
            hint=f"eqat stop {typed(run)}" if work.task == "run" else "wait until it is done",
        )
    there = [name for name in FORMATS.names() if name in exports(run)]
    lacking = [name for name in wanted if name not in there]
    if lacking or not there:
        what = f"has no export in the format {lacking[0]}" if lacking else "has no export"
        name = lacking[0] if lacking else "gguf,mlx"
        raise UsageError(what, where=run.id, hint=f"eqat export {typed(run)} --format {name} writes one")
    return list(wanted) or there


def bench(
    run: RunDirectory,
    formats: Sequence[str],
    *,
    prompt_tokens: int,
    new_tokens: int,
    device: str,
    heard: Heard,
) -> dict[str, Any]:
    """What each loader made of each of these exports; what was measured is kept in the run where it can be.

    Raises:
        EqatError: where there is no prompt.
    """
    request = Request(
        format=formats[0],
        folder=str(run.export_dir / formats[0]),
        run=str(run.path),
        trust_remote_code=run.config().model.trust_remote_code,
        device=device,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
    )
    heard("reading the prompt")
    request = msgspec.structs.replace(request, prompt=tuple(_asked(request, heard, "prompt")["prompt"]))
    rows: list[dict[str, Any]] = []
    compared_with, results = "", []
    for loader, name in loaders_of(formats):
        row = {"loader": loader.name, "label": loader.label, "format": name}
        heard(f"{loader.label}, {name}")
        if missing := [module for module in loader.modules if find_spec(module) is None]:
            problem = f"{missing[0]} is not installed"
            rows.append({**row, "status": MISSING, "problem": problem, "hint": loader.install})
            continue
        asked = msgspec.structs.replace(
            request, loader=loader.name, format=name, folder=str(run.export_dir / name)
        )
        try:
            said = _asked(asked, heard, "measured")
        except EqatError as error:
            rows.append({**row, "status": FAILED, "problem": error.message, "hint": error.hint})
            continue
        found = msgspec.convert(said["measured"], Measured)
        if compared_with:
            found.compared_with = compared_with
        else:
            compared_with = f"{loader.name}, {name}"
            request = msgspec.structs.replace(request, forced=tuple(said["tokens"]))
        results.append(found)
        rows.append({**row, "status": MEASURED, **msgspec.to_builtins(found)})
    if results:
        _keep(run, results, heard)
    return {"id": run.id, "path": str(run.path), "rows": rows, "unread": unread(formats)}


def _keep(run: RunDirectory, results: Sequence[Measured], heard: Heard) -> None:
    try:
        keep(run, results)
    except EqatError as error:  # they took minutes, and are shown all the same
        heard(f"warning: what was measured is not kept in the run: {error}")


def outcome(found: Mapping[str, Any]) -> int:
    """The exit code: done where anything was measured that computes with an export as it is packed, or where
    there is nothing packed to measure; else it cannot be done here."""
    rows = found["rows"]
    packed = [row for row in rows if LOADERS[row["loader"]].formats] or rows
    return ExitCode.DONE if any(row["status"] == MEASURED for row in packed) else ExitCode.PREFLIGHT


def _asked(request: Request, heard: Heard, answer: str) -> dict[str, Any]:
    """What the process that measures says at its end.

    Raises:
        EqatError: what it refuses, or how it died.
    """
    return answer_of("engine.bench", request, answer, where="eqat bench")
