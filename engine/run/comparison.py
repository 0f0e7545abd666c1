"""Some runs side by side: what came of each, which of these numbers can be compared, which settings differ.

A number is only better than another one where both measure one thing: a perplexity the same model on the same
text, a time the same machine. :class:`Difference` says where that is not so, and no number is called the best
then. What a run was made from is known by digests (``run.json``), wherever it lay; where a run has none, by
name.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from engine.config.fields import field_names
from engine.config.run import LABELS
from engine.config.stages import full_precision, versions
from engine.config.writing import flat, to_dict
from engine.errors import UsageError, first_line
from engine.run.directory import RunDirectory
from engine.run.events import BULK, Eval
from engine.run.measured import asked_later, measured, with_later
from engine.run.state import RunState, load_state

LETTERS = string.ascii_uppercase
"""What the runs are called in a comparison."""
MOST_ROWS = 400
"""Of one kind; a log that names more versions or tasks is damaged."""


class Compared:
    """A run as far as a comparison needs it."""

    def __init__(self, run: RunDirectory, letter: str) -> None:
        self.letter, self.id, self.path = letter, run.id, str(run.path)
        self.problem = ""
        """Why a part of it is not known."""
        # Whatever a damaged file makes a parser raise: it is one empty column, and the others are shown.
        try:
            self.settings = flat(to_dict(run.config()))
        except Exception as error:
            self.settings, self.problem = {}, f"its settings cannot be read: {first_line(error)}"
        try:
            self.state = load_state(run, skip=BULK)
        except Exception as error:
            self.state, self.problem = RunState(id=run.id), f"its log cannot be read: {first_line(error)}"
        try:
            digests = (run.manifest() or {}).get("identity")
        except Exception:
            digests = None  # without them it is known by names
        self.others = measured(run)
        """What eqat eval measured of it otherwise."""
        self.scores = with_later(self.state.scores(), asked_later(run))
        self.digests: dict[str, Any] = digests if isinstance(digests, dict) else {}

    @property
    def source(self) -> Any:
        """The model that it quantizes: of imported blocks their original, if it is known."""
        return self.settings.get("imported.reference") or self.settings.get("model.source")

    def same_model(self, other: Compared) -> bool:
        """Whether both quantize one model, by what is in it where that is known of both, else by its name:
        two of the same name in two places count as two then."""
        for name in ("reference", "model"):
            digests = (self.digests.get(name), other.digests.get(name))
            if None not in digests:
                return digests[0] == digests[1]
            if digests != (None, None):
                break  # an imported checkpoint and a model: only names can tell
        return self._named() == other._named()

    def _named(self) -> tuple[Any, Any]:
        imported = self.settings.get("imported.reference")
        return self.source, None if imported else self.settings.get("model.revision")

    @property
    def place(self) -> str | None:
        """What it worked on, as far as that is known: seconds there are no seconds elsewhere."""
        return f"{self.state.device} of {self.state.host}" if self.state.device else None

    @property
    def measured(self) -> Eval | None:
        """How it measured perplexity: as it did of its newest version."""
        return next(reversed(self.state.evaluations.values()), None)


def compared(runs: Sequence[RunDirectory]) -> list[Compared]:
    """Several runs, with letters in their order.

    Raises:
        UsageError: for less than two, for more than there are letters, and for one that is named twice.
    """
    if not 2 <= len(runs) <= len(LETTERS):
        raise UsageError(
            f"{len(runs)} cannot be compared", where="RUN", hint=f"name 2 to {len(LETTERS)} runs"
        )
    named_twice(runs)
    return [Compared(run, letter) for run, letter in zip(runs, LETTERS, strict=False)]


def named_twice(runs: Sequence[RunDirectory]) -> None:
    """UsageError where two of the runs are one."""
    for index, run in enumerate(runs):
        if run.path in [other.path for other in runs[:index]]:
            raise UsageError("is named twice", where=run.id, hint="name each run once")


class Difference:
    """Why numbers of some runs are not those of one thing."""

    def __init__(self, runs: Sequence[Compared]) -> None:
        self.models = any(not run.same_model(runs[0]) for run in runs)
        measured = [run.measured for run in runs]
        self.measures = [
            name
            for name, values in (
                ("texts", _texts(runs)),
                ("contexts", [e.sequence_length if e else None for e in measured]),
                ("beginnings of sequences", [e.begin if e else None for e in measured]),
            )
            if _differ(values)
        ]
        if not self.measures and _differ([e.tokens if e else None for e in measured]):
            self.measures = ["numbers of tokens"]  # which follow from the others
        self.places = _differ([run.place for run in runs])
        self.unfinished = [run.letter for run in runs if run.state.outcome != "done"]


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One number of every run."""

    name: str
    """One of ``perplexity``, ``of_full_precision``, ``kl``, ``top1``, ``accuracy``, ``score``,
    ``size_bytes``, ``bits_per_weight`` and ``seconds``."""
    stage: str | None = None
    """The version of the model that it is of, where it is of one."""
    task: str | None = None
    text: str | None = None
    """What it was measured on, where that is not the text of the run's own measure."""
    values: tuple[float | None, ...]
    comparable: bool
    """They are numbers of one thing."""
    better: Literal["smaller", "larger"] = "smaller"

    @property
    def best(self) -> tuple[int, ...]:
        """Which of them are the best, where they can be compared and are not all the same."""
        known = [value for value in self.values if value is not None]
        if not self.comparable or len(known) < 2 or len(set(known)) < 2:
            return ()
        best = min(known) if self.better == "smaller" else max(known)
        return tuple(index for index, value in enumerate(self.values) if value == best)


