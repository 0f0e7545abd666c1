"""The process around a run: device, threads, what to record about the machine."""

from __future__ import annotations

import gc
import os
import platform
import socket
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

from engine import __version__
from engine.config.runtime import RuntimeConfig
from engine.errors import PreflightError
from engine.run import events
from engine.run.directory import RunDirectory
from engine.system.allowance import processors, threads

RECORDED_PACKAGES = ("torch", "transformers", "safetensors", "datasets", "tokenizers", "numpy", "triton")


def choose_device(name: str, gpus: int = 1, number: int = 0) -> torch.device:
    """The torch device of ``runtime.device``; ``auto`` takes the GPU when there is one that torch can use. Of
    a run on several ``gpus`` it is that of its process of this ``number``."""
    if name == "auto":
        # Several processes share a CPU only where that was asked for.
        name = "cuda" if torch.cuda.is_available() or gpus > 1 else "cpu"
    if gpus > 1 and name == "cuda":
        name = f"cuda:{number}"
    if not name.startswith("cuda"):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise PreflightError(
            "no usable GPU: "
            + ("this torch is a CPU build" if torch.version.cuda is None else "torch finds no CUDA device"),
            where="runtime.device",
            hint="use --set runtime.device=cpu, or install the CUDA build of torch and check nvidia-smi",
        )
    index = int(name.partition(":")[2] or 0)
    if index >= torch.cuda.device_count():
        raise PreflightError(
            f"there is no {name}; this machine has {torch.cuda.device_count()} GPU(s)",
            where="runtime.device",
            hint=f"use cuda:0 to cuda:{torch.cuda.device_count() - 1}",
        )
    return torch.device("cuda", index)


def prepare_process(runtime: RuntimeConfig, device: torch.device) -> None:
    """Threads, seeds and determinism. Call once, before the first tensor."""
    gpu = device.type == "cuda"
    torch.set_num_threads(threads(runtime.threads, runtime.gpus, gpu=gpu, there=processors()))
    torch.manual_seed(runtime.seed)
    # The libraries' objects, hundreds of thousands, live as long as the process: every collection of garbage
    # between two phases would look at all of them again.
    gc.freeze()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # bfloat16 products are what is asked for; float32 ones (norms, statistics) stay exact.
        torch.backends.cuda.matmul.allow_tf32 = False
    if runtime.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's architecture."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})"


def started_event(
    run: RunDirectory, device: torch.device, task: str = "run", leaves: events.Outcome | None = None
) -> events.RunStarted:
    """What this attempt runs on; ``leaves`` is what the run is, whatever becomes of the attempt."""
    return events.RunStarted(
        id=run.id,
        pid=os.getpid(),
        host=socket.gethostname(),
        device=device_name(device),
        versions=package_versions(),
        argv=sys.argv,
        task=task,
        leaves=leaves,
    )


def package_versions() -> dict[str, str]:
    """Versions of everything that decides results."""
    versions = {"eqat": __version__, "python": platform.python_version()}
    for package in RECORDED_PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
