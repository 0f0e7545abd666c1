"""What a report says of one run, part by part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from engine.config.run import LABELS
from engine.config.sameness import equivalent_command
from engine.config.stages import full_precision, phase_label, stage_label, versions
from engine.config.writing import essential, flat, to_toml
from engine.run.directory import RunDirectory
from engine.run.state import PhaseRow, RunState
from eqat_tui.bench_text import measured_table
from eqat_tui.compare_text import setting_words
from eqat_tui.divergence_text import result_rows, tables
from eqat_tui.output import cell, format_bytes, format_number, format_seconds, format_time, one_line
from eqat_tui.planned import known
from eqat_tui.ranks_text import peaks, whose
from eqat_tui.report.curves import charts_of
from eqat_tui.report.markup import Child, Html, join, table, tag
from eqat_tui.run_text import ANSWERS, accuracy_rows, doubts, error_line, facts, score_rows, title

Tree = Mapping[str, Any]
MOST_WARNINGS = 50


def run_section(run: RunDirectory, shown: Tree, state: RunState, *, letter: str = "") -> Html:
    """Everything about a run: how good, charts, what it cost, warnings, how it is made again."""
    name = title(shown)
    when = [format_time(t, "%Y-%m-%d %H:%M") for t in (shown["started"], shown["updated"]) if t is not None]
    return tag(
        "section",
        tag("h2" if letter else "h1", f"{letter}: {name}" if letter else name),
        tag("p", " to ".join(when), class_="muted") if when else None,
        _problems(shown),
        tag("div", *charts_of(state), class_="charts"),
        _measured(shown),
        _part("What it made and what it cost", _pairs(facts(shown))),
        _exports(shown),
        _phases(state),
        _bench(shown),
        _samples(shown),
        _again(run),
        _versions(shown, state),
        _settings(run),
        class_="run",
    )


def _part(name: str, *children: Child) -> Html:
    return tag("section", tag("h3", name), *children)


def _pairs(pairs: Mapping[str, str]) -> Html:
    return table([[name, value] for name, value in pairs.items()])


def _problems(shown: Tree) -> Html:
    """Why it failed, what it warned of, and why a measurement cannot be believed."""
    failed = error_line(shown)
    said = [
        one_line(f"{w['message']} ({w['hint']})" if w["hint"] else w["message"]) for w in shown["warnings"]
    ]
    # Why a perplexity cannot be believed is among the warnings; it stays where there are too many.
    several = list(dict.fromkeys([*doubts(shown), *said]))
    more = len(several) - MOST_WARNINGS
    items = [tag("li", one) for one in several[:MOST_WARNINGS]]
    items += [tag("li", f"and {more} more, which the run's log has")] if more > 0 else []
    return join(
        tag("p", failed, class_="error") if failed else None,
        tag("div", tag("strong", "Warnings"), tag("ul", *items), class_="note") if items else None,
    )


def _measured(shown: Tree) -> Html | None:
    """Perplexity of each version and how it was measured; accuracies."""
    rows = _perplexity_rows(shown["perplexity"])
    if not rows:
        return None
    how = shown.get("evaluation") or {}
    words = f"on {how['corpus']}, {how['tokens']:,} tokens at context {how['sequence_length']}" if how else ""
    words += f", {how['begin']}" if how.get("begin") else ""
    parts = [
        tag("p", f"Measured {one_line(words)}.", class_="muted") if words else None,
        table(rows, head=["perplexity", "", "of full precision"]),
    ]
    for first, *others in tables(shown):
        parts.append(table([list(row) for row in others], head=list(first)))
    if shown.get("measured"):
        first, *others = result_rows(shown["measured"])
        parts.append(table([list(row) for row in others], head=list(first)))
    if answers := _perplexity_rows(shown.get("answer_perplexity") or {}):
        parts.append(table(answers, head=[ANSWERS, "", "of full precision"]))
    if shown.get("accuracy"):
        head, *answered = accuracy_rows(shown["accuracy"])
        parts.append(table([list(row) for row in answered], head=list(head)))
    if shown.get("scores"):
        head, *answered = score_rows(shown["scores"])
        numbers: list[list[Child]] = [
            [row[0], *(tag("span", one, class_="number") for one in row[1:])] for row in answered
        ]
        parts.append(table(numbers, head=list(head)))
    return _part("How good it is", *parts)


def _perplexity_rows(measured: Mapping[str, float | None]) -> list[list[Child]]:
    """A perplexity of each version, and how many times that of full precision it is."""
    base = measured.get(full_precision())
    rows: list[list[Child]] = []
    for stage in versions(measured):
        value = measured.get(stage)
        if value is not None:
            ratio = f"{format_number(value / base, 3)}×" if base else ""
            rows.append([stage_label(stage), format_number(value), ratio])
    return rows


def _exports(shown: Tree) -> Html | None:
    """Every packed checkpoint: how large, and what reading it back found."""
    rows: list[list[Child]] = []
    for done in shown["exports"]:
        read, trained = done["perplexity"], done["perplexity_trained"]
        rows.append(
            [
                cell(done["format"]),
                format_bytes(done["bytes"]),
                "yes" if done["verified"] else tag("span", "NO", class_="error"),
                format_number(done["max_logit_diff"], 2),
                "" if read is None else f"{format_number(read)}, {format_number(trained)}",
                "" if read is None else f"{done['tokens'] or 0:,}",
                cell(done["rounded"]),
            ]
        )
    head: list[Child] = ["format", "size", "verified", "largest logit difference"]
    head += ["perplexity, read and trained", "tokens", "rounded"]
    return _part("Checkpoints as they are read back", table(rows, head=head)) if rows else None


def _phases(state: RunState) -> Html | None:
    """Time and memory of every phase, beside what the plan had said."""
    planned = {phase["name"]: phase["seconds"] for phase in known(state.plan)["phases"]}
    rows: list[list[Child]] = [
        [
            phase_label(row.name),
            format_seconds(row.seconds),
            format_seconds(planned.get(row.name)),
            _peak_of(row, "peak_gpu_bytes"),
            _peak_of(row, "peak_host_bytes"),
        ]
        for row in state.accounted().phases[:200]
    ]
    head: list[Child] = ["phase", "time", "planned", "GPU, peak", "process, peak"]
    return _part("Phases", table(rows, head=head)) if rows else None


def _peak_of(row: PhaseRow, name: str) -> str:
    """And of several processes, which had it, and what the others had."""
    words = whose(peaks([msgspec.to_builtins(row)], name))
    return format_bytes(getattr(row, name)) + (f" ({words})" if words else "")


def _bench(shown: Tree) -> Html | None:
    measured = shown.get("bench")
    return _part("Speed", tag("pre", measured_table(measured))) if measured else None


def _samples(shown: Tree) -> Html | None:
    """What the models wrote after a prompt."""
    found = [
        join(
            tag("p", tag("strong", stage_label(one["stage"])), f" after “{one['prompt'].strip()}”"),
            tag("pre", (one["problem"] or one["text"]).strip() or "(nothing)"),
        )
        for one in shown["samples"]
    ]
    return _part("What they write", *found) if found else None


def _again(run: RunDirectory) -> Html | None:
    """The command that makes the run again, and the file that it names where a preset does not do."""
    try:
        config = run.config()
        command = equivalent_command(config)
        written = to_toml(config) if command.endswith("config.toml") else ""
    except Exception:  # whatever a damaged file makes a parser raise costs this part and no other
        return _part("The same again", tag("p", "Its config.toml cannot be read.", class_="note"))
    parts = [tag("pre", command)]
    if written:
        parts += [tag("p", "with this in ", tag("code", "config.toml"), ":"), tag("pre", written)]
    return _part("The same again", *parts)


def _versions(shown: Tree, state: RunState) -> Html:
    pairs = {"run": str(shown["id"]), "directory": str(shown["path"])}
    if state.device:
        pairs["device"] = f"{cell(state.device)} of {cell(state.host)}"
    pairs |= {cell(name): cell(version) for name, version in list(state.versions.items())[:50]}
    return _part("Where and with what", _pairs(pairs))


def _settings(run: RunDirectory) -> Html | None:
    """Every setting, a section a table."""
    try:
        tree = essential(run.config())
    except Exception:  # see above
        return None
    sections: dict[str, list[list[Child]]] = {}
    for name, value in flat(tree).items():
        section, _, field = name.rpartition(".")
        if name not in LABELS:
            sections.setdefault(section, []).append([field, setting_words(value)])
    made = [
        tag("section", tag("h4", name or "run"), table(rows))
        for name, rows in sections.items()
        if not _is_off(rows)
    ]
    return _part("Settings", tag("div", *made, class_="settings"))


def _is_off(rows: list[list[Child]]) -> bool:
    """A stage that the run does not have: its settings said nothing."""
    return ["enabled", "False"] in rows
