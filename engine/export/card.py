"""The model card: what this model is, how good it is, how it was made, how to load it.

Everything in it follows from the run's configuration and results, so two identical runs write the same
bytes: no dates, durations or machine names.

``card`` may hold (all optional):

- ``base_model``: hub id or name of the quantized model
- ``imported``: whether somebody else has quantized it
- ``license``: licence identifier of the base model, passed on
- ``command``: the exact command that made the run
- ``perplexity``: of each stage by its name, absent or None where not measured
- ``answer_perplexity``: the same on answers of held-out conversations
- ``answers``: one line: which answers these are
- ``accuracy``: of each stage by its name, of each task by its name
- ``further``: of each stage by its name, a :class:`engine.run.measures.Further`
- ``evaluation``: one line: corpus, tokens, window length
- ``doubts``: why the perplexities cannot be believed, a sentence each
- ``method``: list of lines that say what was trained on what
- ``config``: the run's configuration as TOML text
- ``versions``: ``{"torch": "...", ...}``
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from engine.config.stages import STAGES
from engine.evaluation.plausible import CHECK
from engine.export.layout import Form, Linears, group_sizes
from engine.export.result import ExportResult
from engine.run.measures import Further, TaskScore


def model_card(
    card: dict[str, Any], result: ExportResult, linears: Linears, *, form: Form, loading: str
) -> str:
    """README.md of an exported directory; the section ``loading`` is the format's."""
    widths = sorted({linear.grid.bits for linear in linears.values()})
    bits, sizes = _list(widths), group_sizes(linears)
    base = card.get("base_model") or "unnamed model"
    groups = "one group per row" if sizes == (-1,) else f"groups of {_list(sizes)}"
    parts = [
        _front_matter(card, form.library, [*form.tags, *(f"{width}-bit" for width in widths)]),
        f"# {base.rstrip('/').rpartition('/')[2]}, {bits} bits, {groups}\n",
        f"`{base}`, {_made(card)}. {form.sentence(bits, result.dtype)}\n",
        _size_table(result),
        _perplexity_table(card),
        _divergence_table(card),
        _answer_table(card),
        _texts_table(card),
        _accuracy_table(card),
        _score_table(card),
    ]
    if card.get("command"):
        parts.append(f"## How it was made\n\n```\n{card['command']}\n```\n")
    if card.get("method"):
        parts.append("\n".join(f"- {line}" for line in card["method"]) + "\n")
    if card.get("config"):
        parts.append(f"Configuration:\n\n```toml\n{card['config'].strip()}\n```\n")
    if card.get("versions"):
        versions = ", ".join(f"{name} {version}" for name, version in sorted(card["versions"].items()))
        parts.append(f"Versions: {versions}.\n")
    parts.append(loading)
    grids = dict.fromkeys(linear.grid for linear in linears.values())
    outputs = [linear.out_features for linear in linears.values()]
    cautions = dict.fromkeys(text for grid in grids for text in form.format.warnings(grid, outputs))
    if cautions:
        parts.append("\n".join(f"- {text[:1].upper()}{text[1:]}." for text in cautions) + "\n")
    return "\n".join(part for part in parts if part)


def _made(card: dict[str, Any]) -> str:
    return "quantized by others and imported with eqat" if card.get("imported") else "quantized with eqat"


def _list(numbers: Iterable[int]) -> str:
    return " and ".join(map(str, numbers))


def _front_matter(card: dict[str, Any], library: str, tags: list[str]) -> str:
    lines = ["---", f"library_name: {library}", "pipeline_tag: text-generation"]
    base = card.get("base_model") or ""
    # The hub links a card to its base model; a local path would be a broken link.
    if base.count("/") == 1 and not base.startswith((".", "/", "~")):
        lines.append(f"base_model: {base}")
        lines.append("base_model_relation: quantized")
    if card.get("license"):
        lines.append(f"license: {card['license']}")
    lines += ["tags:", "- eqat", *(f"- {tag}" for tag in tags), "---\n"]
    return "\n".join(lines)


def _size_table(result: ExportResult) -> str:
    ratio = result.fp_bytes / max(1, result.bytes)
    return (
        "| | |\n|---|---|\n"
        f"| bits per quantized weight, scales and zero points included | {result.bits_per_weight:.3f} |\n"
        f"| size | {result.bytes / 1e6:,.1f} MB |\n"
        f"| size at 16 bits | {result.fp_bytes / 1e6:,.1f} MB ({ratio:.2f}× as large) |\n"
    )


