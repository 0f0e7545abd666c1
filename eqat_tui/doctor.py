"""``eqat doctor``: can this machine do it? Each check is one line with its remedy.

The last check is the only one that proves anything: the ``smoke`` preset, a real run of every phase on a tiny
model, down to a verified export.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import msgspec

from engine.config.derived import resolve
from engine.config.loading import load, load_sweep, preset_names, sweep_names
from engine.config.model import TINY_MODEL
from engine.config.overrides import apply_overrides
from engine.config.sweeps import axes_of, combinations, written_axes
from engine.config.validation import validate
from engine.errors import EqatError, PreflightError
from engine.run.directory import RunDirectory
from engine.run.finding import check_runs_dir
from engine.run.launch import exit_code, launch, log_path
from engine.run.liveness import run_state
from engine.run.shown import show_run
from engine.system.allowance import memory_available, processors
from eqat_tui.output import format_bytes, format_seconds

PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "safetensors",
    "gguf",
    "huggingface_hub",
    "numpy",
    "msgspec",
    "psutil",
    "nvidia-ml-py",
    "rich",
    "typer",
)

SMOKE_LIMIT_S = 300.0
"""The smoke run takes seconds; a machine where it takes this long is not working."""


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that was looked at."""

    name: str
    status: Literal["ok", "warning", "failed"]
    detail: str
    hint: str = ""


def diagnose(runs_dir: Path, *, quick: bool) -> Iterator[Check]:
    """All checks, each as soon as it is known."""
    yield python_version()
    yield packages()
    yield torch_build()
    yield gpu()
    yield host()
    yield disk(runs_dir)
    yield presets()
    if not quick:
        yield smoke()


def python_version() -> Check:
    """Python and the platform."""
    fine = sys.version_info >= (3, 11)
    return Check(
        name="python",
        status="ok" if fine else "failed",
        detail=f"{platform.python_version()} on {platform.system()} {platform.machine()} ({sys.executable})",
        hint="" if fine else "install Python 3.11 or newer",
    )


def packages() -> Check:
    """The packages the engine imports, by their installed versions."""
    found, missing = [], []
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        names = " ".join(missing)
        return Check(
            name="packages", status="failed", detail=f"missing: {names}", hint=f"pip install {names}"
        )
    return Check(name="packages", status="ok", detail=", ".join(found))


_TORCH_QUESTIONS = """
import json, torch
print(json.dumps({
    "version": torch.__version__,
    "cuda": torch.version.cuda,
    "available": torch.cuda.is_available(),
    "arch": torch.cuda.get_arch_list() if torch.cuda.is_available() else [],
}))
"""


def torch_build() -> Check:
    """Whether PyTorch imports, asked in a process of its own: a broken one can take its process down."""
    try:
        answer = subprocess.run(
            [sys.executable, "-P", "-c", _TORCH_QUESTIONS],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        facts = json.loads(answer.stdout.strip().splitlines()[-1])
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or [f"exit code {error.returncode}"])[-1]
        return Check(name="torch", status="failed", detail=last, hint="reinstall torch")
    except (OSError, subprocess.TimeoutExpired, ValueError, IndexError) as error:
        return Check(name="torch", status="failed", detail=str(error), hint="reinstall torch")
    build = f"CUDA {facts['cuda']}" if facts["cuda"] else "CPU build"
    usable = ", GPU usable" if facts["available"] else ""
    status: Literal["ok", "warning"] = "ok"
    hint = ""
    if gpu_names() and not facts["available"]:
        status, hint = "warning", "this machine has a GPU that this build of torch cannot use"
    return Check(name="torch", status=status, detail=f"{facts['version']}, {build}{usable}", hint=hint)


