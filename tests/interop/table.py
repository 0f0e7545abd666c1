"""The table of what was loaded: docs/formats.md, written from a whole run of these tests, never by hand.

README.md has a row of each format and loader, between two marks; those follow from the page.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from engine.config.formats import FORMATS

ROOT = Path(__file__).parents[2]
PAGE, README = ROOT / "docs" / "formats.md", ROOT / "README.md"
MARKS = ("<!-- formats: make interop -->\n\n", "\n<!-- end -->")
"""Around the table in README.md."""

HEAD = """# What was loaded

Written by `make interop` from what it tried; not by hand. Each row is one grid of one format in the loader it
is meant for, on a CPU, over tiny random models: {models}.

The weights are those that the loader hands out or unpacks, compared with the trained ones; a dash where it
computes from packed ones. The first prediction is counted where the trained model's two best tokens are
further apart than arithmetic of 16 bits can tell (of GGUF files, because llama.cpp rounds activations to 8
bits, in the quarter of the tokens where they are furthest apart), and the difference of logits is the
largest, in their standard deviations; both are the worst of the models.

| format | bits | group | grid | loader | weights | first prediction | logits differ by |
|---|---|---|---|---|---|---|---|
"""


REAL = """## Of a real model

Written by `make interop` too: SmolLM2-135M-Instruct, quantized by runs that trained it for a moment (4 bits
in a shape that groups of 128 divide), over so many tokens of the built-in corpus. Counted are those after
which the loader predicts the same as the trained blocks do, computed with in float32; none is left out.
Perplexity is a multiple of theirs. Packed files are computed with in float32, those of GGUF with
activations of 8 bits, as llama.cpp does: these are held to perplexity within 1 %, all else to 99 % too.

| format | bits | group | loader | tokens | first prediction | perplexity |
|---|---|---|---|---|---|---|
"""


SERVED = """## In vLLM

Written by the same tests where `tests/interop/install_vllm.sh` has put vLLM's CPU build beside them:
SmolLM2-135M-Instruct again, at 4 bits, over {tokens} tokens, in float16. It is compared with transformers,
which computes in float32 with the unpacked `compressed-tensors` export of the same run: tokens after which
both predict the same, perplexity as a multiple, the mean difference of log-probabilities, and of 16 tokens
that each writes after 32 how many are the same. vLLM's kernel wants AVX-512; where the last column says
torch, there was none, and torch multiplied with the words that vLLM had read and arranged for it: all of vLLM
but its kernel was tried. 2 and 3 bits have no kernel on a CPU.

| format | bits | group | loader | first prediction | perplexity | log-probability | written | kernel |
|---|---|---|---|---|---|---|---|---|
"""


BY_TORCH = "torch"
"""What the page says where vLLM's kernel could not run."""


class Served(NamedTuple):
    """What vLLM predicts with an export of a real model, beside transformers."""

    format: str
    bits: int
    group_size: int
    loader: str
    kernel: bool
    agree: float
    ratio: float
    apart: float
    written: float


class Compared(NamedTuple):
    """What a loader predicts with an export of a real model."""

    format: str
    """Behind its name what else tells its files apart, as the types of GGUF."""
    bits: int
    group_size: int
    loader: str
    tokens: int
    agree: float
    ratio: float
    """Its perplexity as a multiple of the trained model's."""


class Tried(NamedTuple):
    """One export in its loader."""

    format: str
    """Behind its name what else tells its files apart, as the types of GGUF."""
    model: str
    bits: int
    group_size: int
    symmetric: bool
    loader: str
    weights_equal: bool
    """False where the loader has no weights to show; that they are others fails its test."""
    agree: float
    worst: float

    @property
    def row(self) -> tuple[str, int, int, bool]:
        return self.format, self.bits, self.group_size, self.symmetric


def keep(part: str) -> None:
    """Write one part of the page, which begins with its title, and leave the others as their last whole runs
    did; then what README.md has of the page."""
    parts = {_title(each): each for each in _parts(PAGE.read_text())}
    parts[_title(part)] = part.rstrip("\n") + "\n"
    order = [_title(text) for text in (HEAD, REAL, SERVED)]
    PAGE.write_text("\n".join(parts[title] for title in order if title in parts))
    README.write_text(with_summary(README.read_text(), PAGE.read_text()))


def _parts(page: str) -> list[str]:
    """Each with its title, the page's own or one of the second order."""
    return [each.rstrip("\n") + "\n" for each in re.split(r"(?m)^(?=## )", page)]


def _title(part: str) -> str:
    return part.partition("\n")[0]