def results(runs: Sequence[Compared], found: Difference) -> list[Row]:
    """What came of each run; perplexities and accuracies by version of the model."""
    exports = [run.state.smallest_export() for run in runs]
    alike = not found.models
    one_format = len({export.format for export in exports if export is not None}) < 2
    return [
        *_perplexities(runs, comparable=alike and not found.measures),
        *_divergences(runs, comparable=alike and not found.measures),
        *_answers(runs, comparable=alike),
        *_other_texts(runs, comparable=alike),
        *_measured_later(runs, comparable=alike),
        *_accuracies(runs, comparable=alike),
        *_scores(runs, comparable=alike),
        Row(
            name="size_bytes",
            values=tuple(e.bytes if e else None for e in exports),
            comparable=alike and one_format,
        ),
        Row(
            name="bits_per_weight",
            values=tuple(e.bits_per_weight if e else None for e in exports),
            comparable=alike,
        ),
        Row(
            name="seconds",
            values=tuple(run.state.worked_s or None for run in runs),
            comparable=alike and not (found.places or found.unfinished),
        ),
    ]


def _perplexities(runs: Sequence[Compared], *, comparable: bool) -> list[Row]:
    """Perplexity of every version, then how many times that of full precision it is: across models and texts
    the only part of it that says something, and still no number of one thing."""
    measured = [run.state.perplexity() for run in runs]
    base = [one.get(full_precision()) for one in measured]
    rows, shares = [], []
    for stage in versions(name for one in measured for name in one)[:MOST_ROWS]:
        values = tuple(one.get(stage) for one in measured)
        if all(value is None for value in values):
            continue
        rows.append(Row(name="perplexity", stage=stage, values=values, comparable=comparable))
        parts = tuple(v / b if v is not None and b else None for v, b in zip(values, base, strict=True))
        if stage != full_precision() and any(part is not None for part in parts):
            shares.append(Row(name="of_full_precision", stage=stage, values=parts, comparable=comparable))
    return [*rows, *shares]


def _divergences(runs: Sequence[Compared], *, comparable: bool) -> list[Row]:
    """How far what each version predicts is from full precision, on the run's own text."""
    measured = [run.state.divergence() for run in runs]
    rows = []
    for stage in versions(name for one in measured for name in one)[:MOST_ROWS]:
        found = [one.get(stage) for one in measured]
        if not any(found):
            continue
        kl, top1 = (tuple(getattr(one, name) if one else None for one in found) for name in ("kl", "top1"))
        rows.append(Row(name="kl", stage=stage, values=kl, comparable=comparable))
        rows.append(Row(name="top1", stage=stage, values=top1, comparable=comparable, better="larger"))
    return rows


def _other_texts(runs: Sequence[Compared], *, comparable: bool) -> list[Row]:
    """Perplexity and divergence on texts besides the run's own, by their names: one thing where as many
    tokens were measured in one way."""
    measured = [run.state.texts() for run in runs]
    ways = [(e.sequence_length, e.begin) if (e := run.measured) else None for run in runs]
    rows: list[Row] = []
    for text in dict.fromkeys(name for one in measured for name in one):
        by_stage = [one.get(text, {}) for one in measured]
        for stage in versions(name for one in by_stage for name in one):
            found = [one.get(stage) for one in by_stage]
            if not any(found) or len(rows) >= MOST_ROWS:
                continue
            tokens = [(one.tokens, way) if one else None for one, way in zip(found, ways, strict=True)]
            same = comparable and not _differ(tokens)
            values = tuple(one.perplexity if one else None for one in found)
            rows.append(Row(name="perplexity", stage=stage, text=text, values=values, comparable=same))
            kl = tuple(one.divergence.kl if one and one.divergence else None for one in found)
            if any(value is not None for value in kl):
                rows.append(Row(name="kl", stage=stage, text=text, values=kl, comparable=same))
    return rows


