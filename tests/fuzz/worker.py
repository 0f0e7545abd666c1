"""One worker: imports the engine once, then does one case after the other, each operation in a fork of it.

    python tests/fuzz/worker.py FOLDER

It reads cases as lines ``target seed number`` and answers each with a line of JSON; ``fuzz.py`` starts it.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import json
import os
import signal
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tui"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "models"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "engine"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import oracles
import target_gguf
import target_links
import target_log
import target_model
import target_nothing
import target_packed
import target_run
import target_text
import target_toml
import victims
from cases import Target, chance_of
from sandbox import run_limited
from world import World, remove

TARGETS: dict[str, Target] = {
    module.TARGET.name: module.TARGET
    for module in (
        target_run,
        target_links,
        target_model,
        target_packed,
        target_gguf,
        target_toml,
        target_text,
        target_log,
        target_nothing,
    )
}


class Worker:
    """A folder with a template and the world of the case at hand."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.world = World(folder / "world")
        self.template = folder / "template"
        self.template.mkdir(parents=True)
        victims.build(self.template, self.world)
        self.reference = oracles.read_reference(self.template)
        self.memory = _peak()

    def do(self, name: str, seed: int, number: int) -> dict[str, object]:
        """One case; what became of it."""
        began = time.monotonic()
        target, chance = TARGETS[name], chance_of(name, seed, number)
        self.world.reset(self.template, victim := chance.choice(target.victims))
        case = target.make(self.world, chance)
        around = oracles.Surroundings(self.world, case.rules)
        faults: list[oracles.Fault] = []
        codes: list[tuple[str, int]] = []
        code = 0
        for operation in case.operations:
            if operation.deletes and faults:
                break  # what is wrong already would only be found again
            ended = run_limited(
                operation.action,
                self.folder / "scratch",
                self.world.environment(),
                self.world.work,
                operation.cpu,
                operation.wall,
            )
            codes.append((operation.name, ended.code))
            code = ended.code if operation.tells else code
            faults += oracles.of_ending(operation, ended, case.rules, self.memory)
            faults += around.faults(operation)
            if operation.trains and ended.code == 0:
                faults += oracles.of_export(operation, self.world, case.rules, self.reference)
            self._end_leftovers()
        around.close()
        return {
            "target": name,
            "seed": seed,
            "number": number,
            "mutation": f"{victim}: {case.mutation}" if len(target.victims) > 1 else case.mutation,
            "outcome": oracles.outcome(code, faults),
            "faults": [asdict(fault) for fault in faults],
            "codes": codes,
            "seconds": time.monotonic() - began,
        }

    def _end_leftovers(self) -> None:
        """Kill engines of this world that outlived the command that had started them."""
        for process in Path("/proc").iterdir():
            if process.name.isdigit() and int(process.name) != os.getpid():
                try:
                    words = (process / "cmdline").read_bytes()
                    if f"{self.world.root}/".encode() in words and b"engine" in words:
                        os.kill(int(process.name), signal.SIGKILL)
                except OSError:
                    continue


def _peak() -> int:
    """Bytes that this process holds; its forks begin with as many."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


PRELOADED = (
    "app_tools",
    "engine.data.local",
    "engine.export.verify",
    "engine.pipeline",
    "engine.reporter",
    "engine.telemetry",
    "eqat_tui.cli",
    "eqat_tui.screens.monitor",
    "eqat_tui.views.result",
    "pyarrow.parquet",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
)
"""What operations need; a fork has it without importing it."""


def _preload() -> None:
    for name in PRELOADED:
        importlib.import_module(name)
    from eqat_tui.cli import app

    with contextlib.redirect_stdout(io.StringIO()):
        app(args=["presets", "--json"], prog_name="eqat", standalone_mode=False)
    # Objects that are never collected keep their pages shared with every fork.
    gc.collect()
    gc.freeze()


def main() -> int:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    _preload()
    folder = Path(sys.argv[1]).resolve()
    worker = Worker(folder)
    answers.write('{"ready": true}\n')
    for line in sys.stdin:
        name, seed, number = line.split()
        try:
            answer = worker.do(name, int(seed), int(number))
        except Exception:
            answer = {
                "target": name,
                "seed": int(seed),
                "number": int(number),
                "broken": traceback.format_exc(),
            }
        answers.write(json.dumps(answer) + "\n")
    remove(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