def real_part(compared: Iterable[Compared]) -> str:
    """The part of the page that is of a real model."""
    names = FORMATS.names()
    rows = sorted(compared, key=lambda each: (names.index(each.format.split()[0]), each.bits))
    return REAL + "".join(
        f"| {_name(each.format)} | {each.bits} | {each.group_size} | {each.loader} | {each.tokens} "
        f"| {100 * each.agree:.2f} % | {each.ratio:.5f} |\n"
        for each in rows
    )


def served_part(served: Iterable[Served], tokens: int) -> str:
    """The part of the page that is of vLLM."""
    return SERVED.format(tokens=tokens) + "".join(
        f"| {_name(each.format)} | {each.bits} | {each.group_size} | {each.loader} "
        f"| {100 * each.agree:.2f} % | {each.ratio:.5f} | {each.apart:.4f} | {100 * each.written:.0f} % "
        f"| {'its own' if each.kernel else BY_TORCH} |\n"
        for each in served
    )


def page(tried: Iterable[Tried]) -> str:
    """The part of the page that is of tiny models: these trials, in the order of the table of formats."""
    rows: dict[tuple[str, int, int, bool], list[Tried]] = {}
    names = FORMATS.names()
    for each in sorted(tried, key=lambda each: names.index(each.format.split()[0])):
        rows.setdefault(each.row, []).append(each)
    models = dict.fromkeys(each.model for row in rows.values() for each in row)
    return HEAD.format(models=", ".join(models)) + "\n".join(map(_line, rows.values())) + "\n"


def _name(format: str) -> str:
    """A format's cell: its name as it is typed, then what else tells its files apart."""
    return re.sub(r"^\S+", r"`\g<0>`", format)


def _line(row: list[Tried]) -> str:
    first = row[0]
    cells = [
        _name(first.format),
        str(first.bits),
        "row" if first.group_size == -1 else str(first.group_size),
        "symmetric" if first.symmetric else "asymmetric",
        first.loader,
        "equal" if first.weights_equal else "–",
        f"{100 * min(each.agree for each in row):.1f} %",
        f"{max(each.worst for each in row):.2g}",
    ]
    return f"| {' | '.join(cells)} |"


# -- what README.md has of the page --------------------------------------------------------------------


def with_summary(readme: str, page: str) -> str:
    """README.md with a row of each format and loader of the page."""
    before, mark, rest = readme.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not mark or not end:
        raise ValueError("README.md has no place for the table of formats")
    return before + mark + summary(page) + end + after


def summary(page: str) -> str:
    """Of each format and loader which bits and groups were loaded; the worst of what was predicted, and the
    perplexity of a real model that is furthest from the trained one's."""
    loaded: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in _rows(page):
        by_torch = ", torch in the place of its kernel" if row.get("kernel") == BY_TORCH else ""
        loaded.setdefault((row["format"], row["loader"] + by_torch), []).append(row)
    names = FORMATS.names()
    lines = [
        "| format | bits (groups) | loader | first prediction | perplexity |",
        "|---|---|---|---|---|",
    ]
    for (name, loader), rows in sorted(loaded.items(), key=lambda one: names.index(one[0][0].split("`")[1])):
        agree = min(float(row["first prediction"].removesuffix(" %")) for row in rows)
        ratios = [float(row["perplexity"]) for row in rows if "perplexity" in row]
        ratio = f"× {max(ratios, key=lambda each: abs(each - 1)):.4f}" if ratios else "–"
        lines.append(f"| {name} | {_grids(rows)} | {loader} | {agree:.1f} % | {ratio} |")
    return "\n".join(lines) + "\n"


def _grids(rows: Iterable[dict[str, str]]) -> str:
    """``2 (64, 128), 3 (64, row)``."""
    groups: dict[int, set[str]] = {}
    for row in rows:
        groups.setdefault(int(row["bits"]), set()).add(row["group"])
    return ", ".join(
        f"{bits} ({', '.join(sorted(held, key=lambda group: (group == 'row', group.zfill(4))))})"
        for bits, held in sorted(groups.items())
    )


def _rows(page: str) -> Iterator[dict[str, str]]:
    """Every row of every table of the page, by the heads of its columns."""
    heads: list[str] = []
    for line in page.splitlines():
        if not line.startswith("|"):
            heads = []
        elif not heads:
            heads = [cell.strip() for cell in line.strip("|").split("|")]
        elif not line.startswith("|--"):
            yield dict(zip(heads, (cell.strip() for cell in line.strip("|").split("|")), strict=True))
