"""The draft of a run: a preset, what was changed about it, and what the setup screen says about both."""

from __future__ import annotations

import importlib.util
import shlex
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from engine.config.base import describe
from engine.config.calibration import mixture, text_setting
from engine.config.corpora import CORPORA
from engine.config.data import BUILTIN, OPTIONS, OWN
from engine.config.derived import resolve
from engine.config.fields import field_names, field_type, value_of
from engine.config.grid import BITS, GROUP_SIZES, HEAD_BITS
from engine.config.lists import value_words
from engine.config.loading import preset_names
from engine.config.run import RunConfig
from engine.config.validation import validate
from engine.errors import EqatError
from engine.run.finding import default_runs_dir
from eqat_tui.configure import load_for_user
from eqat_tui.lines import Line, Span, bar, cut, line, wrap
from eqat_tui.models import DEMO_PACKAGE
from eqat_tui.output import cell, counted, format_bits, format_bytes, format_parameters, format_seconds, share
from eqat_tui.planned import known
from eqat_tui.views import methods
from eqat_tui.words import error_for_app, hint_for_app, model_name


def first_preset() -> str:
    """What the form begins with: the demo, where its model is installed."""
    try:
        there = importlib.util.find_spec(DEMO_PACKAGE) is not None
    except (ImportError, ValueError):
        there = False
    return "demo" if there and "demo" in preset_names() else "paper"


TEXTS = (BUILTIN, OWN, *CORPORA)
"""What ``left`` and ``right`` go through; enter takes anything else."""

FLAGS = {
    "model.source": "--model",
    "grid.bits": "--bits",
    "grid.group_size": "--group-size",
    "data.source": "--data",
    "runtime.device": "--device",
}


TEXT, MIXTURE = "data.source", "data.mix"
_INSTEAD = {TEXT: (MIXTURE,), MIXTURE: (TEXT, *(f"data.{option}" for option in OPTIONS))}
"""Of the two fields that say which text is learned from, one stands in the place of the other."""


class Draft(msgspec.Struct, frozen=True, kw_only=True):
    """What has been chosen so far."""

    base: str = "paper"
    """A preset, or a path to a file."""
    changes: Mapping[str, object] = {}
    """Fields that were set, by dotted name."""

    def set(self, name: str, value: object) -> Draft:
        """With another value of a field; the one that the base has anyway is no change."""
        if name == TEXT and isinstance(value, str):
            name, value = text_setting(value)
        gone = (name, *_INSTEAD.get(name, ()))
        changes = {key: old for key, old in self.changes.items() if key not in gone}
        bare = Draft(base=self.base, changes=changes)
        changed = Draft(base=self.base, changes={**changes, name: value})
        if bare.loaded() != changed.loaded():
            return changed
        return Draft(base=self.base, changes=changes)

    def with_method(self, name: str) -> Draft:
        """With the stages of a method enabled, and no others."""
        wanted = methods.methods()[name]
        draft = self
        for stage in methods.choosable("block", "network"):
            draft = draft.set(methods.switch(stage), stage in wanted)
        return draft

    def reset(self, names: Sequence[str]) -> Draft:
        """With what the base says about these fields."""
        return Draft(base=self.base, changes={k: v for k, v in self.changes.items() if k not in names})

    def on(self, base: str) -> Draft:
        """The same changes on another base; those that it has anyway go."""
        draft = Draft(base=base)
        for name, value in self.changes.items():
            draft = draft.set(name, value)
        return draft

    def loaded(self) -> RunConfig:
        """The configuration, not checked and with derived values left out."""
        return load_for_user(self.base, self.changes)

    def config(self) -> RunConfig:
        """The configuration that would run; UsageError names the field that is wrong."""
        config = resolve(self.loaded())
        validate(config)
        return config

    def shown(self) -> RunConfig:
        """The configuration as far as it can be shown, right or wrong."""
        return resolve(self.loaded())

    def command(self, runs_dir: Path | None = None) -> str:
        """The equal ``eqat run``."""
        words = ["eqat", "run", self.base]
        for name, value in self.changes.items():
            text = value_words(value)
            if name in FLAGS:
                words += [FLAGS[name], text]
            elif name == "model.trust_remote_code" and value is True:
                words.append("--trust-remote-code")
            else:
                words += ["--set", f"{name}={text}"]
        if runs_dir is not None and runs_dir != default_runs_dir():
            words += ["--runs-dir", str(runs_dir)]
        return shlex.join(words)


