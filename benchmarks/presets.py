"""Run presets from end to end and print what they reached: perplexity, time, memory against plan.

    python benchmarks/presets.py demo demo-w2 --device cpu --device cuda --seed 0 --seed 1

Each combination is one ordinary run (``eqat run``; a ``.toml`` file is taken like a preset); the table at the
end is read from ``eqat show --json``. Seeds show the noise of training, which is the measure for whether two
devices agree. "wall" is the whole command, "around" what of it lies before the first phase and behind the
last one, "others" the perplexities of further texts of ``evaluation.texts``, first and last, "answers" those
of held-out conversations, of full precision and every stage.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MIB = 2**20


def eqat(*arguments: str, capture: bool = True) -> str:
    command = [sys.executable, "-m", "eqat_tui", *arguments]
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE if capture else None, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}")
    return done.stdout or ""


def run(preset: str, device: str, seed: int, extra: list[str], runs_dir: Path) -> dict[str, Any]:
    """What the run shows of itself, and as ``wall`` the seconds of the whole command."""
    changes = [flag for change in extra for flag in ("--set", change)]
    place = ["--runs-dir", str(runs_dir)]
    begun = time.monotonic()
    eqat("run", preset, "--device", device, "--set", f"runtime.seed={seed}", *changes, *place)
    wall = time.monotonic() - begun
    return {**json.loads(eqat("show", "latest", "--json", *place)), "wall": wall}


def plan_of(shown: dict[str, Any], runs_dir: Path) -> dict[str, Any]:
    """The plan that the engine made, from the run's own events."""
    lines = (runs_dir / shown["id"] / "events.jsonl").read_text().splitlines()
    return next(event["plan"] for line in lines if (event := json.loads(line))["kind"] == "plan")


TRAINED = ("rtn", "gptq", "block_ap", "e2e_qp", "e2e_qat", "lr_qat")
"""In the order in which a run makes them."""


def phases_of(shown: dict[str, Any], plan: dict[str, Any]) -> str:
    """Seconds of every phase, as they were and as they were planned."""
    planned = {phase["name"]: phase["seconds"] for phase in plan["phases"]}
    return ", ".join(
        f"{phase['name']} {phase['seconds']:.1f} ({planned.get(phase['name'], 0):.1f})"
        for phase in shown["phases"]
    )


def answers(shown: dict[str, Any], stage: str) -> float | None:
    """Perplexity of the answers of held-out conversations, where it was measured."""
    return (shown.get("answer_perplexity") or {}).get(stage)


def row(preset: str, device: str, seed: int, shown: dict[str, Any], plan: dict[str, Any]) -> list[str]:
    perplexity = shown["perplexity"]
    kind = "peak_gpu_bytes" if plan["device"] == "cuda" else "peak_host_bytes"
    measured = max(phase[kind] or 0 for phase in shown["phases"])
    predicted = max(phase[kind] or 0 for phase in plan["phases"])
    seconds = {phase["name"]: phase["seconds"] for phase in shown["phases"]}
    made = [name for name in TRAINED if perplexity.get(name)]
    last = made[-1]
    before = [name for name in made[:-1] if name in ("gptq", "block_ap")]
    others = [
        f"{name} {text['fp']['perplexity']:,.2f} {text[last]['perplexity']:,.2f}"
        for name, text in shown["texts"].items()
    ]
    return [
        preset,
        device,
        str(seed),
        *(f"{perplexity[stage]:,.2f}" if perplexity.get(stage) else "" for stage in ("fp", "rtn")),
        ", ".join(f"{perplexity[name]:,.2f}" for name in before),
        f"{perplexity[last]:,.2f} ({last})",
        f"{perplexity[last] / perplexity['fp']:.3f}",
        ", ".join(others),
        ", ".join(f"{found:.3f}" for stage in ("fp", *made) if (found := answers(shown, stage))),
        " + ".join(f"{seconds[name]:.0f}" for name in made if seconds.get(name, 0) >= 1),
        f"{sum(seconds.values()):.0f}",
        f"{shown['wall']:.0f}",
        f"{shown['wall'] - sum(seconds.values()):.1f}",
        f"{measured / MIB:,.0f}",
        f"{predicted / MIB:,.0f} ({predicted / measured - 1:+.0%})",
        str(all(export["verified"] for export in shown["exports"])),
    ]


HEADER = [
    *("preset", "device", "seed", "fp", "rtn", "blocks", "end", "÷ fp", "others", "answers"),
    *("training s", "phases s", "wall s", "around s", "peak MiB", "planned MiB", "verified"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("presets", nargs="+")
    parser.add_argument("--device", action="append", dest="devices")
    parser.add_argument("--seed", action="append", dest="seeds", type=int)
    parser.add_argument("--set", action="append", dest="changes", default=[])
    given = parser.parse_args()
    rows, versions, devices = [], {}, {}
    with tempfile.TemporaryDirectory() as folder:
        runs_dir = Path(folder)
        for preset in given.presets:
            for device in given.devices or ["auto"]:
                for seed in given.seeds or [0]:
                    shown = run(preset, device, seed, given.changes, runs_dir)
                    plan = plan_of(shown, runs_dir)
                    rows.append(row(preset, device, seed, shown, plan))
                    print(f"{preset}, seed {seed}: {phases_of(shown, plan)}", file=sys.stderr, flush=True)
                    manifest = json.loads((runs_dir / shown["id"] / "run.json").read_text())
                    versions, devices[device] = manifest["versions"], manifest["device"]
    print("\n| " + " | ".join(HEADER) + " |\n|" + "---|" * len(HEADER))
    for cells in rows:
        print("| " + " | ".join(cells) + " |")
    named = ", ".join(f"{name} is {device}" for name, device in devices.items())
    print(f"\n{named}; " + ", ".join(f"{name} {version}" for name, version in sorted(versions.items())))


if __name__ == "__main__":
    main()
