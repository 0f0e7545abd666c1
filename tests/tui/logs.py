"""Recorded runs for the app's tests: the same event logs that an engine writes, from fixed clocks."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec

from engine.config.derived import resolve
from engine.config.loading import load
from engine.config.run import RunConfig
from engine.config.stages import phases_of
from engine.run import events
from engine.run.directory import RunDirectory
from engine.run.event_log import EventWriter, encode
from engine.run.events import Event
from engine.run.lock import RunLock
from engine.run.status import Status, write_status

START = 1_764_000_000.0
"""2025-11-24 16:00 UTC."""
PHASES = tuple(phases_of(RunConfig()))
BLOCKS, STEPS = 6, 40
PLAN = {
    "device": "cuda",
    "blocks": BLOCKS,
    "seconds": 900.0,
    "fp_bytes": 269_000_000,
    "bits_per_weight": 3.3,
    "peak_gpu_bytes": 4 * 2**30,
    "peak_host_bytes": 3 * 2**30,
    "published": None,
    "phases": [{"name": name, "seconds": 100.0} for name in PHASES],
}
GIB = 2**30


class Log:
    """Events with the clock that an engine would have had."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.t = START
        self.attempt = 0

    def add(self, event: Event, after: float = 1.0) -> None:
        self.t += after
        self.events.append(
            msgspec.structs.replace(
                event,
                seq=len(self.events) + 1,
                attempt=self.attempt,
                t=self.t,
                mono=self.t - START + 100,
            )
        )

    def attempt_begins(self, run_id: str) -> None:
        self.attempt += 1
        versions = {"eqat": "0.1.0", "torch": "2.13.0"}
        self.add(
            events.RunStarted(
                id=run_id, pid=4242, host="node7", device="NVIDIA H200", versions=versions, argv=[]
            )
        )
        self.add(events.Plan(plan=PLAN))

    def phase(self, name: str) -> None:
        self.add(events.PhaseStarted(phase=name, index=PHASES.index(name), phases=len(PHASES)))

    def phase_ends(self, name: str, seconds: float) -> None:
        self.add(
            events.PhaseFinished(phase=name, seconds=seconds, peak_gpu_bytes=3 * GIB, peak_host_bytes=2 * GIB)
        )

    def memory(self, used: float = 3.5) -> None:
        self.add(
            events.Memory(
                gpu_used=int(used * GIB),
                gpu_total=141 * GIB,
                gpu_peak=int(3.8 * GIB),
                gpu_other=GIB,
                gpu_utilization=97.0,
                gpu_temperature=61.0,
                gpu_power=512.0,
                host_used=2 * GIB,
                host_peak=3 * GIB,
                host_available=200 * GIB,
                disk_free=900 * GIB,
            ),
            after=0.1,
        )

    def evaluation(self, stage: str, perplexity: float | None) -> None:
        self.add(
            events.Eval(
                stage=stage,
                perplexity=perplexity,
                tokens=6120,
                sequence_length=256,
                seconds=9.0,
                corpus="builtin",
            )
        )

    def metric(self, step: int, block: int | None, loss: float, **more: float) -> None:
        self.add(
            events.Metric(
                phase="e2e_qp" if block is None else "block_ap",
                block=block,
                step=step,
                steps=STEPS,
                epoch=0,
                loss=loss if math.isfinite(loss) else None,
                non_finite=not math.isfinite(loss),
                lr={"weights": 2e-3, "scales": 5e-4},
                grad_norm=0.5,
                tokens_per_second=81_000.0,
                val_loss=more.get("val_loss"),
            ),
            after=0.25,
        )

    def block(self, index: int, *, steps: int = STEPS, finish: bool = True) -> None:
        self.add(events.BlockStarted(phase="block_ap", block=index, blocks=BLOCKS))
        first = 0.04 * (index + 1)
        for step in range(1, steps + 1):
            self.metric(step, index, first * math.exp(-step / 25))
            if step % 8 == 0:
                self.memory(3.0 + 0.1 * (step % 3))
        if finish:
            self.add(
                events.BlockFinished(
                    phase="block_ap",
                    block=index,
                    seconds=12.0 + index,
                    initial_loss=first,
                    final_loss=first / 5,
                    val_loss=first / 4,
                )
            )
            self.add(
                events.CheckpointCommitted(
                    generation=index + 1, bytes=50 << 20, seconds=0.1, phase="block_ap", block=index
                )
            )

    def evaluates(self, phase: str, stage: str, value: float) -> None:
        self.phase(phase)
        self.evaluation(stage, value)
        self.phase_ends(phase, 4.0)

    def until_block_ap(self, run_id: str) -> None:
        self.attempt_begins(run_id)
        self.phase("prepare")
        self.phase_ends("prepare", 4.0)
        self.evaluates("evaluate_fp", "fp", 13.76)
        self.phase("block_ap")

    def to_the_end(self) -> None:
        self.phase_ends("block_ap", 80.0)
        self.evaluates("evaluate_rtn", "rtn", 44.32)
        self.evaluates("evaluate_block_ap", "block_ap", 19.22)
        self.phase("e2e_qp")
        for step in range(1, STEPS + 1):
            self.metric(
                step, None, 0.36 * math.exp(-step / 40), **({"val_loss": 0.3} if step == STEPS else {})
            )
        self.phase_ends("e2e_qp", 60.0)
        self.evaluates("evaluate_e2e_qp", "e2e_qp", 17.44)
        self.phase("export")
        self.add(
            events.Export(
                format="gptq_v2",
                path="export/gptq_v2",
                verified=True,
                bytes=101_200_000,
                fp_bytes=269_000_000,
                bits_per_weight=3.30,
                max_logit_diff=0.0,
                logit_tolerance=1e-3,
                perplexity=21.19,
                perplexity_trained=21.19,
                tokens=512,
            )
        )
        self.phase_ends("export", 3.0)
        self.add(events.RunFinished(outcome="done", exit_code=0, seconds=210.0))


