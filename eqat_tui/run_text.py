"""What the commands print of a run: the report at its end, which is also ``eqat show``, and the list of runs.

Everything here is made from the same dictionaries that ``--json`` prints (:func:`~engine.run.shown.show_run`
and :func:`~engine.run.shown.summarize`), so a person and a script never see different numbers.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from engine.config.stages import full_precision, phase_label, stage_label, versions
from engine.run.events import MEASUREMENT
from engine.run.finding import shorten, typed_path
from engine.run.liveness import WORKING
from engine.run.measures import EQAT, MOST_SCORES, TaskScore
from engine.run.status import Status
from engine.run.task import job_name
from eqat_tui.bench_text import measured_table
from eqat_tui.divergence_text import as_text, results_table, tables
from eqat_tui.measured import newest
from eqat_tui.output import (
    LONGEST_LINE,
    LONGEST_TIME_S,
    cell,
    format_bits,
    format_bytes,
    format_number,
    format_seconds,
    key_values,
    number,
    one_line,
    share,
    table,
)
from eqat_tui.planned import branch
from eqat_tui.ranks_text import peaks, whose
from eqat_tui.words import block_place, model_name, time_left

Tree = Mapping[str, Any]

LONGEST_SAMPLE = 100_000
MOST_TASKS = 100
LONGEST_TASK = 60
LONGEST_SCORE = 120
"""Characters of a task with its metric."""
MOST_DOUBTS = 10
LONGEST_BEGIN = 200
"""Characters of how sequences begin."""
ANSWERS = "answer perplexity"
"""Perplexity of the answers of held-out conversations."""
UNREADABLE = "unreadable"
"""In place of the state of a run that is damaged."""
DISK_FULL = "paused (disk full)"
"""In place of the state of a run whose engine waits for room on the disk."""
RESUMABLE = ("crashed", "stopped", "aborted")
"""States out of which nothing but ``eqat resume`` is needed; what has failed says itself what is."""


def report(run: Tree, *, with_end: bool = True) -> str:
    """The run's report: what it made, how good that is, what it cost; and how it ended and goes on, unless
    who followed it has read that already."""
    parts = [title(run)]
    perplexities = perplexity_table(run["perplexity"])
    if perplexities:
        parts.append(perplexities)
    begin = (run.get("evaluation") or {}).get("begin")
    if perplexities and begin:
        parts.append(f"  {one_line(begin[:LONGEST_BEGIN])}")
    parts += [f"  {line}" for line in doubts(run)]
    parts += map(as_text, tables(run))
    if run.get("measured"):
        parts.append(results_table(run["measured"]))
    if run.get("answer_perplexity"):
        parts.append(perplexity_table(run["answer_perplexity"], ANSWERS))
    if run.get("accuracy"):
        parts.append(accuracy_table(run["accuracy"]))
    if run.get("scores"):
        parts.append(score_table(run["scores"]))
    if run.get("bench"):
        parts.append(measured_table(run["bench"]))
    parts.append(key_values(facts(run)))
    problem = error_line(run)
    if problem and with_end:
        parts.append(problem)
    if run["state"] in RESUMABLE and with_end:
        parts.append(f"eqat resume {typed_path(Path(run['path']), run['id'])} goes on where it was")
    return "\n\n".join(parts)


def doubts(run: Tree) -> list[str]:
    """Why its perplexities cannot be believed, each sentence once."""
    warnings = run.get("warnings") or ()
    return measurement_doubts((one["code"], one["message"], one["hint"]) for one in warnings)


def measurement_doubts(warnings: Iterable[tuple[str, str, str]]) -> list[str]:
    """The same of warnings as code, message and hint."""
    said = [
        one_line(f"{message} ({hint})" if hint else message)
        for code, message, hint in warnings
        if code == MEASUREMENT
    ]
    return list(dict.fromkeys(said))[:MOST_DOUBTS]


def title(run: Tree) -> str:
    """``SmolLM2-135M-Instruct at 3 bits in groups of 64 · done · 2026…``."""
    config = run.get("config")
    words = cell(model_name(branch(config, "model", "source")))
    if branch(config, "grid", "bits") is not None:
        size = branch(config, "grid", "group_size")
        words += f" at {branch(config, 'grid', 'bits')} bits, {group_words(size)}"
        if head := branch(config, "grid", "head_bits"):
            words += f", embedding and head at {head}"
    return f"{words} · {run['state']} · {cell(run['id'])}"


def group_words(group_size: Any) -> str:
    """What a group size means."""
    return "one group a row" if group_size == -1 else f"groups of {group_size}"


def perplexity_table(perplexity: Mapping[str, float | None], name: str = "perplexity") -> str:
    """Perplexity of every stage that was evaluated, and how far each is from full precision."""
    base = perplexity.get(full_precision())
    rows = []
    for stage in versions(perplexity):
        value = perplexity.get(stage)
        if value is None:
            continue
        ratio = f"{format_number(value / base, 3)}×" if base else ""
        rows.append((f"  {stage_label(stage)}", format_number(value), ratio))
    if not rows:
        return ""
    return table(rows, header=(f"  {name}", "", "of full precision"), right="lrr")


def accuracy_rows(accuracy: Mapping[str, Mapping[str, float]]) -> list[tuple[str, ...]]:
    """Percent of right answers: a row a task and their mean, a column a stage; the first row names them."""
    stages = [stage for stage in versions(accuracy) if stage in accuracy]
    tasks = list(dict.fromkeys(task for stage in stages for task in accuracy[stage]))[:MOST_TASKS]
    rows = [("accuracy, %", *(stage_label(stage) for stage in stages))]

    def percent(value: float | None) -> str:
        return "–" if value is None or not abs(value) <= 10 else f"{100 * value:.1f}"

    rows += [
        (cell(task, LONGEST_TASK), *(percent(accuracy[stage].get(task)) for stage in stages))
        for task in tasks
    ]
    if len(tasks) > 1:
        means = (sum(accuracy[stage].values()) / len(accuracy[stage]) for stage in stages)
        rows.append(("mean", *map(percent, means)))
    return rows


def score_rows(scores: Mapping[str, Sequence[Tree]]) -> list[tuple[str, ...]]:
    """What lm-eval made of each version's answers: a row a number, a column a stage; the first row names
    them."""
    stages = [stage for stage in versions(scores) if stage in scores]
    found = {stage: {msgspec.convert(one, TaskScore).name: one for one in scores[stage]} for stage in stages}
    names = list(dict.fromkeys(name for stage in stages for name in found[stage]))[:MOST_SCORES]
    asked = (one["by"] for stage in stages for one in scores[stage])
    by = next((who for who in asked if who and who != EQAT), "tasks")
    rows = [(cell(by, LONGEST_TASK), *(stage_label(stage) for stage in stages))]
    rows += [
        (cell(name, LONGEST_SCORE), *(_score_words(found[stage].get(name)) for stage in stages))
        for name in names
    ]
    return rows


def _score_words(one: Tree | None) -> str:
    """A number and its standard error."""
    if one is None or one["value"] is None:
        return "–"
    error = f" ± {format_number(one['stderr'], 2)}" if one.get("stderr") else ""
    return f"{format_number(one['value'])}{error}"


def score_table(scores: Mapping[str, Sequence[Tree]]) -> str:
    """The same as text."""
    head, *rows = [(f"  {first}", *others) for first, *others in score_rows(scores)]
    return table(rows, header=head, right="l" + "r" * (len(head) - 1))


def accuracy_table(accuracy: Mapping[str, Mapping[str, float]]) -> str:
    """Zero-shot tasks as text."""
    head, *rows = [(f"  {first}", *others) for first, *others in accuracy_rows(accuracy)]
    return table(rows, header=head, right="l" + "r" * (len(head) - 1))


def facts(run: Tree) -> dict[str, str]:
    """Size, time, memory and exports, as far as they are known."""
    lines: dict[str, str] = {}
    if run["state"] == "waiting" and run.get("batch"):
        lines["now"] = f"waiting {batch_words(run['batch'])}"
    elif run["state"] in WORKING:
        lines["now"] = _position(run) + (f", on {cell(run['node'])}" if run.get("node") else "")
        if run.get("batch"):
            lines["job"] = batch_words(run["batch"])
        if run.get("waiting"):
            lines["paused"] = one_line(run["waiting"])
    job = run.get("job")
    if job and job["state"] != "done":
        name = job_name(job["task"])
        why = run.get("why_gone") or ""
        lines[name if job["state"] in WORKING else f"last {name}"] = job_words(job, why)
    elif run.get("why_gone"):
        lines["engine died"] = one_line(run["why_gone"])
    if run.get("origin"):
        lines["shares"] = origin_words(run["origin"])
    if run.get("calibration"):
        lines["trained on"] = one_line(run["calibration"])
    size = run["size_bytes"]
    original, quantized = number(size["fp"]), number(size["quantized"])
    if original and quantized:
        ratio = original / quantized
        before, after = format_bytes(size["fp"]), format_bytes(size["quantized"])
        lines["size"] = f"{before} → {after} ({format_number(ratio, 3)}× smaller)"
    if run["bits_per_weight"] is not None and run["exports"]:
        lines["bits per weight"] = format_bits(run["bits_per_weight"])
    phases = [phase for phase in run["phases"] if phase["seconds"]]
    if phases:
        total = sum(phase["seconds"] for phase in phases)
        longest = sorted(phases, key=lambda phase: -phase["seconds"])[:3]
        shares = ", ".join(
            f"{phase_label(phase['name'])} {format_seconds(phase['seconds'])}" for phase in longest
        )
        lines["time"] = f"{format_seconds(total)} ({shares})"
    memory = [
        f"{name} {format_bytes(peak)}{_whose(run, key)}"
        for name, key in (("GPU", "peak_gpu_bytes"), ("process", "peak_host_bytes"))
        if (peak := _peak(run, key)) is not None
    ]
    if memory:
        lines["peak memory"] = ", ".join(memory)
    if run.get("device"):
        lines["device"] = cell(run["device"])
    for index, export in enumerate(run["exports"]):
        lines["export" if index == 0 else f"export {index + 1}"] = export_words(export, run)
    lines["directory"] = shorten(run["path"])
    return lines


def silence(status: Status | None, now: float) -> str:
    """How long an engine has given no sign of life, by the clock of its machine."""
    return format_seconds(max(0.0, now - status.heartbeat)) if status is not None else "a while"


def job_words(job: Tree, why: str = "") -> str:
    """Where something that is done with a finished run is, or how it ended."""
    if job["state"] in WORKING:
        words = [_position(job)]
        if job["state"] == "hung":
            words = ["no sign of life", *words]
        if job.get("waiting"):
            words.append(f"paused: {one_line(job['waiting'])}")
        return ", ".join(words)
    if job["state"] == "crashed":
        return f"its engine died: {one_line(why)}" if why else "its engine died without a word"
    return f"{job['state']}: {error_line(job).removeprefix('error: ')}" if job["error"] else str(job["state"])


def samples(run: Tree) -> str:
    """What the full-precision and the quantized model wrote after the same prompt."""
    parts: list[str] = []
    for sample in run["samples"]:
        if not parts:
            parts.append(f"prompt: {_whole(sample['prompt'])}")
        made = (
            f" ({sample['tokens']} tokens in {format_seconds(sample['seconds'])})" if sample["tokens"] else ""
        )
        parts.append(f"{stage_label(sample['stage'])}{made}:\n{_whole(sample['problem'] or sample['text'])}")
    return "\n\n".join(parts)


def _whole(text: str) -> str:
    """A text that a model wrote or was given; one without end is cut, and ``--json`` has all of it."""
    text = text.strip()
    if len(text) <= LONGEST_SAMPLE:
        return text
    return f"{text[:LONGEST_SAMPLE]} … ({len(text) - LONGEST_SAMPLE:,} more letters)"


def origin_words(origin: Tree) -> str:
    """What a run has from the one that it redoes a part of."""
    count = origin["from_block"]
    blocks = {0: "nothing but evaluations", 1: "block 0"}.get(count, f"blocks 0–{count - 1}")
    return f"{blocks} of {cell(origin['id'])}"


def export_words(export: Tree, run: Tree) -> str:
    """Format, whether it was verified, what it rounds, and where it lies."""
    words = "verified" if export["verified"] else "NOT VERIFIED"
    if export.get("max_logit_diff") is not None:
        words += f", largest logit difference {format_number(export['max_logit_diff'], 2)}"
    if export.get("rounded"):
        words += f", {cell(export['rounded'], LONGEST_LINE // 2)}"
    path = Path(run["path"]) / export["path"]  # an absolute one is itself
    copied = f"; copied to {cell(export['copied_to'], LONGEST_LINE // 2)}" if export.get("copied_to") else ""
    return f"{cell(export['format'])} {cell(shorten(path), LONGEST_LINE // 2)} ({words}){copied}"


def error_line(run: Tree) -> str:
    """Why the run ended, if it failed."""
    error = run.get("error")
    if not error:
        return ""
    where = f"{error['where']}: " if error.get("where") else ""
    hint = f" ({error['hint']})" if error.get("hint") else ""
    return one_line(f"error: {where}{error['message']}{hint}")


def runs_table(runs: Sequence[Tree], *, now: float | None = None) -> str:
    """The list of runs, newest first."""
    now = time.time() if now is None else now
    rows = []
    for run in runs:
        perplexity = run["perplexity"]
        rows.append(
            (
                run["id"],
                state_words(run),
                format_number(perplexity.get(full_precision())),
                format_number(newest(perplexity)),
                format_bytes(run["size_bytes"]["quantized"]),
                ago(run["started"], now),
            )
        )
    header = ("RUN", "STATE", "PPL FP", "PPL NOW", "SIZE", "STARTED")
    return table(rows, header=header, right="llrrrl")


def state_words(run: Tree) -> str:
    """``running Block-AP 12 of 0–29``, or just the state."""
    if run["state"] == UNREADABLE:
        return "cannot be read"
    if run.get("waiting"):
        return DISK_FULL
    job = run.get("job")
    if job and job["state"] in WORKING:
        name = job_name(job["task"])
        return f"{run['state']}, {'paused' if job.get('waiting') else name}{job_share(job)}"
    if run["state"] == "waiting" and run.get("batch"):
        return f"waiting {batch_words(run['batch'])}"
    on = f" on {cell(run['node'])}" if run.get("node") else ""
    if run["state"] != "running":
        return f"{run['state']}{on}"
    if not run.get("phase"):
        return "starting" + on + (f": {run['doing']}" if run.get("doing") else "")
    block, blocks = run.get("block"), run.get("blocks")
    where = f" {block_place(block, blocks)}" if block is not None and blocks else ""
    return f"running {phase_label(run['phase'])}{where}{on}"


def batch_words(job: Tree) -> str:
    """``in Slurm as job 123_4 (Priority)``."""
    why = job["reason"] if job["state"] else "which cannot be asked from here"
    return cell(f"in Slurm as job {job['job']}" + (f" ({why})" if why and why != "None" else ""))


def job_share(job: Tree) -> str:
    """How much of the phase that a job is in is done, behind its name."""
    position = job["position"]
    if position["step"] is None or not position["steps"]:
        return ""
    return f" {share(position['step'], position['steps']):.0%}"


def ago(when: float | None, now: float) -> str:
    """``5 min ago``: coarse on purpose."""
    if when is None:
        return "–"
    seconds = max(0.0, now - when)
    if seconds >= LONGEST_TIME_S:
        return "–"
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{int(seconds // size)} {unit} ago"
    return "just now"


def _position(run: Tree) -> str:
    position = run["position"]
    words = phase_label(position["phase"])
    if position.get("doing"):
        words += f", {position['doing']}"
    if position["blocks"] and position["block"] is not None:
        words += f", block {block_place(position['block'], position['blocks'])}"
    if position["steps"] and position["step"] is not None and position["epoch"] is not None:
        words += f", step {position['step']} of {position['steps']}"
    else:
        words += f",{job_share(run)}" if job_share(run) else ""
    left = time_left(run.get("eta_s"), run.get("over_s"), measured=run.get("eta_measured", True))
    return f"{words}, {left}" if left else words


def _whose(run: Tree, key: str) -> str:
    """Of several processes, which had it, and what the others had."""
    words = whose(peaks(run["phases"], key))
    return f" ({words})" if words else ""


def _peak(run: Tree, key: str) -> int | None:
    return max((phase[key] for phase in run["phases"] if phase[key] is not None), default=None)
