"""From any exception to the one line, the remedy and the exit code that the user gets."""

from __future__ import annotations

import re

import msgspec
import torch

from engine.config.run import RunConfig
from engine.errors import EqatError, ExitCode, first_line
from engine.plan.machine import Machine
from engine.plan.plan import out_of_memory_remedy
from engine.system.files import full_disk


def as_eqat_error(
    error: BaseException, position: str, config: RunConfig | None = None, machine: Machine | None = None
) -> EqatError:
    """``position`` says where the run was (phase, block, step).

    With the configuration and the machine it ran on, a GPU that is too small is told with what would fit.
    """
    if isinstance(error, EqatError):
        return error
    if isinstance(error, torch.OutOfMemoryError):
        return _out_of_gpu_memory(error, position, config, machine)
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return EqatError(
            "out of host memory",
            exit_code=ExitCode.OUT_OF_MEMORY,
            where=position,
            hint="free memory and resume, or resume with --set runtime.activation_store=disk; what was "
            "checkpointed is kept",
        )
    if full_disk(error) is not None:
        name = getattr(error, "filename", None)
        return EqatError(
            f"the disk is full{f' ({name})' if name else ''}",
            exit_code=ExitCode.DISK_FULL,
            where=position,
            hint="free some space and resume the run; what was checkpointed is kept",
        )
    if isinstance(error, PermissionError):
        return EqatError(
            f"no permission: {error.filename or first_line(error) or 'no message'}",
            exit_code=ExitCode.PREFLIGHT,
            where=position,
        )
    return EqatError(
        f"{type(error).__name__}: {first_line(error) if str(error).strip() else 'no message'}",
        exit_code=ExitCode.BUG,
        where=position,
        hint="this is a bug; the traceback is in the run's log",
    )


def _out_of_gpu_memory(
    error: torch.OutOfMemoryError, position: str, config: RunConfig | None, machine: Machine | None
) -> EqatError:
    """What was needed, what was free, and which setting would fit into what this process can have."""
    free, total = torch.cuda.mem_get_info()
    ours = torch.cuda.memory_reserved()
    asked = re.search(r"Tried to allocate ([0-9.]+ [KMG]iB)", str(error))
    needed = asked[1] if asked else "more than that"
    remedy = ""
    if config is not None and machine is not None:
        remedy = out_of_memory_remedy(config, msgspec.structs.replace(machine, gpu_free=free + ours))
    return EqatError(
        f"out of GPU memory: {needed} more were needed and {free / 2**30:.2f} GiB were free "
        f"({ours / 2**30:.1f} of {total / 2**30:.1f} GiB are ours)",
        exit_code=ExitCode.OUT_OF_MEMORY,
        where=position,
        hint=f"{remedy or 'free the GPU'}, then resume: what was checkpointed is kept",
    )