def running(run_id: str) -> Log:
    log = Log()
    log.until_block_ap(run_id)
    for index in range(3):
        log.block(index)
    log.block(3, steps=17, finish=False)
    return log


def finished(run_id: str) -> Log:
    log = Log()
    log.until_block_ap(run_id)
    for index in range(BLOCKS):
        log.block(index)
    log.to_the_end()
    return log


def stopped(run_id: str) -> Log:
    log = running(run_id)
    log.add(events.ControlAck(request="stop", id="00000000000000000001-00000000"))
    log.add(
        events.CheckpointCommitted(
            generation=9, bytes=90 << 20, seconds=0.2, phase="block_ap", block=3, step=17
        )
    )
    log.add(events.RunFinished(outcome="stopped", exit_code=75, seconds=70.0))
    return log


def resumed(run_id: str) -> Log:
    log = stopped(run_id)
    log.t += 3600
    log.attempt_begins(run_id)
    log.phase("block_ap")
    for index in range(3):
        log.add(events.BlockStarted(phase="block_ap", block=index, blocks=BLOCKS))
        log.add(events.BlockFinished(phase="block_ap", block=index, seconds=0.1, restored=True))
    log.add(events.BlockStarted(phase="block_ap", block=3, blocks=BLOCKS))
    for step in range(18, 30):
        log.metric(step, 3, 0.16 * math.exp(-step / 25))
    return log


def crashed(run_id: str) -> Log:
    return running(run_id)


def broken(run_id: str) -> Log:
    log = running(run_id)
    log.metric(18, 3, math.nan)
    log.add(events.Warning(code="non_finite", message="step 18: the loss is not finite; going back", hint=""))
    return log


def failed(run_id: str) -> Log:
    log = broken(run_id)
    log.add(
        events.Error(
            code="non_finite",
            where="block_ap, block 3, step 18 of 40",
            message="the loss is not finite, and rolling back did not help",
            hint="halve block_ap.lr_weight",
            exit_code=5,
        )
    )
    log.add(events.RunFinished(outcome="failed", exit_code=5, seconds=70.0))
    return log


def pure_nonsense(run_id: str) -> Log:
    """A run whose losses were never finite."""
    log = Log()
    log.until_block_ap(run_id)
    log.add(events.BlockStarted(phase="block_ap", block=0, blocks=BLOCKS))
    for step in range(1, 5):
        log.metric(step, 0, math.inf)
    return log


Recorded = Callable[[str], Log]
RECORDED: dict[str, Recorded] = {
    "running": running,
    "finished": finished,
    "stopped": stopped,
    "resumed": resumed,
    "crashed": crashed,
    "broken": broken,
    "failed": failed,
}


def make_run(runs_dir: Path, log: Recorded | None, *, preset: str = "smoke", name: str = "") -> RunDirectory:
    """A run directory on disk with a recorded log; ``name`` gives it a fixed id."""
    run = RunDirectory.create(runs_dir, resolve(load(preset)))
    if name:
        run.path.rename(run.path.with_name(name))
        run = RunDirectory(runs_dir.resolve() / name)
    if log is not None:
        write_log(run, log(run.id).events)
    return run


def write_log(run: RunDirectory, written: Sequence[Event]) -> None:
    """Write the events as they are, clocks included."""
    run.events_path.write_bytes(b"".join(encode(event) + b"\n" for event in written))


class LiveEngine:
    """Writes a log at the full rate of an engine: four metrics and a reading a second, a status every two.

    It holds the run's lock, so that viewers see a running engine; it trains nothing.
    """

    def __init__(self, run: RunDirectory) -> None:
        self.run = run
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._write, daemon=True)
        self._lock = RunLock(run.lock_path)

    def __enter__(self) -> LiveEngine:
        self._lock.acquire()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()
        self._lock.release()

    def _write(self) -> None:
        with EventWriter(self.run.events_path, 1) as writer:
            for number, event in enumerate(self._story()):
                writer.emit(event)
                writer.flush()
                if number % 10 == 0:
                    write_status(
                        self.run,
                        Status(
                            phase="block_ap",
                            block=3,
                            blocks=BLOCKS,
                            eta_s=600.0 - number,
                            heartbeat=time.time(),
                        ),
                    )
                if number > 6 and self._over.wait(0.2):
                    return

    def _story(self) -> Iterator[Event]:
        log = Log()
        log.until_block_ap(self.run.id)
        log.add(events.BlockStarted(phase="block_ap", block=3, blocks=BLOCKS))
        for event in log.events:
            yield msgspec.structs.replace(event, t=0.0, mono=0.0, seq=0)
        for step in range(1, 1_000_000):
            yield events.Metric(
                phase="block_ap",
                block=3,
                step=step,
                steps=4000,
                epoch=0,
                loss=0.2 * math.exp(-step / 300) + 0.01 * math.sin(step),
                lr={"weights": 1e-3 / step, "scales": 5e-4},
                grad_norm=0.3,
                tokens_per_second=80_000.0 + step,
            )
            if step % 4 == 0:
                log.memory(3.0 + 0.01 * (step % 17))
                yield msgspec.structs.replace(log.events[-1], t=0.0, mono=0.0, seq=0)
