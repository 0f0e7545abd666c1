"""What the result screen says: how good, how small, what it writes, where it lies, how others load it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from engine.config.formats import DEFAULT_FORMAT, FORMATS
from engine.config.grid import Grid
from engine.config.stages import full_precision, stage_label, versions
from engine.run.finding import shorten
from engine.run.state import RunState
from eqat_tui.divergence_text import result_rows, tables
from eqat_tui.feed import RunView
from eqat_tui.lines import Line, Span, columns, cut, few, fit, line, widths_of, wrap
from eqat_tui.measured import colour_of, newest
from eqat_tui.output import format_bits, format_bytes, format_count, format_number, format_seconds, share
from eqat_tui.planned import branch, known
from eqat_tui.run_text import (
    ANSWERS,
    LONGEST_BEGIN,
    MOST_TASKS,
    accuracy_rows,
    facts,
    measurement_doubts,
    score_rows,
)
from eqat_tui.views.monitor import MOST_LINES, what


def perplexities(state: RunState, width: int) -> list[Line]:
    """Perplexity of each stage beside full precision, and what the paper reached where that compares."""
    base = state.perplexity().get(full_precision())
    rows: list[list[str | Span]] = []
    for stage in versions(state.evaluations):
        found = state.evaluations.get(stage)
        if found is None:
            continue
        value = found.perplexity
        ratio = f"{format_number(value / base, 3)}×" if value is not None and base else ""
        words: Span = (format_number(value), "strong") if value is not None else ("not finite", "bad")
        kept = ("█" * round(24 * share(base, value)), colour_of(stage))
        rows.append([stage_label(stage), words, (ratio, "muted"), kept])
    if not rows:
        return [line(("nothing was evaluated yet", "muted"))]
    head: list[str | Span] = [("perplexity", "muted"), "", ("of full", "muted"), ("quality kept", "muted")]
    made = [head, *rows]
    lines = [cut(row, width) for row in columns(made, widths_of(made), right="lrr")]
    lines += _conditions(state, width)
    return lines + _further(state, width) + _answers(state, width) + _tasks(state, width)


def _further(state: RunState, width: int) -> list[Line]:
    """How far each version is from full precision, and what was measured on other texts."""
    shown = {
        "divergence": msgspec.to_builtins(state.divergence()),
        "texts": msgspec.to_builtins(state.texts()),
    }
    return [row for rows in tables(shown) for row in (line(), *_table(rows, width))]


def _table(rows: Sequence[tuple[str, ...]], width: int) -> list[Line]:
    """Rows under a head, the first column of names."""
    head, *others = rows
    made: list[list[str | Span]] = [[(name, "muted") for name in head]]
    made += [list(row) for row in others]
    return [cut(row, width) for row in columns(made, widths_of(made), right="l" + "r" * (len(head) - 1))]


def _answers(state: RunState, width: int) -> list[Line]:
    """Perplexity of the answers of held-out conversations, where a run learned some."""
    measured = state.answer_perplexity()
    if not measured:
        return []
    rows: list[list[str | Span]] = [[(ANSWERS, "muted"), ""]]
    for stage, value in measured.items():
        rows.append([stage_label(stage), "not finite" if value is None else format_number(value)])
    return [line(), *(cut(row, width) for row in columns(rows, widths_of(rows), right="lr"))]


def _tasks(state: RunState, width: int) -> list[Line]:
    """Tasks, where a run was asked any."""
    lines: list[Line] = []
    if scores := state.scores():
        made = score_rows(msgspec.to_builtins(scores))
        rows: list[list[str | Span]] = [[(name, "muted") for name in made[0]]]
        rows += [list(row) for row in made[1:]]
        found = columns(rows, widths_of(rows), right="l" + "r" * (len(rows[0]) - 1))
        lines = [line(), *(cut(row, width) for row in found)]
    return _accuracies(state, width) + lines


def _accuracies(state: RunState, width: int) -> list[Line]:
    accuracy = state.accuracy()
    if not accuracy:
        return []
    rows: list[list[str | Span]] = [list(row) for row in accuracy_rows(accuracy)]
    rows[0] = [(str(name), "muted") for name in rows[0]]
    lines = columns(rows, widths_of(rows), right="l" + "r" * (len(rows[0]) - 1))
    asked = next((e.questions for e in state.evaluations.values() if e.accuracy), {})
    words = ", ".join(f"{format_count(count)} of {name}" for name, count in list(asked.items())[:MOST_TASKS])
    return [line(), *(cut(row, width) for row in lines), *wrap(f"questions: {words}", width, "muted")]


def _conditions(state: RunState, width: int) -> list[Line]:
    lines: list[Line] = []
    found = next(iter(state.evaluations.values()), None)
    if found is not None:
        words = f"{found.corpus}, {format_count(found.tokens)} tokens at context {found.sequence_length}"
        lines.append(cut(line((words, "muted")), width))
        if found.begin:
            lines += wrap(found.begin[:LONGEST_BEGIN], width, "muted")
    for text in measurement_doubts((w.code, w.message, w.hint) for w in state.warnings):
        lines += wrap(text, width, "warn")
    paper = known(state.plan)["published"]
    if paper:
        lines += wrap(
            f"published: {paper['perplexity']} of {paper['fp_perplexity']} for {paper['model']} "
            f"{paper['setting']}, accuracy {paper['accuracy']} of {paper['fp_accuracy']} "
            f"({paper['conditions']})",
            width,
            "muted",
        )
    return lines


def figures(shown: Mapping[str, Any], width: int) -> list[Line]:
    """Size, bits, time, memory and exports: what ``eqat show`` prints."""
    pairs = facts(shown)
    size = max((len(name) for name in pairs), default=0)
    lines: list[Line] = []
    for name, value in pairs.items():
        wrapped = wrap(value, max(10, width - size - 2))
        for index, spans in enumerate(wrapped):
            lines.append(line((name.ljust(size) if index == 0 else " " * size, "muted"), "  ", *spans))
    if shown.get("measured"):
        lines += [line(), *_table(result_rows(shown["measured"]), width)]
    return lines


def headline(view: RunView, width: int) -> Line:
    """The model, and in one phrase what became of it."""
    state = view.state
    ppl = state.perplexity()
    full, trained = ppl.get(full_precision()), newest(ppl)
    words = line((what(view.config), "strong"))
    if trained is not None and full:
        words += line("  perplexity ", (format_number(trained), "strong"))
        words += line((f", full precision {format_number(full)}", "muted"))
    return cut(words, width)


def samples(state: RunState, width: int, *, can_sample: bool = True) -> list[Line]:
    """What both models wrote, side by side where there is room; where nothing is written yet, the key for it,
    if it can do something now."""
    full, trained = state.samples.get(full_precision()), newest(state.samples)
    if full is None and trained is None:
        key = ": i lets both models continue a prompt of yours" if can_sample else ""
        return [line((f"no sample yet{key}", "muted"))]
    one = full or trained
    assert one is not None
    lines = wrap(f"prompt: {one.prompt}", width, "muted")
    halves = [(stage_label(s.stage), s) for s in (full, trained) if s is not None]
    beside_each_other = width >= 70 and len(halves) == 2
    half = (width - 3) // 2 if beside_each_other else width
    texts = []
    for name, sample in halves:
        made = f", {sample.tokens} tokens in {format_seconds(sample.seconds)}" if sample.tokens else ""
        texts.append(
            [
                cut([(name, "strong"), (made, "muted")], half),
                *wrap(
                    sample.problem or sample.text.strip() or "(nothing)",
                    half,
                    "warn" if sample.problem else "",
                ),
            ]
        )
    if not beside_each_other:
        return lines + [row for text in texts for row in [*text, line()]]
    for index in range(max(map(len, texts))):
        left, right = (text[index] if index < len(text) else [] for text in texts)
        lines.append([*fit(left, half), (" │ ", "muted"), *right])
    return lines


def export_path(run: str, path: str) -> Path:
    """Where an export lies."""
    return Path(run) / path  # an absolute one is itself


def exports(view: RunView, width: int, *, can_export: bool = True) -> list[Line]:
    """Every packed checkpoint, and what its verification found; where there is none, the key for it, if it
    can do something now."""
    lines: list[Line] = []
    for done in view.state.exports.values():
        mark: Span = ("✓ verified", "good") if done.verified else ("✗ NOT VERIFIED", "bad")
        size = f"{format_bytes(done.bytes)}, {format_bits(done.bits_per_weight)} bits per weight"
        lines.append(cut([(done.format, "strong"), ("  ", ""), mark, (f"  {size}", "muted")], width))
        checks = []
        if done.max_logit_diff is not None:
            checks.append(f"largest logit difference {format_number(done.max_logit_diff, 2)}")
        if done.perplexity is not None and done.perplexity_trained is not None:
            checks.append(
                f"perplexity on {format_count(done.tokens or 0)} tokens {format_number(done.perplexity)} "
                f"read as declared, {format_number(done.perplexity_trained)} trained"
            )
        if done.rounded:
            checks.append(done.rounded)
        lines += [line("  ", *row) for row in wrap("; ".join(checks), width - 2, "muted") if checks]
        place = wrap(shorten(export_path(view.path, done.path)), width - 2)
        if done.copied_to:
            place += few(wrap(f"copied to {done.copied_to}", width - 2, "good"), MOST_LINES)
        lines += [line("  ", *row) for row in few(place, 2 * MOST_LINES)]
    key = ": e writes one" if can_export else ""
    return lines or [line((f"no packed checkpoint yet{key}", "muted"))]


def unfit_formats(config: Mapping[str, Any] | None) -> dict[str, str]:
    """By format, why a run cannot be written in it, in words that follow its name; of the others nothing."""
    grid = branch(config, "grid")
    if not isinstance(grid, Mapping):
        return {}
    bits, size, symmetric = (grid.get(name) for name in ("bits", "group_size", "symmetric"))
    if not isinstance(bits, int) or not isinstance(size, int):
        return {}
    head = grid.get("head_bits")
    head = head if isinstance(head, int) else 0
    of_run = Grid(bits, size, symmetric is True)
    held = {row.name: row.lacks(of_run) or row.lacks_head(head) for row in FORMATS}
    found = {
        name: f"cannot hold {lacks}" if lacks else FORMATS[name].lacks_libraries()
        for name, lacks in held.items()
    }
    return {name: why for name, why in found.items() if why}


def loading_snippet(path: str | Path, name: str = DEFAULT_FORMAT) -> str:
    """How another program loads the packed checkpoint of this format."""
    text = str(path)
    # A path comes from a log; what it is called must not end the string and go on as a program.
    quoted = f'"{text}"' if text.isprintable() and not set(text) & set('"\\\\') else repr(text)
    row = FORMATS.get(name)
    lines = row.loading if row is not None else "# how this is loaded is not known here\npath = {path}"
    return lines.replace("{path}", quoted)
