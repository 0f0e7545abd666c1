"""Running the command line in tests, and the log of a run that went well."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from waiting import PATIENCE, handles, wait_until

from engine.run import events
from engine.run.directory import RunDirectory
from engine.run.finding import list_runs
from engine.run.lock import holder
from engine.run.state import load_state

REPOSITORY = Path(__file__).parents[2]

Eqat = Callable[..., "subprocess.CompletedProcess[str]"]


def environment(**extra: str) -> dict[str, str]:
    """The environment for ``eqat`` in a test: this checkout, no colour, no width of somebody's terminal."""
    kept = {
        key: value for key, value in os.environ.items() if not key.startswith("EQAT_") and key != "COLUMNS"
    }
    nobodys = {name: os.environ[name] for name in ("EQAT_CONFIG_DIR", "EQAT_STATE_DIR")}
    return {**kept, "PYTHONPATH": str(REPOSITORY), "TERM": "dumb", **nobodys, **extra}


def story(run: RunDirectory) -> Sequence[events.Event]:
    """The events of a short and happy run."""
    return [
        events.RunStarted(
            id=run.id, pid=1, host="here", device="cpu", versions={"torch": "2"}, argv=["engine"]
        ),
        events.PhaseStarted(phase="evaluate_fp", index=0, phases=3),
        events.Eval(
            stage="fp", perplexity=18.21, tokens=512, sequence_length=32, seconds=1.0, corpus="builtin"
        ),
        events.PhaseFinished(phase="evaluate_fp", seconds=1.0, peak_host_bytes=2**30),
        events.PhaseStarted(phase="block_ap", index=1, phases=3),
        events.BlockStarted(phase="block_ap", block=0, blocks=2),
        events.Metric(
            phase="block_ap", block=0, step=1, steps=8, epoch=0, loss=0.25, tokens_per_second=900.0
        ),
        events.BlockFinished(phase="block_ap", block=0, seconds=2.0, initial_loss=0.3, final_loss=0.1),
        events.BlockFinished(phase="block_ap", block=1, seconds=2.0, initial_loss=0.4, final_loss=0.2),
        events.PhaseFinished(phase="block_ap", seconds=4.0, peak_host_bytes=3 * 2**29),
        events.Eval(
            stage="block_ap", perplexity=23.67, tokens=512, sequence_length=32, seconds=1.0, corpus="builtin"
        ),
        events.PhaseStarted(phase="export", index=2, phases=3),
        events.Export(
            format="gptq_v2",
            path="export/gptq_v2",
            verified=True,
            bytes=50 * 2**20,
            fp_bytes=200 * 2**20,
            bits_per_weight=4.5,
            max_logit_diff=1.5e-5,
        ),
        events.PhaseFinished(phase="export", seconds=0.5),
        events.RunFinished(outcome="done", exit_code=0, seconds=5.5),
    ]


# -- an engine that trains nothing ---------------------------------------------------------------------

