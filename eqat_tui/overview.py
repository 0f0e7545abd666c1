"""What ``eqat`` says when it is asked nothing."""

from __future__ import annotations

from engine.run.finding import default_runs_dir, list_runs
from eqat_tui.actions import summaries
from eqat_tui.output import table
from eqat_tui.preset_rows import preset_rows
from eqat_tui.queue_text import left_alone
from eqat_tui.run_text import runs_table

COMMANDS = (
    ("eqat run PRESET|FILE", "quantize a model and follow it; --dry-run shows the plan first"),
    ("eqat sweep PRESET|FILE", "make a run of every combination of some settings, and compare them"),
    ("eqat queue add PRESET|FILE", "make runs one after the other, whoever is logged in"),
    ("eqat runs, show RUN", "what was made, and how good it is"),
    ("eqat attach, stop, resume RUN", "come back to a run, end it, go on with it"),
    ("eqat eval, export RUN", "measure or write a quantized model again"),
    ("eqat presets, plan PRESET|FILE", "what to start from, and what it would need"),
    ("eqat rm, gc RUN", "delete runs, free what can be made again"),
    ("eqat doctor", "is this machine ready?"),
)


def overview_text() -> str:
    """What eqat is, its commands, a choice of presets, the latest runs."""
    parts = [
        "eqat: quantization-aware training of language models to 2, 3 and 4 bits, from a terminal",
        table([(f"  {command}", words) for command, words in COMMANDS]),
    ]
    rows = [row for row in preset_rows() if row["name"] in ("smoke", "demo", "demo-w2", "llama-2-7b-w2g64")]
    if rows:
        parts.append("presets\n" + table([(f"  {row['name']}", row["description"]) for row in rows]))
    recent = list_runs(default_runs_dir())[:5]
    if recent:
        listing = runs_table(summaries(recent))
        parts.append("recent runs\n" + "\n".join(f"  {line}" for line in listing.splitlines()))
    else:
        parts.append("no runs yet: eqat run demo makes one")
    if waits := left_alone():
        parts.append(waits)
    parts.append("eqat COMMAND --help tells more.")
    return "\n\n".join(parts)
