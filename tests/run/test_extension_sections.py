"""A section that an extension registers is one like ours, and a run that does not use it never sees it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.checkpoints.identity import deciding_fields, default_fields
from engine.checkpoints.store import CheckpointStore
from engine.config import checks
from engine.config.derived import resolve
from engine.config.field_docs import field_help
from engine.config.fields import field_names, is_operational, value_of
from engine.config.grid import GridConfig
from engine.config.loading import from_toml, load, preset_names
from engine.config.run import RunConfig, register_section, run_config, unregister_section
from engine.config.sameness import config_hash, equivalent_command
from engine.config.stage_section import StageSection
from engine.config.stages import STAGES, Stage, stages_of
from engine.config.validation import validate
from engine.config.writing import to_dict, to_toml
from engine.errors import IdentityError, UsageError
from engine.run.directory import RunDirectory
from engine.run.proof import prove_run
from engine.run.redo import is_shared


class ToyConfig(StageSection, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A method that is somebody else's."""

    enabled: bool = False
    """The toy makes the blocks."""
    steps: int = 3
    """The toy takes this many ``steps``."""
    lr: float | None = None
    """The toy learns at this rate."""
    how: Literal["fast", "slow"] = "fast"
    """The toy goes this way."""
    log_every: int = 10
    """The toy tells of every so many steps."""
    NAMES: ClassVar[tuple[str, ...]] = ("enabled", "steps", "lr", "how", "log_every")

    def check(self, name: str) -> None:
        checks.count(f"{name}.steps", self.steps)

    def resolved(self, grid: GridConfig) -> Self:
        return msgspec.structs.replace(self, lr=1.0 / grid.bits if self.lr is None else self.lr)

    @classmethod
    def decides(cls, field: str) -> bool:
        return field != "log_every"


TOY = Stage(name="toy", label="Toy", scope="block")
PLAIN = load("smoke")
PLAIN_HASHES = {name: config_hash(load(name)) for name in preset_names()}


@pytest.fixture(autouse=True)
def _toy() -> Iterator[None]:
    register_section("toy", ToyConfig)
    STAGES.register(TOY)
    yield
    STAGES.unregister("toy")
    unregister_section("toy")


def toy(**changes: object) -> RunConfig:
    """The smoke preset with the toy in the place of Block-AP."""
    changes = {"enabled": True, **changes}
    given = {f"toy.{name}": value for name, value in changes.items()}
    return load("smoke", overrides={"block_ap.enabled": False, **given})


# -- where it is used ----------------------------------------------------------------------------------


def test_its_fields_come_after_ours_and_say_what_they_mean() -> None:
    before = [name for name in field_names() if not name.startswith("toy.")]
    assert field_names() == (*before, *(f"toy.{name}" for name in ToyConfig.NAMES))
    assert field_help()["toy.steps"] == "The toy takes this many steps."
    assert field_help()["grid.bits"]


@settings(max_examples=20, deadline=None)
@given(st.booleans(), st.integers(1, 9), st.none() | st.floats(0.1, 1), st.sampled_from(["fast", "slow"]))
def test_it_survives_toml(enabled: bool, steps: int, lr: float | None, how: str) -> None:
    config = toy(enabled=enabled, steps=steps, lr=lr, how=how)
    assert from_toml(to_toml(config)) == config
    assert from_toml(to_toml(resolve(config))) == resolve(config)


def test_it_is_set_as_ours_are_and_wrong_names_and_values_are_told() -> None:
    config = load("smoke", overrides={"toy.steps": "7", "toy.lr": "none", "toy.how": "slow"})
    assert (value_of(config, "toy.steps"), value_of(config, "toy.how")) == (7, "slow")
    for name, value, where, hint in (
        ("toy.stepz", "3", "toy.stepz", "did you mean toy.steps?"),
        ("toy", "3", "toy", "set one of toy.enabled, toy.steps, toy.lr, toy.how, toy.log_every"),
        ("toy.steps", "many", "toy.steps", "a whole number"),
        (
            "zzz",
            "3",
            "zzz",
            "fields are in model, grid, data, imported, block_ap, gptq, e2e_qp, e2e_qat, lr_qat, "
            "instructions, evaluation, export, runtime, toy",
        ),
    ):
        with pytest.raises(UsageError) as caught:
            load("smoke", overrides={name: value})
        assert (caught.value.where, caught.value.hint) == (where, hint)


def test_it_checks_its_own_values_and_derives_what_was_left_out() -> None:
    validate(toy())
    with pytest.raises(UsageError, match="cannot be 0") as caught:
        validate(toy(steps=0))
    assert caught.value.where == "toy.steps"
    assert value_of(resolve(toy()), "toy.lr") == 0.25
    assert value_of(resolve(toy(lr=3.0)), "toy.lr") == 3.0


def test_its_stage_makes_the_blocks_and_two_that_do_are_refused_by_both_names() -> None:
    assert [stage.name for stage in stages_of(toy())] == ["toy", "e2e_qp"]
    with pytest.raises(UsageError, match="Block-AP and Toy both make the blocks") as caught:
        validate(load("smoke", overrides={"toy.enabled": True}))
    assert caught.value.where == "toy.enabled"
    assert caught.value.hint == "block_ap.enabled = false, or toy.enabled = false"


