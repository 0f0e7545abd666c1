"""Fetching a model from the Hugging Face hub: just the files that are read, and clear refusals.

First come the small files (configuration, tokenizer, index of the weights), then exactly the shards
that the index names. Repositories often carry the same weights again in other formats; those are left
where they are. Without a network the local cache answers, as long as it is complete: completeness is
checked by :class:`engine.models.weights.SafetensorsReader`, which knows what the index promises.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from engine.architecture.headers import INDEX_NAME, SINGLE_NAME, read_index
from engine.errors import EqatError, ExitCode, PreflightError, first_line
from engine.system.files import full_disk
from engine.system.hub_answers import answer_of, asking_again
from engine.system.stamps import StampedFile

SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "tokenizer.model.*", "*.vocab", "bpe.codes"]
"""What is fetched with the weights. An ending that counts towards a model's identity must not be added
without need: a run of a repository that has such a file would no longer go on."""
Result = TypeVar("Result")


def download(repo: str, revision: str | None, *, trust_remote_code: bool = False) -> Path:
    """Folder in the local cache that holds the repository's configuration, tokenizer and weights."""
    small = SMALL_FILES + (["*.py"] if trust_remote_code else [])
    folder = Path(_fetch(repo, lambda: snapshot_download(repo, revision=revision, allow_patterns=small)))
    if not (folder / "config.json").is_file():
        raise PreflightError("the repository has no config.json", where=repo, hint="check the hub id")
    index = folder / INDEX_NAME
    indexed = index.is_file() and not (folder / SINGLE_NAME).is_file()
    listed = read_index(StampedFile.of(index)).values() if indexed else [SINGLE_NAME]
    wanted = sorted(set(listed))
    if all((folder / name).is_file() for name in wanted):
        return folder
    # The commit of the folder, so that shards never mix with those of a newer commit.
    return Path(_fetch(repo, lambda: snapshot_download(repo, revision=folder.name, allow_patterns=wanted)))


def _fetch(repo: str, action: Callable[[], Result]) -> Result:
    """Run a download; every way in which it can fail becomes one sentence."""
    try:
        return asking_again(action)
    except GatedRepoError as error:
        raise PreflightError(
            "the repository is gated and this account has no access",
            where=repo,
            hint="accept its terms on the hub, then run `hf auth login`",
        ) from error
    except RevisionNotFoundError as error:
        raise PreflightError("no such revision", where=repo, hint="check model.revision") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise PreflightError(
            "is neither a local folder or file nor a repository on the hub",
            where=repo,
            hint="check the spelling; a private repository needs `hf auth login`",
        ) from error
    except LocalEntryNotFoundError as error:
        _tell_answer(repo, error)
        raise PreflightError(
            "the hub cannot be reached and the model is not complete in the local cache",
            where=repo,
            hint="go online, or name a local folder with the model",
        ) from error
    except EqatError:
        raise
    except OSError as error:
        if full_disk(error) is not None:
            raise EqatError(
                "the disk is full",
                exit_code=ExitCode.DISK_FULL,
                where=repo,
                hint="free some space, or set HF_HOME to a disk that has it",
            ) from error
        _tell_answer(repo, error)
        raise PreflightError(
            f"the download was interrupted: {first_line(error)}",
            where=repo,
            hint="run again; finished files are kept and the rest continues",
        ) from error
    except Exception as error:  # the HTTP library's own errors, which differ between hub versions
        _tell_answer(repo, error)
        raise PreflightError(
            f"the download failed: {first_line(error)}",
            where=repo,
            hint="run again; finished files are kept and the rest continues",
        ) from error


def _tell_answer(repo: str, error: Exception) -> None:
    """PreflightError where the hub itself said why it gives nothing."""
    answer = answer_of(error)
    said, hint = answer.words() if answer is not None else ("", "")
    if said:
        raise PreflightError(said, where=repo, hint=hint) from error