def gpu_names() -> list[str]:
    """What the NVIDIA driver sees; nothing without a driver."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no driver, no library, no permission: all mean that there is no GPU to use
        return []
    try:
        names = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            name = pynvml.nvmlDeviceGetName(handle)
            text = name if isinstance(name, str) else name.decode()
            names.append(f"{text}, {format_bytes(memory.free)} of {format_bytes(memory.total)} free")
        return names
    except pynvml.NVMLError:
        return []
    finally:
        pynvml.nvmlShutdown()


def gpu() -> Check:
    """The GPUs and what is free on them."""
    names = gpu_names()
    if not names:
        return Check(
            name="gpu",
            status="warning",
            detail="none found",
            hint="runs use the CPU: fine for the demo, slow for models of billions of parameters",
        )
    return Check(name="gpu", status="ok", detail="; ".join(names))


def host() -> Check:
    """Cores this process may use, and memory."""
    import psutil

    memory = psutil.virtual_memory()
    free = memory_available()
    detail = f"{processors()} cores, {format_bytes(free)} of {format_bytes(memory.total)} memory available"
    if free < 2e9:
        return Check(name="host", status="warning", detail=detail, hint="the demo needs about 2 GB")
    return Check(name="host", status="ok", detail=detail)


def disk(runs_dir: Path) -> Check:
    """Whether runs can be written where they would be, and how much room there is."""
    try:
        place = check_runs_dir(runs_dir)
    except PreflightError as error:
        return Check(name="disk", status="failed", detail=f"{error.where} {error.message}", hint=error.hint)
    free = shutil.disk_usage(place).free
    detail = f"{format_bytes(free)} free for {runs_dir}"
    if free < 2e9:
        return Check(
            name="disk", status="warning", detail=detail, hint="free some space or choose --runs-dir"
        )
    return Check(name="disk", status="ok", detail=detail)


def presets() -> Check:
    """Every shipped preset can be read and is valid."""
    names, sweeps = preset_names(), sweep_names()
    try:
        for name in names:
            config = load(name)
            if not config.model.source:  # one that wants --model is not broken
                config = apply_overrides(config, {"model.source": TINY_MODEL})
            validate(resolve(config))
        for name in sweeps:
            base, table = load_sweep(name)
            base = apply_overrides(base, {"model.source": TINY_MODEL})
            combinations(base, axes_of(written_axes(table), (), ()))
    except EqatError as error:
        return Check(name="presets", status="failed", detail=str(error), hint="reinstall eqat")
    if not names or not sweeps:
        return Check(name="presets", status="failed", detail="none are installed", hint="reinstall eqat")
    return Check(
        name="presets", status="ok", detail=f"{len(names)} presets and {len(sweeps)} sweeps, all valid"
    )


def smoke() -> Check:
    """Run the smallest preset through every phase in a directory that is thrown away."""
    begun = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="eqat-doctor-") as folder:
            config = resolve(load("smoke"))
            run = RunDirectory.create(Path(folder), config)
            problem = _run_quietly(run)
            took = format_seconds(time.monotonic() - begun)
            if problem:
                return Check(
                    name="smoke run", status="failed", detail=problem, hint="eqat run smoke shows it all"
                )
            verified = [done["format"] for done in show_run(run)["exports"] if done["verified"]]
    except EqatError as error:
        return Check(name="smoke run", status="failed", detail=str(error), hint="eqat run smoke shows it all")
    except OSError as error:
        return Check(
            name="smoke run", status="failed", detail=str(error), hint="set TMPDIR to a place with room"
        )
    return Check(
        name="smoke run", status="ok", detail=f"every phase in {took}, verified: {', '.join(verified)}"
    )


def _run_quietly(run: RunDirectory) -> str:
    """Start the engine and wait; what went wrong, or nothing."""
    pid = launch(run)
    deadline = time.monotonic() + SMOKE_LIMIT_S
    while exit_code(pid) is None:
        if time.monotonic() > deadline:
            os.kill(pid, 9)
            return f"not finished after {format_seconds(SMOKE_LIMIT_S)}"
        time.sleep(0.1)
    result = show_run(run)
    if run_state(run) == "done" and exit_code(pid) == 0:
        return "" if all(done["verified"] for done in result["exports"]) else "its export was not verified"
    if result["error"]:
        return f"{result['error']['message']} (exit code {exit_code(pid)})"
    try:
        lines = log_path(run, 1).read_text(errors="replace").strip().splitlines()
    except OSError:
        lines = []
    return f"exit code {exit_code(pid)}: {lines[-1] if lines else 'no output'}"