def test_blocks_are_shared_only_between_runs_of_one_method() -> None:
    assert is_shared("toy.enabled")
    assert is_shared("block_ap.enabled")
    assert not is_shared("toy.steps")
    assert not is_shared("e2e_qp.enabled")


def test_it_decides_what_is_computed_as_far_as_it_says_so() -> None:
    config = resolve(toy())
    assert deciding_fields(config).keys() - deciding_fields(resolve(PLAIN)).keys() == {
        "toy.enabled",
        "toy.steps",
        "toy.lr",
        "toy.how",
    }
    assert [name for name in ToyConfig.NAMES if is_operational(f"toy.{name}")] == ["log_every"]
    assert default_fields(config)["toy.lr"] == "0.25"
    assert len({config_hash(toy()), config_hash(toy(steps=4)), config_hash(PLAIN)}) == 3


def test_the_command_names_what_differs_from_the_preset() -> None:
    command, asked = equivalent_command(toy(steps=4)).split(" --set ", 1)
    assert command == "eqat run smoke"
    assert asked.split(" --set ") == [
        "block_ap.enabled=false",
        "toy.enabled=true",
        "toy.steps=4",
        "toy.lr=0.25",
    ]


# -- where it is not used ------------------------------------------------------------------------------


def test_a_run_that_does_not_use_it_is_the_same_run() -> None:
    for name in preset_names():
        assert config_hash(load(name)) == PLAIN_HASHES[name], name
    config = load("smoke")
    assert to_toml(config) == to_toml(PLAIN)
    assert value_of(resolve(config), "toy.lr") is None
    assert deciding_fields(resolve(config)) == deciding_fields(resolve(PLAIN))
    assert "toy" in to_dict(config)


def test_a_checkpoint_goes_on_with_and_without_it_as_long_as_it_is_not_used(tmp_path: Path) -> None:
    def opened(config: RunConfig) -> CheckpointStore:
        return CheckpointStore(tmp_path, deciding_fields(config), defaults=default_fields(config))

    opened(resolve(PLAIN)).commit()
    assert opened(resolve(load("smoke"))).generation == 1
    with pytest.raises(IdentityError) as caught:
        opened(resolve(load("smoke", overrides={"toy.steps": 4})))
    assert caught.value.where == "toy.steps"
    opened(resolve(load("smoke"))).commit()
    unregister_section("toy")
    try:
        assert opened(resolve(load("smoke"))).generation == 2
    finally:
        register_section("toy", ToyConfig)


def test_a_checkpoint_that_was_made_with_it_is_refused_without_it(tmp_path: Path) -> None:
    made = resolve(toy())
    CheckpointStore(tmp_path, deciding_fields(made), defaults=default_fields(made)).commit()
    unregister_section("toy")
    try:
        plain = resolve(load("smoke", overrides={"block_ap.enabled": False}))
        with pytest.raises(IdentityError) as caught:
            CheckpointStore(tmp_path, deciding_fields(plain), defaults=default_fields(plain))
    finally:
        register_section("toy", ToyConfig)
    assert caught.value.where == "toy.enabled"


def test_a_file_that_uses_it_is_refused_without_it_and_told_where_extensions_come_from() -> None:
    text = to_toml(toy())
    unregister_section("toy")
    try:
        with pytest.raises(UsageError, match="toy: there is no such field") as caught:
            from_toml(text)
        assert "EQAT_EXTENSIONS" in caught.value.hint
        for wrong in ("toy = 3", "[grid]\ntoy = 3", "[grid.toy]\nbits = 3"):
            with pytest.raises(UsageError, match="toy: there is no such field") as caught:
                from_toml(wrong)
            assert "EQAT_EXTENSIONS" not in caught.value.hint
    finally:
        register_section("toy", ToyConfig)


def test_a_run_s_directory_is_proven_whether_or_not_it_uses_it(tmp_path: Path) -> None:
    for config in (toy(), load("smoke")):
        run = RunDirectory.create(tmp_path, resolve(config))
        assert run.config() == resolve(config)
        prove_run(run.path)


# -- registering ---------------------------------------------------------------------------------------


class Forward(ToyConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One that asks for itself."""

    enabled: bool = True


@pytest.mark.parametrize(
    ("name", "kind", "why"),
    [
        ("toy", ToyConfig, "already"),
        ("grid", ToyConfig, "already"),
        ("name", ToyConfig, "already"),
        ("Toy", ToyConfig, "no name"),
        ("", ToyConfig, "no name"),
        ("forward", Forward, "enabled by default"),
    ],
)
def test_what_cannot_be_a_section_is_refused(name: str, kind: type[Any], why: str) -> None:
    before = run_config()
    with pytest.raises(ValueError, match=why):
        register_section(name, kind)
    assert run_config() is before


def test_without_an_extension_the_configuration_is_ours() -> None:
    unregister_section("toy")
    try:
        assert run_config() is RunConfig
        digest = hashlib.sha256(to_toml(load("smoke")).encode()).hexdigest()
    finally:
        register_section("toy", ToyConfig)
    assert hashlib.sha256(to_toml(load("smoke")).encode()).hexdigest() == digest