# -- the form ------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """One line of the form."""

    kind: Literal["model", "base", "method", "field", "section"]
    name: str
    """Dotted name of the field or of the section."""
    label: str


_TEXT_ROW = Row("field", TEXT, "Text")
HEAD = (
    Row("model", "model.source", "Model"),
    Row("base", "", "Preset"),
    Row("method", "", "Method"),
    Row("field", "grid.bits", "Bits"),
    Row("field", "grid.group_size", "Group size"),
    _TEXT_ROW,
    Row("field", "runtime.device", "Device"),
)
_IN_HEAD = frozenset(row.name for row in HEAD if row.name)


def section_fields(section: str) -> tuple[str, ...]:
    """The fields that are folded away in a section."""
    names = field_names()
    above = _IN_HEAD | set(methods.switches())
    return tuple(name for name in names if name.startswith(f"{section}.") and name not in above)


def rows(unfolded: frozenset[str], words: str = "") -> list[Row]:
    """The form from top to bottom; with ``words``, every field in whose name or meaning they occur."""
    if words:
        return [Row("field", name, name) for name in matching(words)]
    made = list(HEAD)
    for section, label in methods.sections().items():
        made.append(Row("section", section, label))
        if section in unfolded:
            made += [Row("field", name, name.removeprefix(f"{section}.")) for name in section_fields(section)]
    return made


def matching(words: str) -> list[str]:
    """Fields that have all of ``words`` in name or meaning, those with a name like it first."""
    from engine.config.field_docs import field_help

    help_of = field_help()
    wanted = words.lower().split()
    found = [
        name
        for name in field_names()
        if name not in ("name", "description")
        and all(word in f"{name} {help_of.get(name, '')}".lower() for word in wanted)
    ]
    return sorted(found, key=lambda name: not all(word in name for word in wanted))


def choices(name: str, devices: Sequence[str] = ()) -> tuple[object, ...]:
    """What left and right go through; nothing for a number or a text."""
    known: dict[str, tuple[object, ...]] = {
        "grid.bits": BITS,
        "grid.group_size": GROUP_SIZES,
        "grid.head_bits": HEAD_BITS,
        "data.source": TEXTS,
        "evaluation.data.source": ("wikitext2", "builtin", "c4"),
        "runtime.device": ("auto", *devices, "cpu"),
    }
    if name in known:
        return known[name]
    kind = field_type(name)
    if kind is bool:
        return (False, True)
    if typing.get_origin(kind) is Literal:
        return typing.get_args(kind)
    return ()


OPEN = ("data.source", "evaluation.data.source", "runtime.device")
"""Fields that take more than what left and right go through."""


def complaint(draft: Draft, name: str, text: str) -> str:
    """Why ``text`` is no value for the field; empty when it is one, whatever else may be wrong."""
    try:
        draft.set(name, text).config()
    except EqatError as error:
        if error.where in (name, *_INSTEAD.get(name, ())):
            return f"{error.message}{hint_for_app(error.hint)}"
    return ""


