"""From any exception to the one line, the remedy and the exit code that the user gets."""

from __future__ import annotations

import errno
import os

import torch

from engine.run.errors import EqatError, ExitCode

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def as_eqat_error(error: BaseException, position: str) -> EqatError:
    """``position`` says where the run was (phase, block, step)."""
    if isinstance(error, EqatError):
        return error
    if isinstance(error, torch.cuda.OutOfMemoryError):
        free, total = torch.cuda.mem_get_info()
        return EqatError(
            f"out of GPU memory: {_first_line(error)}; "
            f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB are free now",
            exit_code=ExitCode.OUT_OF_MEMORY,
            where=position,
            hint="start a new run with a smaller block_ap.batch_size or e2e_qp.micro_batch_size, or with "
            'runtime.activation_store = "disk"; or free the GPU and resume: finished blocks are kept',
        )
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return EqatError(
            "out of host memory",
            exit_code=ExitCode.OUT_OF_MEMORY,
            where=position,
            hint='start a new run with runtime.activation_store = "disk" or fewer sequences, or free memory '
            "and resume: finished blocks are kept",
        )
    if _is_disk_full(error):
        name = getattr(error, "filename", None)
        return EqatError(
            f"the disk is full{f' ({name})' if name else ''}",
            exit_code=ExitCode.DISK_FULL,
            where=position,
            hint="free some space and resume the run; finished blocks are kept",
        )
    if isinstance(error, PermissionError):
        return EqatError(
            f"no permission: {error.filename or _first_line(error)}",
            exit_code=ExitCode.PREFLIGHT,
            where=position,
        )
    return EqatError(
        f"{type(error).__name__}: {_first_line(error)}",
        exit_code=ExitCode.BUG,
        where=position,
        hint="this is a bug; the traceback is in the run's log",
    )


def _is_disk_full(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in _DISK_FULL:
        return True
    # Libraries written in Rust (tokenizers, safetensors) raise types of their own, with the system's words.
    return os.strerror(errno.ENOSPC) in str(error)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or ["no message"])[0][:300]
