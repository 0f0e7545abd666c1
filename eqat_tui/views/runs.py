"""The list of runs and their comparison, from the summaries that ``eqat runs --json`` prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from engine.config.stages import full_precision, phase_label
from engine.run.directory import RunDirectory
from engine.run.finding import shorten
from engine.run.housekeeping import Cleanable
from engine.run.liveness import WORKING
from engine.run.task import job_name
from eqat_tui.lines import Line, Span, columns, cut, line, squeezed, widths_of, wrap
from eqat_tui.measured import newest
from eqat_tui.output import format_bytes, format_number, format_seconds
from eqat_tui.run_text import UNREADABLE, ago, batch_words, job_share
from eqat_tui.screens.table import key_of
from eqat_tui.views.monitor import STATE_MARKS, STATE_ROLES
from eqat_tui.words import block_place, model_name

Summary = Mapping[str, Any]
SortBy = Literal["started", "state", "model", "perplexity", "size"]
SORTS: tuple[SortBy, ...] = ("started", "state", "model", "perplexity", "size")

_BY_STATE = (
    "running",
    "starting",
    "waiting",
    "hung",
    "created",
    "crashed",
    "failed",
    "stopped",
    "aborted",
    "done",
)


def unreadable(run: RunDirectory, words: str) -> dict[str, Any]:
    """The row of a run that cannot be read: it is there, and can be deleted."""
    nothing = dict.fromkeys(
        ("started", "updated", "seconds", "eta_s", "name", "model", "bits", "group_size", "bits_per_weight")
    )
    nothing |= dict.fromkeys(("device", "phase", "doing", "block", "blocks", "waiting", "job"))
    return {
        **nothing,
        "id": run.id,
        "state": UNREADABLE,
        "path": str(run.path),
        "perplexity": {},
        "size_bytes": {"fp": None, "quantized": None},
        "error": f"cannot be read: {words}",
        "exports": [],
    }


def trained_perplexity(run: Summary) -> float | None:
    """Of the newest quantized version that was evaluated."""
    return newest(run["perplexity"])


def chosen(runs: Sequence[Summary], words: str, sort: SortBy) -> list[Summary]:
    """The runs in which every word of the filter occurs, in the order asked for."""
    wanted = words.lower().split()
    found = [run for run in runs if all(word in _text(run) for word in wanted)]
    worst = float("inf")
    keys: dict[SortBy, Any] = {
        "started": lambda run: -(run["started"] or worst),
        "state": lambda run: _BY_STATE.index(run["state"]) if run["state"] in _BY_STATE else 99,
        "model": lambda run: (model_name(run["model"]).lower(), run["bits"] or 0, run["group_size"] or 0),
        "perplexity": lambda run: trained_perplexity(run) or worst,
        "size": lambda run: run["size_bytes"]["quantized"] or worst,
    }
    return sorted(found, key=keys[sort])


def _text(run: Summary) -> str:
    words = [run[name] for name in ("id", "state", "model", "name", "device")]
    return f"{' '.join(map(str, words))} w{run['bits']}g{run['group_size']}".lower()


def rows(runs: Sequence[Summary], marked: frozenset[str], width: int, now: float) -> tuple[Line, list[Line]]:
    """Header and one row a run."""
    names: list[str | Span] = ["", "model", "grid", "state", "ppl", "full", "size", "started"]
    cells = [_cells(run, run["id"] in marked, now) for run in runs]
    keep = [0, 1, 2, 3, 4, 5, 6, 7] if width >= 76 else [0, 1, 2, 3, 4, 7]
    table = [[row[index] for index in keep] for row in [names, *cells]]
    sizes = widths_of(table)
    if 5 in keep and sum(sizes) - max(0, sizes[1] - 16) + 2 * (len(sizes) - 1) > width:
        # Which model it is counts for more than how good it was in full precision.
        del keep[5]
        table = [[row[index] for index in keep] for row in [names, *cells]]
        sizes = widths_of(table)
    spare = width - sum(sizes) - 2 * (len(sizes) - 1)
    sizes[1] = max(8, sizes[1] + min(0, spare))
    over = sum(sizes) + 2 * (len(sizes) - 1) - width
    if over > 0:
        sizes[3] = max(8, sizes[3] - over)
    right = "".join("r" if index in (4, 5, 6) else "l" for index in keep)
    made = columns(table, sizes, right=right)
    return cut(made[0], width), [cut(row, width) for row in made[1:]]


def _cells(run: Summary, marked: bool, now: float) -> list[str | Span]:
    state = run["state"]
    words = f"{STATE_MARKS.get(state, '?')} {state}"
    if state == UNREADABLE:
        return ["", run["id"], "?", ("✗ cannot be read", "bad"), "–", ("–", "muted"), "–", ("–", "muted")]
    if run["waiting"]:
        words = "‖ paused: disk full"
    elif state == "running":
        block, blocks = run["block"], run["blocks"]
        words += f" {phase_label(run['phase'])}" + (
            f" {block_place(block, blocks)}" if run["phase"] and blocks and block is not None else ""
        )
    elif state == "waiting" and run.get("batch"):
        words = f"{STATE_MARKS['waiting']} waiting {batch_words(run['batch'])}"
    elif run["job"] and run["job"]["state"] in WORKING:
        mark, name = STATE_MARKS.get(run["job"]["state"], "?"), job_name(run["job"]["task"])
        words += f", {mark} {name}{job_share(run['job'])}"
    group = "channel" if run["group_size"] == -1 else f"g{run['group_size']}"
    return [
        ("*", "strong") if marked else " ",
        model_name(run["model"]),
        f"w{run['bits']}{group}" if run["bits"] else "?",
        (words, STATE_ROLES.get(state, "")),
        format_number(trained_perplexity(run)),
        (format_number(run["perplexity"].get(full_precision())), "muted"),
        format_bytes(run["size_bytes"]["quantized"]),
        (ago(run["started"], now), "muted"),
    ]


def details(run: Summary, width: int) -> list[Line]:
    """More about the run under the cursor."""
    if run["state"] == UNREADABLE:
        return [
            cut([(words, role)], width)
            for words, role in ((run["id"], "strong"), (squeezed(run["error"], width), "bad"), ("", ""))
        ]
    lines = [cut(line((run["id"], "strong"), (f"  preset {run['name'] or '?'}", "muted")), width)]
    words = [f"model {run['model']}"]
    if run.get("node"):
        words.append(f"runs on {run['node']}")
    if run["device"]:
        words.append(f"on {run['device']}")
    if run["seconds"]:
        words.append(f"worked {format_seconds(run['seconds'])}")
    if run["exports"]:
        words.append(f"verified: {', '.join(run['exports'])}")
    lines.append(cut(line(("; ".join(words), "muted")), width))
    told, role = (run["error"], "bad") if run["error"] else (shorten(run["path"]), "muted")
    lines.append(cut(line((squeezed(told, width), role)), width))
    return lines


def freeing(name: str, found: Cleanable, *, over: bool) -> tuple[str, str]:
    """The question before something of a run is freed, and what comes of it."""
    parts = [
        (found.activations, "stored activations"),
        (found.checkpoints, "checkpoints before the newest ones"),
        (found.unfinished, "half-written files and replaced exports"),
    ]
    goes = "; ".join(f"{words} ({format_bytes(size)})" for size, words in parts if size)
    consequence = f"This deletes: {goes}. Nothing trained is lost."
    if found.activations and not over:
        consequence += (
            " Going on will take longer, though: the activations that lead up to the next block are computed "
            "again, through all finished ones."
        )
    return f"Free {format_bytes(found.total)} of {name}?", consequence


def nothing_here(place: str, width: int) -> list[Line]:
    """Where there are no runs yet."""
    return wrap(f"No runs in {place} yet. {key_of('setup')} sets one up.", width, "muted")