def form_line(
    row: Row, draft: Draft, config: RunConfig, unfolded: frozenset[str], wrong: str, width: int
) -> Line:
    """One line of the form: label, value, and marks for what was changed and what is wrong."""
    if row.kind == "section":
        names = section_fields(row.name)
        changed = sum(name in draft.changes for name in names)
        count = f"{len(names)} settings" + (f", {changed} changed" if changed else "")
        mark = "▾" if row.name in unfolded else "▸"
        bad = "! " if wrong.startswith(f"{row.name}.") and wrong in names else ""
        return cut(
            line((f"{mark} {row.label}", "strong"), (f"  {count}", "muted"), (f" {bad}", "bad")), width
        )
    size = 11 if row.kind != "field" or row.name in _IN_HEAD else max(18, len(row.label) + 4)
    indent = "" if row in HEAD else "  "
    changed_here = bool(names_of(row) & set(draft.changes)) and row.kind != "base"
    mark = "*" if changed_here else " "
    is_wrong = bool(wrong) and (wrong in names_of(row) or (row.kind == "base" and wrong == "preset"))
    spans = line(
        indent, (mark, "warn"), (row.label.ljust(size - len(indent)), "muted"), *_value(row, draft, config)
    )
    return cut([*spans, *line(("  !" if is_wrong else "", "bad"))], width)


def names_of(row: Row) -> set[str]:
    """The fields that a line of the form stands for."""
    if row.kind == "method":
        return set(methods.switches())
    if row.kind == "section":
        return set(section_fields(row.name))
    # The line of the text has the mixture too, if there is one.
    return {TEXT, MIXTURE} if row is _TEXT_ROW else {row.name}


def shown_value(row: Row, config: RunConfig) -> object:
    """What a line of the form shows and lets edit."""
    if row is _TEXT_ROW and (parts := mixture(config.data)):
        return parts
    return value_of(config, row.name)


def _value(row: Row, draft: Draft, config: RunConfig) -> Line:
    if row.kind == "model":
        source = config.model.source
        return line((model_name(source), "strong")) if source else line(("choose one: enter", "warn"))
    if row.kind == "base":
        return line(draft.base if len(draft.base) < 40 else f"…{draft.base[-38:]}")
    if row.kind == "method":
        return line(methods.method_of(config))
    value = shown_value(row, config)
    if row.name in ("grid.bits", "grid.group_size"):
        spans: Line = []
        for option in choices(row.name):
            word = "channel" if option == -1 else str(option)
            spans += [(f"[{word}]", "strong accent") if option == value else (f" {word} ", "muted")]
        return spans
    return line(value_words(value))


def meaning(row: Row, draft: Draft, config: RunConfig) -> str:
    """What a line of the form means, with its default."""
    from engine.config.field_docs import field_help

    if row.kind == "model":
        return "The model to quantize. enter lists what is here, and takes a folder, a file or a hub id."
    if row.kind == "base":
        description = config.description or "a file of yours"
        return f"{description}. enter lists the presets; what you changed (*) stays changed."
    if row.kind == "method":
        return methods.about()
    if row.kind == "section":
        return "enter or → unfolds these settings, ← folds them. / finds one by name or meaning."
    words = field_help().get(row.name, "")
    default = value_of(resolve(Draft(base=draft.base).loaded()), row.name)
    takes = what_it_takes(row.name)
    return f"{row.name} (preset: {value_words(default)}; takes {takes}): {words}"


def what_it_takes(name: str) -> str:
    """What a field takes, in words."""
    if name == "grid.bits":
        return "2, 3, 4 or 8"
    if name == "grid.group_size":
        return "32, 64, 128, 256, or -1 for whole rows (channel)"
    if name == "grid.head_bits":
        return "0 (16-bit numbers), 4 or 8"
    return describe(field_type(name))


# -- the plan ------------------------------------------------------------------------------------------


