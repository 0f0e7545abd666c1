"""Doing a part of a run again: what may be asked for, and what the new run knows of the old one."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.config.derived import resolve
from engine.config.fields import field_names, value_of
from engine.config.loading import load
from engine.config.overrides import apply_overrides
from engine.errors import PreflightError, UsageError
from engine.run import directory, events, redo
from engine.run.directory import RunDirectory
from engine.run.event_log import EventWriter
from engine.run.finding import list_runs
from engine.run.redo import Origin, make_redo, read_origin

CONFIG = resolve(load("smoke"))


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run whose blocks 0 to 2 are finished and whose last has begun."""
    made = RunDirectory.create(tmp_path / "runs", CONFIG)
    with EventWriter(made.events_path, 1) as writer:
        writer.emit(events.PhaseStarted(phase="block_ap", index=0, phases=1))
        for block in range(4):
            writer.emit(events.BlockStarted(phase="block_ap", block=block, blocks=4))
            if block < 3:
                writer.emit(events.BlockFinished(phase="block_ap", block=block, seconds=1.0))
    return made


def test_the_new_run_lies_beside_the_old_one_with_its_settings_and_its_origin(run: RunDirectory) -> None:
    made = make_redo(run, 2, {"block_ap.epochs": "7", "e2e_qp.enabled": "false"})
    assert made.path.parent == run.path.parent
    expected = {"block_ap.epochs": 7, "e2e_qp.enabled": False}
    assert made.config() == apply_overrides(CONFIG, expected)
    assert read_origin(made) == Origin(path=str(run.path), id=run.id, from_block=2)
    assert read_origin(run) is None
    made.origin_path.write_text("{")
    with pytest.raises(PreflightError, match=r"origin\.json"):
        read_origin(made)


def test_there_is_never_a_run_that_has_lost_its_origin(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would train every block with the new settings. A kill before config.toml leaves no run at all."""

    def killed(path: Path, data: bytes) -> None:
        assert path.with_name("origin.json").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(directory, "atomic_write", killed)
    with pytest.raises(KeyboardInterrupt):
        make_redo(run, 2, {})
    assert [found.id for found in list_runs(run.path.parent)] == [run.id]


@pytest.mark.parametrize("from_block", [-1, 4, 5])
def test_only_finished_blocks_can_be_shared(run: RunDirectory, from_block: int) -> None:
    with pytest.raises(UsageError, match="blocks 0 to 2 are finished") as refusal:
        make_redo(run, from_block, {})
    assert (refusal.value.where, refusal.value.hint) == ("--from-block", "0 to 3")
    assert make_redo(run, 3, {}).config() == CONFIG


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.source", "random://tiny-qwen2"),
        ("model.revision", "main"),
        ("grid.bits", "3"),
        ("grid.group_size", "64"),
        ("grid.symmetric", "true"),
        ("grid.zero_point", "fixed"),
        ("grid.range", "minmax"),
        ("grid.search_norm", "2"),
    ],
)
def test_what_the_shared_blocks_depend_on_stays_unless_none_is_shared(
    run: RunDirectory, name: str, value: str
) -> None:
    with pytest.raises(UsageError) as refusal:
        make_redo(run, 1, {name: value})
    assert refusal.value.where == name
    assert "eqat run smoke" in refusal.value.hint
    assert len(list_runs(run.path.parent)) == 1
    assert value_of(redo.redo_config(run, 0, {name: value}), name) != value_of(CONFIG, name)


def test_the_refused_fields_are_exactly_those_of_model_and_grid_and_the_method(run: RunDirectory) -> None:
    refused = {name for name in field_names() if redo.is_shared(name)}
    expected = {name for name in field_names() if name.startswith(("model.", "grid."))}
    assert refused == expected | {"block_ap.enabled", "gptq.enabled", "imported.enabled"}


def test_a_setting_that_does_not_exist_or_makes_no_sense_costs_no_run(run: RunDirectory) -> None:
    for wrong in ({"block_ap.epocs": "3"}, {"block_ap.epochs": "many"}, {"block_ap.epochs": "-1"}):
        with pytest.raises(UsageError, match="block_ap"):
            make_redo(run, 1, wrong)
    assert len(list_runs(run.path.parent)) == 1
