"""A method of each kind and a format that only these tests know, through the same tables as ours: planned,
run, killed and resumed to the same bytes, shown, exported and verified. Nothing in the product knows them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import toys
from engine_runs import exported, of, output, run_here, start

from engine.config.loading import load
from engine.config.overrides import apply_overrides
from engine.config.stages import phase_label, phases_of
from engine.config.validation import validate
from engine.errors import ExitCode, UsageError
from engine.plan.plan import make_plan
from engine.run import events
from engine.run.directory import RunDirectory
from engine.run.usable import newest_usable

Make = Callable[..., RunDirectory]
ROOT = Path(__file__).parents[2]
TOYS: dict[str, object] = {
    "grid.bits": 3,
    "grid.group_size": 32,
    "block_ap.enabled": False,
    "e2e_qp.enabled": False,
    "toy_block.enabled": True,
    "toy_network.enabled": True,
    "export.formats": ["gptq_v2", "toy"],
    "runtime.checkpoint_minutes": 1e-4,
    "runtime.checkpoint_share": 1.0,
}
AFTER_OURS = {**TOYS, "block_ap.enabled": True, "e2e_qp.enabled": True, "toy_block.enabled": False}
"""The toy network goes on from what E2E-QP left."""
PHASES = [
    *("prepare", "evaluate_fp", "toy_block", "evaluate_rtn", "evaluate_toy_block"),
    *("toy_network", "evaluate_toy_network", "export"),
]


@pytest.fixture(autouse=True)
def _extension(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In this process by hand, in those that it starts by name."""
    monkeypatch.setenv("EQAT_EXTENSIONS", "toy_extension")
    paths = (str(ROOT), str(ROOT / "tests" / "engine"), os.environ.get("PYTHONPATH"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    with toys.registered():
        yield


def eqat(*arguments: str, code: int = 0, **environment: str) -> str:
    """The command line in a process of its own; what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "eqat_tui", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def whole(make: Make, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    """A run with both toys that nobody interfered with."""
    run = make(**TOYS)
    monkeypatch.delenv("EQAT_EXTENSIONS")  # in this process they are registered already
    assert run_here(run) == 0, output(run)
    monkeypatch.setenv("EQAT_EXTENSIONS", "toy_extension")
    return run


def both(run: RunDirectory) -> dict[str, dict[str, str]]:
    return {name: exported(run, name) for name in ("gptq_v2", "toy")}


def test_it_is_planned_by_its_own_costs_or_by_what_can_be_assumed() -> None:
    config = load("smoke", overrides=TOYS)
    assert phases_of(config) == PHASES
    plan = make_plan(config, device="cpu")
    seconds = {phase.name: phase.seconds for phase in plan.phases}
    assert list(seconds) == PHASES
    assert seconds["toy_network"] >= 7.0
    assert seconds["toy_block"] > 0
    assert plan.seconds == pytest.approx(sum(seconds.values()))
    one = make_plan(apply_overrides(config, {"export.formats": ["toy"]}), device="cpu")
    other = make_plan(apply_overrides(config, {"export.formats": ["gptq_v2"]}), device="cpu")
    assert plan.export_bytes == one.export_bytes + other.export_bytes


def test_it_runs_and_everything_tells_of_it(whole: RunDirectory) -> None:
    assert [event.phase for event in of(whole, events.PhaseStarted)] == PHASES
    assert {event.phase for event in of(whole, events.Metric)} == {"toy_block", "toy_network"}
    evaluated = {event.stage: event.perplexity for event in of(whole, events.Eval)}
    assert list(evaluated) == ["fp", "rtn", "toy_block", "toy_network"]
    assert len({value for value in evaluated.values() if value}) == 4
    assert [(e.format, e.verified) for e in of(whole, events.Export)] == [("gptq_v2", True), ("toy", True)]
    card = (whole.export_dir / "toy" / "README.md").read_text()
    assert f"| Toy network | {evaluated['toy_network']:,.3f} |" in card
    shown = json.loads(eqat("show", str(whole.path), "--json"))
    assert shown["perplexity"]["toy_network"] == pytest.approx(evaluated["toy_network"])
    assert [row["name"] for row in shown["phases"]] == PHASES
    assert len(shown["blocks"]) == 4
    assert "Toy blocks" in eqat("show", str(whole.path))


@pytest.mark.parametrize("overrides", [TOYS, AFTER_OURS], ids=["alone", "after ours"])
def test_killed_anywhere_and_resumed_it_exports_the_same_bytes(
    make: Make, overrides: dict[str, object], tmp_path: Path
) -> None:
    run = make(**overrides)
    assert start(run).code() == 0, output(run)
    expected, kills = both(run), 0
    again = make(**overrides)
    for point in (3, 9, 17, 31, 47):
        child = start(again, die_at=point)
        if child.code() == 0:
            break
        kills += 1
    else:
        assert start(again).code() == 0, output(again)
    assert kills >= 2
    assert both(again) == expected
    assert len(of(again, events.RunStarted)) == kills + 1


def test_stopped_inside_a_toys_training_it_goes_on_with_the_next_step(
    make: Make, whole: RunDirectory
) -> None:
    run = make(**TOYS)
    child = start(run)
    child.until(lambda: any(e.phase == "toy_network" for e in of(run, events.Metric)))
    os.kill(child.pid, 15)
    code = child.code()
    assert code in (0, ExitCode.STOPPED)
    if code:
        usable = newest_usable(run.checkpoints_dir)
        assert usable is not None
        assert start(run).code() == 0, output(run)
    assert both(run) == both(whole)


def test_damage_costs_what_depends_on_it_and_the_bytes_are_the_same(make: Make) -> None:
    run = make(**AFTER_OURS)
    assert start(run).code() == 0, output(run)
    expected = both(run)
    found = newest_usable(run.checkpoints_dir)
    assert found is not None
    digest = found.generation.entries["scales-001"]
    file = run.checkpoints_dir / "objects" / f"{digest}.safetensors"
    file.chmod(0o644)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    kept = newest_usable(run.checkpoints_dir)
    assert kept is not None
    names = kept.generation.entries
    assert {name.rpartition("-")[0] for name in names} == {"block"}
    assert not {"e2e_qp_done", "toy_network_done"} & set(kept.generation.facts)
    assert start(run).code() == 0, output(run)
    assert both(run) == expected


def test_without_the_extension_a_run_is_still_told_of(whole: RunDirectory) -> None:
    shown = json.loads(eqat("show", str(whole.path), "--json", EQAT_EXTENSIONS=""))
    assert shown["config"] is None
    assert shown["perplexity"]["toy_network"] > 1
    assert "toy_network" in eqat("show", str(whole.path), EQAT_EXTENSIONS="")
    assert whole.id in eqat("runs", "--runs-dir", str(whole.path.parent), "--json", EQAT_EXTENSIONS="")
    refused = eqat("eval", str(whole.path), code=2, EQAT_EXTENSIONS="")
    assert "toy_block" in refused
    assert "EQAT_EXTENSIONS" in refused
    assert "Traceback" not in refused


def test_an_extension_that_cannot_be_imported_is_one_line(make: Make) -> None:
    said = eqat("presets", code=2, EQAT_EXTENSIONS="no_such_module")
    assert said.startswith("error: EQAT_EXTENSIONS=no_such_module: ")
    assert "Traceback" not in said
    run = make()
    environment = {**os.environ, "EQAT_EXTENSIONS": "no_such_module"}
    done = subprocess.run([sys.executable, "-m", "engine", str(run.path)], env=environment, check=False)
    assert done.returncode == 2
    assert of(run, events.Error)[-1].where == "EQAT_EXTENSIONS=no_such_module"


def test_only_one_method_makes_the_blocks() -> None:
    config = apply_overrides(load("smoke"), {"toy_block.enabled": True})
    with pytest.raises(UsageError, match="Block-AP and Toy blocks both make the blocks"):
        validate(config)


def test_an_extension_that_is_not_asked_for_changes_no_run(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_it = make()
    assert start(with_it).code() == 0, output(with_it)
    monkeypatch.delenv("EQAT_EXTENSIONS")
    without = make()
    assert start(without).code() == 0, output(without)
    assert exported(with_it) == exported(without)
    assert "toy" not in with_it.config_toml.read_text()
    generations = [newest_usable(run.checkpoints_dir) for run in (with_it, without)]
    identities = [found.generation.identity for found in generations if found is not None]
    assert identities[0] == identities[1]


def test_its_labels_are_those_of_its_rows() -> None:
    assert phase_label("toy_block") == "Toy blocks"
    assert phase_label("evaluate_toy_network") == "evaluate Toy network"
