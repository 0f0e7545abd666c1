"""Kill a run with SIGKILL in the middle of a phase, resume it, and compare its export with an uninterrupted
one's.

    python benchmarks/resume.py demo --device cuda --set block_ap.sequences=64

One run is left alone, one is killed inside Block-AP, one inside E2E-QP, each once a checkpoint lies in the
middle of that training. With ``runtime.deterministic`` (set here) a GPU gives the same bits every time; a CPU
always does.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from engine.process import package_versions
from engine.run import event_log, events
from engine.run.lock import holder

CHECKPOINTS = [
    "runtime.checkpoint_minutes=0.0005",
    "runtime.checkpoint_share=1.0",
    "runtime.deterministic=true",
]


def eqat(*arguments: str) -> str:
    command = [sys.executable, "-m", "eqat_tui", *arguments]
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, check=False)
    if done.returncode:
        sys.exit(f"eqat {' '.join(arguments)} ended with {done.returncode}")
    return done.stdout


def log(run: Path) -> list[Any]:
    return event_log.read_events(run / "events.jsonl")[0]


def inside(run: Path, phase: str) -> list[Any]:
    """Checkpoints in the middle of a training of ``phase``."""
    return [e for e in log(run) if isinstance(e, events.CheckpointCommitted) and e.phase == phase and e.step]


def kill_in(run: Path, phase: str) -> str:
    """SIGKILL once there is something to go on from; what that is."""
    while len(inside(run, phase)) < 2:
        assert not any(isinstance(e, events.RunFinished) for e in log(run)), "the run has ended"
        time.sleep(0.05)
    pid = holder(run / "lock")
    assert pid, "the run has ended"
    os.kill(pid, signal.SIGKILL)
    last = inside(run, phase)[-1]
    return f"{phase}{'' if last.block is None else f' {last.block}'}, step {last.step}"


def digest(run: Path) -> str:
    files = sorted(path for path in (run / "export").rglob("*") if path.is_file())
    content = hashlib.sha256()
    for path in files:
        content.update(f"{path.relative_to(run)}\0".encode() + path.read_bytes())
    return content.hexdigest()[:16]


def work_seconds(run: Path) -> float:
    """Seconds of the last attempt until its first training step."""
    found = log(run)
    last = found[-1].attempt
    began = next(e.t for e in found if e.attempt == last)
    return next((e.t for e in found if e.attempt == last and isinstance(e, events.Metric)), began) - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("preset")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--set", action="append", default=[], dest="settings")
    parser.add_argument("--streams", nargs="+", default=["stored", "recomputed"])
    args = parser.parse_args()
    rows, digests = [], set()
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder)
        flags = [flag for setting in [*CHECKPOINTS, *args.settings] for flag in ("--set", setting)]

        def start(streams: str) -> Path:
            return runs / eqat(
                "run", args.preset, "--device", args.device, "--runs-dir", folder, "--detach",
                *flags, "--set", f"runtime.streams={streams}",
            ).strip()  # fmt: skip

        def finish(run: Path) -> dict[str, Any]:
            while holder(run / "lock") is not None or not (run / "events.jsonl").exists():
                time.sleep(0.1)
            return json.loads(eqat("show", run.name, "--runs-dir", folder, "--json"))

        for streams in args.streams:
            for phase in (None, "block_ap", "e2e_qp"):
                began = time.monotonic()
                run = start(streams)
                where, restart = "not at all", ""
                if phase is not None:
                    while not (run / "events.jsonl").exists():
                        time.sleep(0.1)
                    where = kill_in(run, phase)
                    eqat("resume", run.name, "--runs-dir", folder)
                    restart = f"{work_seconds(run):.1f}"
                shown = finish(run)
                digests.add(digest(run))
                perplexity = shown["perplexity"]["e2e_qp"]
                rows.append(
                    [
                        streams,
                        where,
                        f"{time.monotonic() - began:.1f}",
                        restart,
                        f"{perplexity:.3f}",
                        digest(run),
                    ]
                )
    versions = ", ".join(f"{name} {version}" for name, version in package_versions().items())
    print(f"\n{args.preset} on {shown['device']}; {versions}; {' '.join(args.settings)}")
    header = ["streams", "killed in", "total s", "s to the first step again", "perplexity", "export"]
    for line in [header, ["---"] * len(header), *rows]:
        print("| " + " | ".join(line) + " |")
    print("all exports are equal" if len(digests) == 1 else "THE EXPORTS DIFFER")


if __name__ == "__main__":
    main()
