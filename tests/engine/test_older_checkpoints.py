"""A checkpoint from before a setting existed goes on where the setting has its default, and only there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from engine_runs import change, exported, failure, of, run_here
from torch import Tensor

from engine.architecture.description import TINY_LLAMA
from engine.checkpoints.identity import deciding_fields, default_fields
from engine.checkpoints.store import CheckpointStore
from engine.config.derived import resolve
from engine.config.loading import load
from engine.config.run import RunConfig, silent_sections
from engine.errors import IdentityError
from engine.evaluation.measurement import Measurement, read
from engine.methods.advance import Portions
from engine.run import events, generations
from engine.run.directory import RunDirectory
from engine.run.redo import make_redo

Make = Callable[..., RunDirectory]

MADE_BEFORE = {"block_ap.epochs": "2", "model": "a" * 64}
NOW = {"block_ap.epochs": "2", "grid.new": "1", "model": "a" * 64}


def made_with(directory: Path, identity: dict[str, str]) -> None:
    CheckpointStore(directory, identity).commit()


# -- the store -----------------------------------------------------------------------------------------


def test_a_field_that_a_checkpoint_lacks_counts_as_its_default(tmp_path: Path) -> None:
    made_with(tmp_path, MADE_BEFORE)
    store = CheckpointStore(tmp_path, NOW, defaults={"grid.new": "1", "block_ap.epochs": "2"})
    assert store.generation == 1
    store.commit()
    assert generations.read_generation(tmp_path, 2).identity == NOW, "the next commit says it"


def test_a_new_field_that_has_another_value_than_its_default_is_refused_with_both(tmp_path: Path) -> None:
    made_with(tmp_path, MADE_BEFORE)
    with pytest.raises(IdentityError, match="made with 0, this run has 1") as caught:
        CheckpointStore(tmp_path, NOW, defaults={"grid.new": "0"})
    assert caught.value.where == "grid.new"


@pytest.mark.parametrize("field", ["model", "grid.new"])
def test_a_field_without_a_default_is_never_assumed(tmp_path: Path, field: str) -> None:
    made_with(tmp_path, {name: value for name, value in NOW.items() if name != field})
    with pytest.raises(IdentityError) as caught:
        CheckpointStore(tmp_path, NOW, defaults={"block_ap.epochs": "2"})
    assert caught.value.where == field


def test_a_default_says_nothing_about_a_field_that_is_stored(tmp_path: Path) -> None:
    made_with(tmp_path, {**NOW, "grid.new": "0"})
    with pytest.raises(IdentityError) as caught:
        CheckpointStore(tmp_path, NOW, defaults={"grid.new": "1"})
    assert caught.value.where == "grid.new"


def test_a_stored_field_that_this_version_does_not_know_is_refused_by_its_name(tmp_path: Path) -> None:
    made_with(tmp_path, {**NOW, "toy.enabled": "false"})
    with pytest.raises(IdentityError, match="made with false, this run has none") as caught:
        CheckpointStore(tmp_path, NOW, defaults={"grid.new": "1"})
    assert caught.value.where == "toy.enabled"


# -- defaults ------------------------------------------------------------------------------------------


def test_every_deciding_field_of_the_configuration_has_a_default() -> None:
    def known(config: RunConfig) -> dict[str, str]:
        """Without those of a young section that is not used, and those that are silent: they are in no
        identity."""
        silent = {*silent_sections(config), "grid.head_bits", "evaluation.texts", "e2e_qp.text_weight"}
        silent |= {"evaluation.task_folder", "evaluation.task_chat", "runtime.gpus"}
        found = default_fields(config)
        return {
            name: value
            for name, value in found.items()
            if name not in silent and name.partition(".")[0] not in silent
        }

    config = resolve(load("smoke"))
    assert {"e2e_qat.enabled", "grid.head_bits"} <= default_fields(config).keys()
    assert default_fields(config)["e2e_qat.start"] == '"integers"'
    assert known(config).keys() == deciding_fields(config).keys()
    now, earlier = deciding_fields(resolve(type(config)())), known(resolve(type(config)()))
    # Sequences of versions without this field began as they do where it says so.
    assert earlier == {**now, "model.bos": '"text"'}


def test_a_default_that_follows_from_other_settings_follows_from_those_of_the_run() -> None:
    given = {"grid.bits": 2, "e2e_qp.lr_scaling": "absolute", "e2e_qp.lr": 0.5, "grid.symmetric": True}
    found = default_fields(resolve(load("smoke", overrides=given)))
    assert (found["e2e_qp.lr"], found["block_ap.lr_weight"]) == ("2e-05", "0.02")
    assert found["block_ap.train"] == '["weights", "scales", "norms"]'


# -- a run ---------------------------------------------------------------------------------------------

NOT_THERE_YET = (
    "block_ap.patience",
    "block_ap.start",
    "block_ap.drop_largest",
    "block_ap.lr_quant",
    "e2e_qp.weight_decay",
    "evaluation.tasks",
    "evaluation.task_limit",
    "grid.zero_point",
)


def as_before(
    run: RunDirectory,
    missing: tuple[str, ...],
    *,
    blocks: int = 4,
    facts: tuple[str, ...] = ("eval_fp", "eval_rtn"),
) -> None:
    """Make the run's checkpoint one of a version that lacked some settings, with so many blocks finished and
    these facts."""
    place = run.checkpoints_dir
    found = generations.read_generation(place, generations.newest(place))
    older = replace(
        found,
        number=found.number + 1,
        identity={name: value for name, value in found.identity.items() if name not in missing},
    )
    assert len(older.identity) == len(found.identity) - len(missing)
    if blocks < 4:
        kept = {f"block-{index:03d}" for index in range(blocks)}
        older.entries = {name: value for name, value in found.entries.items() if name in kept}
        older.facts = {name: value for name, value in found.facts.items() if name in facts}
    for path in place.glob("generation-*"):
        path.unlink()
    generations.publish(place, older)


def trained(run: RunDirectory, attempt: int) -> list[int]:
    """The blocks that an attempt trained itself."""
    finished = of(run, events.BlockFinished, attempt)
    return [e.block for e in finished if e.phase == "block_ap" and not e.restored]


def test_a_run_from_before_some_settings_goes_on_to_the_same_export(finished_copy: Make) -> None:
    run = finished_copy()
    whole, attempts = exported(run), of(run, events.RunStarted)[-1].attempt
    as_before(run, NOT_THERE_YET, blocks=2)
    assert run_here(run) == 0
    assert trained(run, attempts + 1) == [2, 3]
    assert exported(run) == whole
    place = run.checkpoints_dir
    assert {*NOT_THERE_YET} <= generations.read_generation(place, generations.newest(place)).identity.keys()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("block_ap.patience", 1),
        ("block_ap.lr_quant", 0.25),
        ("block_ap.start", "search"),
        ("grid.zero_point", "fixed"),
    ],
)
def test_a_run_from_before_a_setting_is_refused_where_it_is_set(
    finished_copy: Make, field: str, value: object
) -> None:
    run = finished_copy()
    as_before(run, (field,))
    change(run, **{field: value})
    assert run_here(run) == 8
    assert failure(run, 8).where == field


def test_blocks_from_before_a_setting_of_the_grid_can_be_shared(finished_copy: Make) -> None:
    run = finished_copy()
    as_before(run, ("grid.search_norm", "model.revision"))
    made = make_redo(run, 3, {"block_ap.epochs": 2})
    assert run_here(made) == 0
    assert trained(made, 1) == [3]


# -- how much passes at a time ------------------------------------------------------------------------

TOGETHER = 5
MUCH = TOGETHER * 16 * TINY_LLAMA["hidden_size"] + 1
"""Numbers of hidden states, as a plan for a GPU says it: that many sequences of 16 tokens pass together."""


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sequences that pass through a block together, as often as any do; the plan is a GPU's."""
    found: list[int] = []

    class Watched(Portions):
        def at(self, block: int, row: int) -> int:
            found.append(super().at(block, row))
            return found[-1]

    monkeypatch.setattr("engine.phases.passage.Portions", Watched)
    monkeypatch.setattr("engine.plan.plan.numbers_together", lambda work: MUCH)
    return found