def plan_lines(plan: Mapping[str, Any], width: int) -> list[Line]:
    """What the run would need against what is free, what it makes, and what stands in its way."""
    plan = known(plan)
    machine = plan["machine"]
    lines = [_heading(plan)]
    for problem in plan["problems"]:
        lines += wrap(f"✗ {problem['message']}{hint_for_app(problem['hint'])}", width, "bad")
    lines.append(line(("where  ", "muted"), _place(plan)))
    if plan["device"] == "cuda":
        lines += _need("GPU", plan["peak_gpu_bytes"], machine["gpu_free"], width)
    lines += _need("host", plan["peak_host_bytes"], machine["host_free"], width)
    lines += _need("disk", plan["disk_bytes"], machine["disk_free"], width)
    # Of several exports the smallest is what was asked for; the others are for other readers.
    smallest = min(filter(None, plan["export_sizes"].values()), default=plan["export_bytes"])
    ratio = (plan["fp_bytes"] or 0) / smallest if smallest else 0
    whose = next((name for name, size in plan["export_sizes"].items() if size == smallest), "")
    whose = f" ({cell(whose)})" if len(plan["export_sizes"]) > 1 else ""
    lines += [
        line(("time   ", "muted"), (f"about {format_seconds(plan['seconds'])}", "strong")),
        line(
            ("size   ", "muted"),
            f"{format_bytes(plan['fp_bytes'])} → {format_bytes(smallest)}{whose}",
            (f"  {format_bits(ratio)}×", "muted"),
        ),
        line(("bits   ", "muted"), f"{format_bits(plan['bits_per_weight'])} per weight"),
    ]
    if plan["zero_points"]:
        lines += wrap(f"zero points {plan['zero_points']}", width)
    if plan["head"]:
        lines += wrap(plan["head"], width)
    lost = plan["recovery"]["lost_seconds"]
    lines.append(line(("a kill ", "muted"), f"loses at most {format_seconds(lost)}"))
    lines += _published(plan, width)
    for warning in plan["warnings"]:
        lines += wrap(f"! {warning}", width, "warn")
    return [cut(row, width) for row in lines]


def _heading(plan: Mapping[str, Any]) -> Line:
    size = format_parameters(plan["parameters"])
    return line(
        (plan["model_type"], "strong"),
        f", {size} parameters, {counted(plan['blocks'], 'block')}",
        ("", "muted"),
    )


def _place(plan: Mapping[str, Any]) -> str:
    machine = plan["machine"]
    return str(machine["gpu_name"] if plan["device"] == "cuda" else f"{machine['cpus']} CPU cores")


def _need(name: str, needed: int | None, free: int | None, width: int) -> list[Line]:
    needed, free = needed or 0, free or 0
    over = needed > free
    role = "bad" if over else "good"
    words: Span = (f"{format_bytes(needed)} of {format_bytes(free)} free", "bad strong" if over else "")
    head = line((name.ljust(7), "muted"), words)
    room = min(20, width - 7 - len(words[0]) - 2)
    if room >= 6:
        head += line("  ", *bar(share(needed, free) if free else 1.0, room, role))
    return [head]


def _published(plan: Mapping[str, Any], width: int) -> list[Line]:
    paper = plan.get("published")
    if not paper:
        return []
    return wrap(
        f"paper: {paper['model']} {paper['setting']} reached perplexity {paper['perplexity']} "
        f"(full precision {paper['fp_perplexity']}), accuracy {paper['accuracy']} % "
        f"of {paper['fp_accuracy']} %",
        width,
        "accent",
    )


NO_MODEL = "no model is chosen yet: enter on the first line lists those that are here"


def error_words(error: Exception) -> str:
    """Why there is no plan, in one sentence."""
    if _wants_a_model(error):
        return NO_MODEL
    return error_for_app(error) if isinstance(error, EqatError) else str(error)


def error_lines(error: Exception, width: int) -> list[Line]:
    """The same in the plan's place; a choice that is still to be made is no mistake."""
    if _wants_a_model(error):
        return wrap(NO_MODEL, width, "warn")
    return wrap(f"✗ {error_words(error)}", width, "bad")


def _wants_a_model(error: Exception) -> bool:
    return isinstance(error, EqatError) and (error.where, error.message) == ("model.source", "is empty")
