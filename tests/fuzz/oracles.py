"""What is a fault, whatever was mutated: one function looks at how an operation ended, one at the world."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import world as worlds
from engine_runs import exported
from operations import Operation
from sandbox import Ended
from watch import Openings
from world import TOKEN, World

from engine.run.directory import RunDirectory

DOCUMENTED = {0, 2, 3, 4, 5, 6, 7, 8, 75, 130, 137, 143}
MOST_MEMORY = 2 << 30
"""Bytes that an operation on a model of 700 KB may hold beyond what its imports take."""
TRACES = (b"Traceback (most recent call last)", b"this is a bug", b"Fatal Python error", b"panicked at")

# C0 but newline and tab, DEL, C1, and what turns the direction of text.
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


@dataclass(frozen=True)
class Fault:
    """Something that must not happen, and in which operation it did."""

    kind: str
    operation: str
    detail: str


@dataclass(frozen=True)
class Rules:
    """What else holds for a case."""

    reads_outside: bool = False
    """Files outside may be opened: a user may well keep models and texts behind links."""
    network: bool = False
    """The configuration may name something on the hub."""
    export: str = ""
    """How much of an export has to equal the reference: ``all``, ``weights`` or nothing."""


def of_ending(operation: Operation, ended: Ended, rules: Rules, base_memory: int) -> list[Fault]:
    """Faults that show in how an operation ended and in what it printed."""
    found = []

    def fault(kind: str, detail: object) -> None:
        found.append(Fault(kind, operation.name, str(detail)[:600]))

    printed = ended.stdout + ended.stderr
    if ended.late or ended.code in (-signal.SIGXCPU, -signal.SIGKILL):
        fault("hang", f"after {ended.seconds:.0f} s, code {ended.code}; {_last(ended.stderr)}")
    elif ended.code == 1:
        fault("a bug (1)", _last(printed))
    elif ended.code not in DOCUMENTED:
        fault("undocumented exit", f"{ended.code}; {_last(printed)}")
    if ended.code != 1 and any(trace in printed for trace in TRACES):
        fault("traceback", _last(printed))
    if ended.peak > base_memory + MOST_MEMORY:
        fault("memory", f"{ended.peak >> 20} MiB")
    for line in ended.noticed:
        if not (rules.network and line.startswith("network")):
            fault(line.partition(" ")[0], line)
    if TOKEN.encode() in printed:
        fault("leaked", f"the secret was printed: {_around(printed, TOKEN.encode())}")
    text = printed.decode("utf-8", "replace")
    control = CONTROLS.search(text) or re.search("\ufffd", text)
    if control:
        fault("control character", ascii(text[max(0, control.start() - 60) : control.end() + 20]))
    return found


def _last(output: bytes) -> str:
    lines = [line for line in output.decode("utf-8", "replace").splitlines() if line.strip()]
    places = [
        line.strip() for line in lines if line.strip().startswith("File ") and "site-packages" not in line
    ]
    return f"{lines[-1][:300] if lines else 'nothing printed'} {places[-1] if places else ''}".strip()


def _around(output: bytes, words: bytes) -> str:
    at = output.index(words)
    return ascii(output[max(0, at - 100) : at + 40])


class Surroundings:
    """The world of one case, as it was before anything was done."""

    def __init__(self, world: World, rules: Rules) -> None:
        self.world, self.rules = world, rules
        self._before = worlds.snapshot(world.untouchable())
        self._listing = self._outer()
        self._logs = self._traced_logs()
        self._openings = Openings([world.secret, world.elsewhere])

    def _outer(self) -> set[str]:
        """Names that no operation may add or take away."""
        return {*os.listdir(self.world.root), *map(str, Path("/").iterdir())}

    def faults(self, operation: Operation) -> list[Fault]:
        """What an operation did to the world and should not have."""
        world, found = self.world, []
        opened = self._openings.take()  # before we look ourselves
        if opened and not self.rules.reads_outside:
            found.append(("read outside", ", ".join(opened[:4])))
        if world.canary.exists():
            found.append(("executed", "a command that was hidden in a file was run"))
        appeared = self._outer() ^ self._listing
        if appeared - {"CANARY"}:
            found.append(("changed outside", ", ".join(sorted(appeared))))
        changed = worlds.differences(self._before, worlds.snapshot(world.untouchable()))
        if changed:
            found.append(("changed outside", ", ".join(changed[:4])))
        holding = worlds.holding_token(world)
        if holding:
            found.append(("leaked", f"the secret is in {', '.join(holding[:4])}"))
        traced = self._traced_logs() - self._logs
        if traced:
            found.append(("traceback", ", ".join(sorted(traced))))
        self._openings.take()
        return [Fault(kind, operation.name, detail.replace(f"{world.root}/", "")) for kind, detail in found]

    def _traced_logs(self) -> set[str]:
        logs = self.world.run / "logs"
        paths = logs.glob("*.log") if logs.is_dir() and not logs.is_symlink() else ()
        return {str(path) for path in paths if path.is_file() and any(t in path.read_bytes() for t in TRACES)}

    def close(self) -> None:
        self._openings.close()


def of_export(operation: Operation, world: World, rules: Rules, reference: dict[str, str]) -> list[Fault]:
    """Faults of what a run exported that ended with 0: it is what it would have been."""
    if not rules.export:
        return []
    made = not any(task in operation.name for task in ("--task eval", "--task generate"))
    if not made and not (world.run / "export" / "gptq_v2" / "config.json").is_file():
        return []  # these make no export, and somebody took it away
    if not made and (world.run / "export" / "gptq_v2").is_symlink():
        return []  # or put a link there, which leads elsewhere
    try:
        found = exported(RunDirectory(world.run))
    except (AssertionError, OSError) as error:
        return [Fault("no export", operation.name, f"the engine said 0: {error}")]
    names = [n for n in {*found, *reference} if rules.export == "all" or n.endswith(".safetensors")]
    other = sorted(name for name in names if found.get(name) != reference.get(name))
    return [Fault("other content", operation.name, ", ".join(other))] if other else []


def read_reference(template: Path) -> dict[str, str]:
    """The export of the run that nobody interfered with."""
    content: dict[str, str] = json.loads((template / "reference.json").read_text())
    return content


def outcome(code: int, faults: Iterable[Fault]) -> str:
    """A word for the table."""
    return "FAULT" if list(faults) else f"refused {code}" if code else "ok"