def _measured_later(runs: Sequence[Compared], *, comparable: bool) -> list[Row]:
    """What ``eqat eval`` measured later, a row a version, a text, a context and a protocol: these are numbers
    of one thing by that."""
    by_key = [{one.key: one for one in run.others} for run in runs]
    rows: list[Row] = []
    for key in dict.fromkeys(key for one in by_key for key in one):
        found = [one.get(key) for one in by_key]
        some = next(one for one in found if one is not None)
        begin = f", {some.begin}" if some.begin else ""
        text = f"{some.corpus} at context {some.sequence_length}{begin}"
        named: dict[str, Any] = {"stage": some.stage, "text": text, "comparable": comparable}
        values = tuple(one.perplexity if one else None for one in found)
        rows.append(Row(name="perplexity", values=values, **named))
        kl = tuple(one.divergence.kl if one and one.divergence else None for one in found)
        if any(value is not None for value in kl):
            rows.append(Row(name="kl", values=kl, **named))
    return rows[:MOST_ROWS]


def _answers(runs: Sequence[Compared], *, comparable: bool) -> list[Row]:
    """Perplexity of the answers of held-out conversations by version; of one thing where they have as many
    tokens."""
    rows: list[Row] = []
    measured = [run.state.answer_perplexity() for run in runs]
    for stage in versions(name for one in measured for name in one)[:MOST_ROWS]:
        evaluations = [run.state.evaluations.get(stage) for run in runs]
        tokens = [e.answer_tokens if e and e.answer_tokens else None for e in evaluations]
        values = tuple(one.get(stage) for one in measured)
        if any(value is not None for value in values):
            same = comparable and not _differ(tokens)
            rows.append(Row(name="answer_perplexity", stage=stage, values=values, comparable=same))
    return rows


def _accuracies(runs: Sequence[Compared], *, comparable: bool) -> list[Row]:
    """Share of right answers by version and task; of one thing where as many questions were asked."""
    rows: list[Row] = []
    answered = [run.state.accuracy() for run in runs]
    for stage in versions(name for one in answered for name in one):
        tasks = dict.fromkeys(task for one in answered for task in one.get(stage, {}))
        for task in list(tasks)[: MOST_ROWS - len(rows)]:
            evaluations = [run.state.evaluations.get(stage) for run in runs]
            asked = [e.questions.get(task) if e and task in e.accuracy else None for e in evaluations]
            rows.append(
                Row(
                    name="accuracy",
                    stage=stage,
                    task=task,
                    values=tuple(one.get(stage, {}).get(task) for one in answered),
                    comparable=comparable and not _differ(asked),
                    better="larger",
                )
            )
    return rows


def _scores(runs: Sequence[Compared], *, comparable: bool) -> list[Row]:
    """What lm-eval made of the answers by version, task and metric; of one thing where as many questions were
    asked by the same version of lm-eval."""
    rows: list[Row] = []
    answered = [{stage: {one.name: one for one in run.scores[stage]} for stage in run.scores} for run in runs]
    for stage in versions(name for one in answered for name in one):
        names = dict.fromkeys(name for one in answered for name in one.get(stage, {}))
        for name in list(names)[: MOST_ROWS - len(rows)]:
            found = [one.get(stage, {}).get(name) for one in answered]
            asked = [(one.questions, one.by, one.better) if one else None for one in found]
            rows.append(
                Row(
                    name="score",
                    stage=stage,
                    task=name,
                    values=tuple(one.value if one else None for one in found),
                    comparable=comparable and not _differ(asked),
                    better=next(one.better for one in found if one),
                )
            )
    return rows


def differing_settings(runs: Sequence[Compared]) -> dict[str, list[Any]]:
    """Settings that are not the same in all runs, with the value of each run; ``?`` where it has none."""
    found: dict[str, list[Any]] = {}
    for name in field_names():
        values = [run.settings.get(name, "?") for run in runs]
        if name not in LABELS and any(value != values[0] for value in values):
            found[name] = values
    return found


def _texts(runs: Sequence[Compared]) -> list[Any]:
    """What tells the texts apart that perplexity was measured on: where all measured as many tokens in the
    same way, the digest of these tokens, if every run has it; else their names."""
    measured = [(run, run.measured) for run in runs if run.measured is not None]
    digests = [run.digests.get("evaluation text") for run, _ in measured]
    ways = {(found.tokens, found.sequence_length) for _, found in measured if found is not None}
    if len(ways) == 1 and all(isinstance(digest, str) for digest in digests):
        return digests
    return [found.corpus for _, found in measured if found is not None]


def _differ(values: Sequence[Any]) -> bool:
    return len({value for value in values if value is not None}) > 1
