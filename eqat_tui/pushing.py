"""Sending a verified export to the Hugging Face hub, after showing what will be sent.

Nothing else of a run leaves this machine: not its log, not its text, not its checkpoints. The model card is
the export's own README.md.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from engine.errors import EqatError, ExitCode, IdentityError, PreflightError, UsageError, first_line
from engine.run.directory import RunDirectory
from engine.run.finding import shorten, typed
from engine.run.housekeeping import exports
from engine.run.shown import show_run
from eqat_tui.judging import CARD, changed_files
from eqat_tui.output import agrees, cell, counted, format_bytes, key_values, one_line, say, show, table

NETWORK = ("httpx", "httpcore", "requests", "urllib3")
"""Begin the names of the libraries that the hub's own one asks with."""
Result = TypeVar("Result")


def chosen(run: RunDirectory, format: str | None) -> dict[str, Any]:
    """The export of ``run`` that is meant, as ``eqat show --json`` has it.

    Raises:
        UsageError: where there is none, or several and none is named.
    """
    told = {row["format"]: row for row in show_run(run)["exports"]}
    # A log that somebody made up may name any folder of this machine.
    own = {name: f"{run.export_dir.name}/{name}" for name in exports(run)}
    there = {name: row for name, row in told.items() if own.get(name) == row["path"]}
    if not there:
        raise UsageError("has no export", where=run.id, hint=f"eqat export {typed(run)} writes one")
    if format is None and len(there) > 1:
        raise UsageError(
            f"has exports in {len(there)} formats", where=run.id, hint=f"--format: {', '.join(there)}"
        )
    name = format or next(iter(there))
    if name not in there:
        raise UsageError(
            f"has no export in {name!r}",
            where=run.id,
            hint=f"there is {', '.join(there)}; eqat export writes others",
        )
    if not there[name]["verified"]:
        raise UsageError(
            f"the export in {name} was not verified", where=run.id, hint="eqat export writes it again"
        )
    return there[name]


def push(
    run: RunDirectory,
    repo: str,
    *,
    format: str | None,
    base: str | None,
    revision: str | None,
    private: bool,
    yes: bool,
) -> int:
    """Show what will be sent, ask, send it, and print where it is."""
    row = chosen(run, format)
    folder = run.path / row["path"]
    card = carded(_whole(run, folder), base)
    hub = _hub()
    say(_shown(folder, card, hub, repo, revision, private))
    if not yes and not _agreed(repo):
        say("nothing was sent")
        return ExitCode.DONE
    sent = _ask_hub(repo, lambda: _send(hub, folder, card, repo, revision, private))
    show(sent)
    return ExitCode.DONE


def _whole(run: RunDirectory, folder: Path) -> str:
    """The card of an export whose files are those that were verified.

    Raises:
        IdentityError: for one that has been changed or damaged since.
        PreflightError: where its card cannot be read.
    """
    again = f"eqat export {typed(run)} --format {folder.name} writes it again"
    if changed := changed_files(folder):
        raise IdentityError(one_line("; ".join(changed)), where=shorten(folder), hint=again)
    try:
        return (folder / CARD).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text in UTF-8"
        raise PreflightError(f"cannot be read: {why}", where=shorten(folder / CARD), hint=again) from error


def _agreed(repo: str) -> bool:
    if not sys.stdin.isatty():
        raise UsageError(
            f"would send this to {repo}, and there is no terminal to ask on",
            where="eqat push",
            hint="--yes sends it without asking",
        )
    return agrees("Send it?")


def carded(card: str, base: str | None) -> str:
    """The card, which names ``base`` as what was quantized where a local folder was.

    Raises:
        UsageError: for what is no hub id.
    """
    if base is None:
        return card
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", base):
        raise UsageError(f"{base!r} is no hub id", where="--base-model", hint="like meta-llama/Llama-2-7b-hf")
    head, found, rest = card.partition("pipeline_tag: text-generation\n")
    rest = re.sub(r"\A(base_model(_relation)?: .*\n)*", "", rest)
    return f"{head}{found}base_model: {base}\nbase_model_relation: quantized\n{rest}" if found else card


def _shown(folder: Path, card: str, hub: Any, repo: str, revision: str | None, private: bool) -> str:
    """What will be sent where, for people."""
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in _files(folder)}
    about = dict(re.findall(r"^(base_model|license): (.*)$", card.partition("\n---")[0], re.MULTILINE))
    facts = {
        "to": f"{hub.endpoint}/{repo}{f' ({revision})' if revision else ''}",
        "who sees it": "you and your organization"
        if private
        else "everybody, unless the repository is private",
        "base model": about.get("base_model", "not named: --base-model ORGANIZATION/NAME"),
        "licence": about.get("license", "not named: that of the base model holds"),
        "in all": f"{counted(len(sizes), 'file')}, {format_bytes(sum(sizes.values()))}",
    }
    rows = [[cell(name), format_bytes(size)] for name, size in sorted(sizes.items())]
    return f"{key_values(facts)}\n\n{table(rows, header=['file', 'size'], right='lr')}\n"


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]


def _hub() -> Any:
    """The hub's own library, quiet where nobody looks."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    return HfApi(library_name="eqat")


def _send(hub: Any, folder: Path, card: str, repo: str, revision: str | None, private: bool) -> str:
    from huggingface_hub import CommitOperationAdd

    hub.create_repo(repo, repo_type="model", private=private or None, exist_ok=True)
    if revision is not None:
        hub.create_branch(repo, branch=revision, exist_ok=True)
    operations = [
        CommitOperationAdd(
            path_in_repo=(name := path.relative_to(folder).as_posix()),
            path_or_fileobj=card.encode() if name == CARD else path,
        )
        for path in sorted(_files(folder))
    ]
    done = hub.create_commit(
        repo, operations=operations, commit_message="Quantized with eqat", revision=revision
    )
    return str(done.commit_url)


def _ask_hub(repo: str, ask: Callable[[], Result]) -> Result:
    """Ask the hub for something; every way in which it can refuse becomes one sentence."""
    try:
        return ask()
    except EqatError:
        raise
    except Exception as error:
        refusal = _refusal(error, repo)
        if refusal is None:
            raise
        raise refusal from error


def _refusal(error: Exception, repo: str) -> EqatError | None:
    """What an error of the hub's library means; none where it is none of its."""
    from huggingface_hub import errors

    login = "`hf auth login`, or HF_TOKEN, with a token that may write"
    said = one_line(first_line(error, 200))
    if isinstance(error, errors.HFValidationError):
        return UsageError("is no name of a repository", where=repo, hint="like your-name/model-w2g64")
    if isinstance(error, errors.LocalTokenNotFoundError):
        return PreflightError("nobody is logged in to the hub", where=repo, hint=login)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return PreflightError("HF_HUB_OFFLINE is set", where=repo, hint="unset it to send something")
    if isinstance(error, errors.HfHubHTTPError):
        status = getattr(error.response, "status_code", 0)
        if status in (401, 403):
            return PreflightError("the hub does not let this account write there", where=repo, hint=login)
        return PreflightError(f"the hub answers {status}: {said}", where=repo, hint="try again later")
    # What it raises where the network is gone depends on its release.
    if isinstance(error, OSError) or type(error).__module__.startswith(NETWORK):
        return PreflightError(f"the hub cannot be reached: {said}", where=repo, hint="try again later")
    return None