def remembered(run: RunDirectory) -> object:
    place = run.checkpoints_dir
    return generations.read_generation(place, generations.newest(place)).facts.get("numbers_together")


def test_streams_of_a_new_run_pass_in_portions_that_it_remembers(
    make: Make, passed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make()
    assert run_here(run) == 0
    assert set(passed) == {TOGETHER}
    assert remembered(run) == MUCH
    whole = exported(run)
    as_before(run, (), blocks=2, facts=("eval_fp", "eval_rtn", "numbers_together"))
    monkeypatch.setattr("engine.plan.plan.numbers_together", lambda work: 0)
    passed.clear()
    assert run_here(run) == 0
    assert set(passed) == {TOGETHER}
    assert exported(run) == whole


def test_windows_that_are_measured_pass_in_portions_too(
    make: Make, passed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[tuple[int, int]] = []

    def watched(*args: object, batch_size: int, **options: object) -> Measurement:
        windows = args[2]
        assert isinstance(windows, Tensor)
        found.append((batch_size, len(windows)))
        return read(*args, batch_size=batch_size, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("engine.phases.evaluation.read", watched)
    run = make(**{"evaluation.windows": 8, "evaluation.sequence_length": 16})
    assert run_here(run) == 0
    assert {batch for batch, _ in found} == {TOGETHER}
    assert all(windows == 8 for _, windows in found)
    found.clear()
    few = make(**{"evaluation.windows": 3, "evaluation.sequence_length": 16})
    assert run_here(few) == 0
    assert {batch for batch, _ in found} == {3}


def test_streams_of_a_run_from_before_that_pass_in_its_batches(
    finished_copy: Make, passed: list[int]
) -> None:
    run = finished_copy()
    whole = exported(run)
    as_before(run, (), blocks=2)
    assert run_here(run) == 0
    assert set(passed) == {run.config().block_ap.batch_size}
    assert exported(run) == whole
    assert remembered(run) is None
