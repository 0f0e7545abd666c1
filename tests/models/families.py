"""What becomes of every variant of ``variants.py``: the table of families, and how it is found.

    make families            write docs/families.md

Each variant is saved as a tiny random model. The plan is asked what it thinks of its configuration, and of
its files; the engine opens it; one that is accepted computes the logits that transformers computes, and
(only when the page is written, for it takes a second each) goes through a whole run, whose export is
verified. So "works" on the page means what it says.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
from pathlib import Path

import tiny
import torch
import variants
from engine_runs import SMALL, make_run, of, run_here
from transformers import AutoModelForCausalLM

from engine.architecture.description import describe
from engine.architecture.families import Architecture
from engine.architecture.refusals import refuse
from engine.config.grid import GridConfig
from engine.config.model import ModelConfig
from engine.errors import PreflightError
from engine.models.causal_lm import CausalLM
from engine.models.source import ModelSource
from engine.run.directory import RunDirectory
from engine.run.events import Error

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
GRID = GridConfig(bits=4, group_size=32)
TITLE = """# Families

What becomes of the families of models, found by making a tiny random model of each and trying it
(`make families`; transformers {version}). "Works" means: full precision computes the logits that
transformers computes, and a run ends with a verified export. What is refused is refused by `eqat plan`,
before a weight is read, and by a run in the same words. A text that is longer than a model's table of
positions is refused as well; where the page shows no table, positions are computed for any length.

Families that are not listed are tried like the others: their layers are read from the files.

| Family | Variant | Table of positions | |
| --- | --- | --- | --- |
"""


def asked(folder: Path) -> Architecture | PreflightError:
    """What the plan says of a folder."""
    try:
        described = describe(str(folder))
        refuse(described.architecture, described.config, GRID, ["gptq_v2"])
    except PreflightError as error:
        return error
    return described.architecture


def opened(folder: Path) -> CausalLM | PreflightError:
    """What the engine says of it."""
    try:
        return CausalLM(ModelSource.open(ModelConfig(source=str(folder))), torch.device("cpu"), torch.float32)
    except PreflightError as error:
        return error


def without_weights(folder: Path) -> Path:
    """The same model as far as its configuration tells it: what is known of one on the hub."""
    bare = folder.parent / f"{folder.name}-configuration"
    bare.mkdir()
    shutil.copy(folder / "config.json", bare)
    return bare


def logits(lm: CausalLM, ids_BT: torch.Tensor) -> torch.Tensor:
    """Of the model in full precision, block by block."""
    with torch.no_grad():
        hidden = lm.embed(ids_BT)
        for index in range(lm.blocks):
            hidden = lm.run_block(lm.load_block(index), index, hidden)
        return lm.head(hidden)


def difference(lm: CausalLM, folder: Path) -> float:
    """Of logits, against transformers' own, as a part of the largest.

    With a soft cap theirs computes attention in the plain form: some versions leave it out of the fast one.
    """
    ids = tiny.tokens()
    capped = getattr(lm.source.config, "attn_logit_softcapping", None)
    form = {"attn_implementation": "eager"} if capped else {}
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(folder, **form).eval()(ids).logits
    return float((logits(lm, ids) - theirs).abs().max() / theirs.abs().max())


def reads(lm: CausalLM, length: int) -> bool:
    """Whether a text of so many tokens passes through the model."""
    try:
        return bool(logits(lm, tiny.tokens(batch=1, length=length)).isfinite().all())
    except (IndexError, RuntimeError, ValueError):
        return False


# -- the page --------------------------------------------------------------------------------------------


def row(name: str, found: Architecture | PreflightError) -> str:
    """A variant's line of the table."""
    family = variants.VARIANTS[name].get("model_type", name)
    variant = "" if name == family else _plain(name, family)
    table = "" if isinstance(found, PreflightError) or not found.position_table else "yes"
    said = f"refused: {found.message}" if isinstance(found, PreflightError) else "works"
    return f"| {family} | {variant} | {table} | {said} |"


def _plain(name: str, family: str) -> str:
    """What is left of a variant's name without its family's."""
    return re.sub(r"_+", " ", name.removeprefix(family) if name.startswith(family) else name).strip()


def written_rows() -> dict[str, str]:
    """Lines of the page as it is, by family and variant."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")][2:]
    return {"|".join(line.split("|")[1:3]): line for line in lines}


def small_run(folder: Path, **changes: object) -> RunDirectory:
    """A run of it that takes a second."""
    options = {**SMALL, "grid.bits": GRID.bits, "grid.group_size": GRID.group_size}
    return make_run(folder.parent / "runs", {**options, "model.source": str(folder), **changes})


def goes_through(folder: Path) -> str:
    """A whole run of it; empty when it ends with a verified export, else what its one error says."""
    run = small_run(folder)
    if run_here(run) == 0:
        return ""
    return "; ".join(error.message for error in of(run, Error))


def main() -> int:
    import transformers

    rows, wrong = [], []
    for name in variants.VARIANTS:
        with tempfile.TemporaryDirectory() as place:
            try:
                folder = variants.build(Path(place) / "model", name)
            except variants.Unknown:
                print(f"{name}: this transformers has no such family", file=sys.stderr)
                continue
            found = asked(folder)
            problem = "" if isinstance(found, PreflightError) else goes_through(folder)
        print(name, problem or "as planned", file=sys.stderr, flush=True)
        rows.append(row(name, found))
        if problem:
            wrong.append(f"{name}: {problem}")
    if not wrong:
        PAGE.write_text(TITLE.format(version=transformers.__version__) + "\n".join(sorted(rows)) + "\n")
    print(json.dumps(wrong, indent=1), file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
