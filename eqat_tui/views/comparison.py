"""Some runs side by side: what came of each, where that can be compared, and which settings differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from engine.config.fields import field_names
from engine.config.stages import full_precision, stage_label, versions
from engine.config.writing import flat, to_dict
from engine.run.directory import RunDirectory
from engine.run.events import BULK, Eval
from engine.run.state import RunState, load_state
from eqat_tui.charts import Series
from eqat_tui.lines import Line, Span, columns, cut, line, widths_of, wrap
from eqat_tui.output import format_bytes, format_count, format_number, format_seconds
from eqat_tui.views.monitor import elapsed
from eqat_tui.words import model_name

Words = Callable[[Any], str]


class Compared:
    """A run as far as a comparison needs it."""

    def __init__(self, run: RunDirectory, letter: str) -> None:
        self.letter, self.id = letter, run.id
        # Whatever a damaged file makes a parser raise: it is one empty column, and the others are shown.
        try:
            self.settings = flat(to_dict(run.config()))
        except Exception:
            self.settings = {}
        try:
            self.state = load_state(run, skip=BULK)
        except Exception:
            self.state = RunState(id=run.id)

    @property
    def model(self) -> Any:
        """Which model it quantizes: two of the same name in two places count as two."""
        return self.settings.get("model.source"), self.settings.get("model.revision")

    @property
    def place(self) -> str | None:
        """What it worked on, as far as that is known: seconds there are no seconds elsewhere."""
        return f"{self.state.device} of {self.state.host}" if self.state.device else None


class Difference:
    """Why numbers of some runs are not those of one thing."""

    def __init__(self, runs: Sequence[Compared]) -> None:
        self._runs = runs
        models = {str(run.model) for run in runs}
        self.models = len(models) > 1
        measured = [_measured(run) for run in runs]
        self.measures = [
            name
            for name, values in (
                ("texts", [e.corpus if e else None for e in measured]),
                ("contexts", [e.sequence_length if e else None for e in measured]),
            )
            if _differ(values)
        ]
        if not self.measures and _differ([e.tokens if e else None for e in measured]):
            self.measures = ["numbers of tokens"]  # which follow from the others
        self.places = _differ([run.place for run in runs])
        self.unfinished = [run.letter for run in runs if run.state.outcome != "done"]

    def sentences(self) -> list[str]:
        """What differs, and what is therefore not marked."""
        said: list[str] = []
        if self.models:
            of = self._each(lambda run: model_name(run.settings.get("model.source")))
            said.append(f"These are different models ({of}): no number of one is better than one of another.")
        if self.measures:
            how = self._each(lambda run: _conditions(_measured(run)))
            what = " and ".join(self.measures)
            said.append(f"Perplexity was measured with different {what}, none is marked: {how}.")
        if self.places and not self.models:
            said.append("They worked on different machines or devices: no time is marked.")
        if self.unfinished and not self.models:
            verb = "is" if len(self.unfinished) == 1 else "are"
            said.append(f"{', '.join(self.unfinished)} {verb} not finished: no time is marked.")
        return said

    def _each(self, words: Callable[[Compared], str]) -> str:
        return ", ".join(f"{run.letter} {words(run)}" for run in self._runs)


def _measured(run: Compared) -> Eval | None:
    """How a run measured perplexity: as it did of its newest version."""
    return next(reversed(run.state.evaluations.values()), None)


def _conditions(found: Eval | None) -> str:
    if found is None:
        return "not at all"
    return f"{found.corpus}, {format_count(found.tokens)} tokens at context {found.sequence_length}"


def _differ(values: Sequence[Any]) -> bool:
    return len({value for value in values if value is not None}) > 1


def differences(runs: Sequence[Compared], width: int) -> list[Line]:
    """What came of each run, then the settings that are not the same in all of them."""
    found = Difference(runs)
    names = [line((f"{run.letter} ", f"{_role(i)} strong"), run.id) for i, run in enumerate(runs)]
    notes = [row for words in found.sentences() for row in wrap(f"≠ {words}", width, "warn")]
    head: list[str | Span] = ["", *((run.letter, f"{_role(i)} strong") for i, run in enumerate(runs))]
    between: list[str | Span] = ["", *("" for _ in runs)]
    table = [head, *_results(runs, found), between, *_settings(runs)]
    sizes = widths_of(table)
    room = max(8, (width - sizes[0] - 2 * len(runs)) // max(1, len(runs)))
    sizes = [sizes[0], *(min(size, room) for size in sizes[1:])]
    return [*names, *notes, line(), *(cut(row, width) for row in columns(table, sizes))]


def _results(runs: Sequence[Compared], found: Difference) -> list[list[str | Span]]:
    """What came of each run; the smallest number is marked where they are of one thing."""
    table: list[list[str | Span]] = []
    measured = [run.state.perplexity() for run in runs]
    alike = not (found.models or found.measures)
    for stage in versions(name for one in measured for name in one):
        values = [one.get(stage) for one in measured]
        if any(value is not None for value in values):
            words = f"perplexity, {stage_label(stage)}" if stage == full_precision() else stage_label(stage)
            table.append([(words, "muted"), *_cells(values, format_number, marked=alike)])
    exports = [run.state.smallest_export() for run in runs]
    sizes = [export.bytes if export else None for export in exports]
    bits = [export.bits_per_weight if export else None for export in exports]
    times = [elapsed(run.state) or None for run in runs]
    alike_in_time = not (found.models or found.places or found.unfinished)
    table.append([("size", "muted"), *_cells(sizes, format_bytes, marked=not found.models)])
    table.append(
        [("bits per weight", "muted"), *_cells(bits, lambda v: format_number(v, 3), marked=not found.models)]
    )
    table.append([("time", "muted"), *_cells(times, format_seconds, marked=alike_in_time)])
    return table


def _settings(runs: Sequence[Compared]) -> list[list[str | Span]]:
    table: list[list[str | Span]] = []
    for name in field_names():
        values = [run.settings.get(name, "?") for run in runs]
        if name not in ("name", "description") and any(value != values[0] for value in values):
            table.append([(name, "muted"), *map(_value, values)])
    return table or [[("settings", "muted"), *("the same" for _ in runs)]]


def _role(index: int) -> str:
    return f"series{index % 4 + 1}"


def _cells(values: Sequence[Any], words: Words, *, marked: bool) -> list[str | Span]:
    """Each value; ``marked`` points at the smallest, unless all are the same."""
    known = [value for value in values if value is not None]
    best = min(known) if marked and len(known) > 1 and len(set(known)) > 1 else None
    return [
        (f"{words(value)} ◂", "good") if value is not None and value == best else words(value)
        for value in values
    ]


def overlaid(runs: Sequence[Compared]) -> list[Series]:
    """Final loss per block of every run."""
    return [
        Series(
            run.letter,
            [(row.index, row.final_loss) for row in run.state.trained_blocks() if row.finished],
            _role(index),
        )
        for index, run in enumerate(runs)
    ]


def _value(value: Any) -> str:
    if value is None:
        return "none"
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