def _perplexity_table(card: dict[str, Any]) -> str:
    measured: dict[str, float | None] = card.get("perplexity") or {}
    rows = [
        f"| {stage.card_label} | {measured[stage.name]:,.3f} |"
        for stage in STAGES
        if measured.get(stage.name) is not None
    ]
    if not rows:
        return ""
    note = f"Perplexity on {card['evaluation']}.\n" if card.get("evaluation") else ""
    note += "".join(f"\n**{text[:1].upper()}{text[1:]}** ({CHECK}).\n" for text in card.get("doubts") or ())
    return "## Perplexity\n\n" + note + "\n| model | perplexity |\n|---|---|\n" + "\n".join(rows) + "\n"


def _divergence_table(card: dict[str, Any]) -> str:
    """How far what each version predicts is from what full precision does."""
    measured: dict[str, Further] = card.get("further") or {}
    rows = [
        f"| {stage.card_label} | {found.kl:.4f} | {100 * found.top1:.1f} | {found.logit_error:.3f} | "
        f"{found.largest_logit_error:.3f} |"
        for stage in STAGES
        if stage.name in measured and (found := measured[stage.name].divergence) is not None
    ]
    if not rows:
        return ""
    note = f"On the same tokens: {card['evaluation']}.\n\n" if card.get("evaluation") else ""
    head = "| model | KL, nats | same first token, % | logit error, mean | largest |\n|---|---|---|---|---|\n"
    return "## Divergence from full precision\n\n" + note + head + "\n".join(rows) + "\n"


def _texts_table(card: dict[str, Any]) -> str:
    """Perplexity on texts besides the run's own."""
    measured: dict[str, Further] = card.get("further") or {}
    stages = [stage for stage in STAGES if stage.name in measured and measured[stage.name].texts]
    if not stages:
        return ""
    names = list(dict.fromkeys(one.corpus for stage in stages for one in measured[stage.name].texts))
    rows = []
    for stage in stages:
        found = {one.corpus: one.perplexity for one in measured[stage.name].texts}
        words = (f"{value:,.3f}" if (value := found.get(name)) is not None else "–" for name in names)
        rows.append(f"| {stage.card_label} | {' | '.join(words)} |")
    head = f"| model | {' | '.join(n.replace('|', '/') for n in names)} |\n|---|{'---|' * len(names)}\n"
    return "## Perplexity on other texts\n\n" + head + "\n".join(rows) + "\n"


def _answer_table(card: dict[str, Any]) -> str:
    """Perplexity of the answers of held-out conversations."""
    measured: dict[str, float] = card.get("answer_perplexity") or {}
    rows = [f"| {s.card_label} | {measured[s.name]:,.3f} |" for s in STAGES if measured.get(s.name)]
    if not rows:
        return ""
    head = f"## Answer perplexity\n\nOf {card['answers']}.\n\n| model | answer perplexity |\n|---|---|\n"
    return head + "\n".join(rows) + "\n"


def _accuracy_table(card: dict[str, Any]) -> str:
    """Zero-shot tasks: percent of right answers."""
    measured: dict[str, dict[str, float]] = card.get("accuracy") or {}
    stages = [(stage.name, stage.card_label) for stage in STAGES if measured.get(stage.name)]
    if not stages:
        return ""
    tasks = list(measured[stages[0][0]])
    rows = [
        f"| {label} | " + " | ".join(f"{100 * measured[key].get(task, 0):.1f}" for task in tasks) + " |"
        for key, label in stages
    ]
    head = f"| model | {' | '.join(tasks)} |\n|---|{'---|' * len(tasks)}\n"
    return "## Zero-shot accuracy, %\n\n" + head + "\n".join(rows) + "\n"


def _score_table(card: dict[str, Any]) -> str:
    """What lm-eval made of the answers, with standard errors."""
    measured: dict[str, Further] = card.get("further") or {}
    stages = [stage for stage in STAGES if stage.name in measured and measured[stage.name].scores]
    if not stages:
        return ""
    found = {stage.name: {one.name: one for one in measured[stage.name].scores} for stage in stages}
    names = list(dict.fromkeys(name for one in found.values() for name in one))
    by = next((one.by for stage in stages for one in measured[stage.name].scores if one.by), "lm-eval")
    rows = []
    for name in names:
        words = (_score_words(found[stage.name].get(name)) for stage in stages)
        rows.append(f"| {name.replace('|', '/')} | {' | '.join(words)} |")
    labels = " | ".join(stage.card_label for stage in stages)
    head = f"| task | {labels} |\n|---|{'---|' * len(stages)}\n"
    return f"## Tasks, asked by {by}\n\n" + head + "\n".join(rows) + "\n"


def _score_words(one: TaskScore | None) -> str:
    if one is None or one.value is None:
        return "–"
    form = ".4f" if abs(one.value) < 1000 else ".4g"
    return f"{one.value:{form}}" + (f" ± {one.stderr:{form}}" if one.stderr else "")