SCRIPTED_ENGINE = """
import os, signal, sys, time
from engine.run import control, events
from engine.run.directory import RunDirectory
from engine.run.event_log import EventWriter
from engine.run.launch import this_attempt
from engine.run.lock import RunLock
from engine.run.status import Status, write_status

run = RunDirectory.open(sys.argv[1])
mode = os.environ["SCRIPT"]
if "=" in mode:  # what each of several runs does, by its bits: 2=finishes,3=fails
    mode = dict(part.split("=") for part in mode.split(","))[str(run.config().grid.bits)]
if mode == "dies early":
    sys.exit("no module named nonsense")
with RunLock(run.lock_path), EventWriter(run.events_path, this_attempt(run)) as writer:
    begun = time.monotonic()

    def finish(outcome, code):
        writer.emit(events.RunFinished(outcome=outcome, exit_code=code, seconds=time.monotonic() - begun))
        writer.close()
        sys.exit(code)

    writer.emit(events.RunStarted(
        id=run.id, pid=os.getpid(), host="here", device="cpu", versions={}, argv=sys.argv
    ))
    writer.emit(events.PhaseStarted(phase="block_ap", index=0, phases=1))
    writer.emit(events.BlockStarted(phase="block_ap", block=0, blocks=4))
    ignored = set()
    steps = 12000  # ten minutes: on a busy machine whoever looks at it takes his time
    for step in range(1, steps + 1):
        write_status(run, Status(
            phase="block_ap", heartbeat=time.time(), pid=os.getpid(), eta_s=90.0,
            grace_s=1.0 if mode == "hangs" else 120.0,
            waiting="the disk is full" if mode == "waits" and step >= 3 else "",
        ))
        writer.emit(events.Metric(
            phase="block_ap", block=0, step=step, steps=steps, epoch=0, loss=1 / step,
            tokens_per_second=1234.0,
        ))
        writer.flush()
        if step == 3 and mode == "dies":
            print("Fatal: something terrible", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        if step == 3 and mode == "hangs":
            time.sleep(600)
        if step == 3 and mode == "fails":
            writer.emit(events.Error(
                code="data", where="data.source", message="too little text", hint="give more", exit_code=4
            ))
            finish("failed", 4)
        if step == 20 and mode == "finishes":
            writer.emit(events.BlockFinished(phase="block_ap", block=0, seconds=0.1, final_loss=0.5))
            writer.emit(events.Eval(
                stage="block_ap", perplexity=23.67, tokens=9, sequence_length=9, seconds=0.1, corpus="builtin"
            ))
            writer.emit(events.PhaseFinished(phase="block_ap", seconds=0.2, peak_host_bytes=2**30))
            finish("done", 0)
        for request in control.pending(run):
            control.acknowledge(run, request.id)
            writer.emit(events.ControlAck(request=request.request, id=request.id))
            if mode == "ignores stop" and request.request == "stop":
                continue
            finish(*{"stop": ("stopped", 75), "abort": ("aborted", 130)}[request.request])
        time.sleep(0.05)
"""

EQAT_WITH_SCRIPTED_ENGINE = """
import functools, sys
import engine.run.launch as launching
launching.launch = functools.partial(launching.launch, module=("-c", sys.argv[1]))
from eqat_tui.cli import main
main(sys.argv[2:])
"""


def start_eqat(where: Path, script: str, *arguments: str, **extra: str) -> subprocess.Popen[str]:
    """``eqat ARGUMENTS``, whose runs are worked on by the scripted engine; everything else is real."""
    return subprocess.Popen(
        [sys.executable, "-c", EQAT_WITH_SCRIPTED_ENGINE, SCRIPTED_ENGINE, *arguments],
        cwd=where,
        env=environment(SCRIPT=script, **extra),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _works(run: RunDirectory) -> bool:
    """Whether the engine that has the run now has taken steps; the log may end with the one before."""
    state = load_state(run)
    return state.pid == holder(run.lock_path) and (state.step or 0) >= 2


def runs_at_work(where: Path, count: int = 1) -> list[RunDirectory]:
    """``count`` runs, once the engine of each has taken steps."""
    found: list[RunDirectory] = []

    def all_work() -> bool:
        found[:] = filter(_works, list_runs(where / "runs"))
        return len(found) == count

    wait_until(all_work)
    return found


def at_work(where: Path, count: int = 1) -> RunDirectory:
    """The one of ``count`` runs whose engine is at work and has taken steps."""
    wait_until(lambda: len(list_runs(where / "runs")) == count)
    (run,) = runs_at_work(where)
    return run


def ended(process: subprocess.Popen[str]) -> tuple[str, str]:
    """What it printed and what it told, once it has ended."""
    return process.communicate(timeout=PATIENCE)


def follows(process: subprocess.Popen[str]) -> None:
    """Wait until ``eqat`` follows a run, and so takes signals for itself: SIGUSR1's handler comes last."""
    wait_until(lambda: handles(process.pid, signal.SIGUSR1) or process.poll() is not None)
    assert process.poll() is None, process.communicate()
