"""Kernels of our own, each used from the first phase that profits from it, where Triton works."""

from __future__ import annotations

from collections.abc import Callable

import torch

from engine.config.run import RunConfig
from engine.evaluation.beside import Comparison
from engine.gpu.compiled import SWITCH_HINT
from engine.phases.job import Job
from engine.quant.low_rank import Kernel
from engine.quant.packed import Kernels
from engine.reporter import Reporter


def switch_on_kernels(config: RunConfig, device: torch.device, report: Reporter) -> None:
    """Packed weights are unpacked by one kernel where Triton works, and logits compared by one, else by
    torch's operations."""
    if device.type == "cuda" and config.runtime.compile != "off":
        _try("packed weights are", Kernels.switch_on, device, report)
        if Kernels.on and config.evaluation.divergence:
            _try("readings beside full precision are", Comparison.switch_on, device, report)


def switch_on_low_rank_kernel(job: Job) -> None:
    """Weights of low rank are made by a kernel of their own where Triton works."""
    if Kernels.on and job.takes_kernels:
        _try("LR-QAT is", Kernel.switch_on, job.device, job.report)


def _try(
    what: str, switch_on: Callable[[torch.device], None], device: torch.device, report: Reporter
) -> None:
    """Use a kernel, or say ``what`` is slower without it."""
    try:
        switch_on(device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of Triton, its compiler, the host's compiler, the driver
        report.warning(
            "compile",
            f"{what} slower, Triton does not work here: {str(error).strip()[:200]}",
            hint=SWITCH_HINT,
        )
