"""A flipped bit below checkpoints/ is seen, and costs no more than what it struck and what depends on it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from bitflips import BAD, Flip, committed, copied, flip_all, standing, verdict
from engine_runs import exported, of, run_here

from engine.run import events, generations
from engine.run.directory import RunDirectory
from engine.run.generations import read_generation
from engine.run.redo import make_redo


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunDirectory]:
    return standing(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def whole(runs: dict[str, RunDirectory]) -> dict[str, str]:
    return exported(runs["done"])


def part(run: RunDirectory, name: str) -> Path:
    """The file of an entry of the newest generation, or of that generation, or CURRENT."""
    place = run.checkpoints_dir
    number = generations.newest(place)
    if name == "generation":
        return generations.generation_path(place, number)
    if name == "CURRENT":
        return place / name
    return generations.object_path(place, read_generation(place, number).entries[name])


def flip(path: Path, bit: int = 77) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def warned(run: RunDirectory) -> list[str]:
    return [e.message for e in of(run, events.Warning) if e.code == "checkpoint"]


def test_no_flipped_bit_is_accepted_and_none_costs_a_run(runs: dict[str, RunDirectory]) -> None:
    found = list(flip_all(runs, 400, seed=7))
    assert [flipped for flipped in found if flipped.verdict in BAD] == []
    counts = Counter(flipped.verdict for flipped in found)
    assert counts["the generation before"] > 5, counts
    assert counts["a part, the rest is trained again"] > 50, counts


def test_every_bit_of_the_pointer_is_noticed(runs: dict[str, RunDirectory]) -> None:
    run = runs["done"]
    before = committed(run.checkpoints_dir)
    path = run.checkpoints_dir / "CURRENT"
    for bit in range(8 * path.stat().st_size):
        with Flip(path, bit).done():
            assert verdict(run.checkpoints_dir, before) == "whole, and said that something is damaged"


@pytest.mark.parametrize(
    ("state", "name"),
    [
        ("done", "block-001"),
        ("done", "scales-002"),
        ("stopped inside block_ap", "block-000"),
        ("stopped inside block_ap", "training"),
        ("stopped inside block_ap", "generation"),
        ("stopped inside e2e_qp", "block-003"),
    ],
)
def test_a_run_that_goes_on_after_a_flip_exports_the_same_bytes(
    runs: dict[str, RunDirectory], whole: dict[str, str], state: str, name: str
) -> None:
    run = copied(runs[state])
    flip(part(run, name))
    heard = len(warned(run))
    assert run_here(run) == 0
    assert exported(run) == whole
    said = warned(run)[heard:]
    assert said
    assert "damaged" in said[0] or "CURRENT" in said[0]
    assert run_here(run) == 0
    assert len(warned(run)) == heard + len(said), "what was damaged is written anew"


@pytest.mark.parametrize("task", ["eval", "export", "generate"])
def test_what_trains_nothing_says_what_is_damaged_and_that_a_resume_mends_it(
    runs: dict[str, RunDirectory], whole: dict[str, str], task: str
) -> None:
    run = copied(runs["done"])
    flip(part(run, "block-002"))
    before = {path: path.read_bytes() for path in run.checkpoints_dir.rglob("*") if path.is_file()}
    assert run_here(run, "--task", task, *(["--prompt", "x"] if task == "generate" else [])) == 8
    error = of(run, events.Error)[-1]
    assert error.exit_code == 8
    assert "block-002" in error.message
    assert f"eqat resume {run.id}" in error.hint
    assert {path: path.read_bytes() for path in run.checkpoints_dir.rglob("*") if path.is_file()} == before
    assert exported(run) == whole, "the export that there is stays"


def test_an_export_is_the_whole_one_or_none(runs: dict[str, RunDirectory], whole: dict[str, str]) -> None:
    """The generation before lacks the last perplexity, which the model card tells."""
    run = copied(runs["done"])
    flip(part(run, "generation"))
    assert run_here(run, "--task", "export") == 8
    assert exported(run) == whole
    assert run_here(run, "--task", "eval") == 0
    assert run_here(run, "--task", "export") == 0
    assert exported(run) == whole
    cleaned = copied(runs["done and cleaned"])
    flip(part(cleaned, "generation"))
    assert run_here(cleaned, "--task", "export") == 0
    assert exported(cleaned) == whole


def test_a_part_done_again_shares_what_is_intact_and_says_up_to_where(
    runs: dict[str, RunDirectory], whole: dict[str, str]
) -> None:
    origin = copied(runs["done"])
    flip(part(origin, "block-002"))
    refused = make_redo(origin, 3, {})
    assert run_here(refused) == 3
    error = of(refused, events.Error)[-1]
    assert "0 to 1" in error.message
    assert "block-002" in error.message
    assert "--from-block 2" in error.hint
    made = make_redo(origin, 2, {})
    assert run_here(made) == 0
    assert exported(made)["model.safetensors"] == whole["model.safetensors"]
    assert not [e for e in of(made, events.BlockFinished) if e.restored != (e.block < 2)]


@pytest.mark.parametrize("from_block", [10**9, 5, -1])
def test_a_block_that_does_not_exist_is_refused_before_anything_is_made_of_its_number(
    runs: dict[str, RunDirectory], from_block: int
) -> None:
    made = make_redo(runs["done"], 1, {})
    origin = json.loads(made.origin_path.read_text())
    made.origin_path.write_text(json.dumps({**origin, "from_block": from_block}))
    assert run_here(made) in (2, 3)
    assert of(made, events.Error)


def test_an_object_that_is_a_link_is_not_shared(runs: dict[str, RunDirectory], tmp_path: Path) -> None:
    origin = copied(runs["done"])
    path = part(origin, "block-001")
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    made = make_redo(origin, 2, {})
    assert run_here(made) == 3
    assert "link" in of(made, events.Error)[-1].message
