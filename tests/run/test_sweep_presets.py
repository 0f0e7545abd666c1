"""The sweeps that are shipped make the runs that their experiments need, and all of them can be planned."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.config.loading import load, load_sweep, preset_names, sweep_names
from engine.config.model import TINY_MODEL
from engine.config.overrides import apply_overrides
from engine.config.run import RunConfig
from engine.config.stages import STAGES
from engine.config.sweeps import Combination, axes_of, combinations, written_axes
from engine.errors import UsageError
from engine.plan.several import plan_several

TRAINED = ("block_ap", "e2e_qp", "e2e_qat", "lr_qat")


def runs_of(name: str) -> list[Combination]:
    base, table = load_sweep(name)
    base = apply_overrides(base, {"model.source": TINY_MODEL, "runtime.device": "cpu"})
    return combinations(base, axes_of(written_axes(table), (), ()))


def trained(config: RunConfig) -> tuple[str, ...]:
    """The stages that a run trains."""
    return tuple(stage for stage in TRAINED if getattr(config, stage).enabled)


@pytest.mark.parametrize("name", sweep_names())
def test_every_combination_can_be_planned(name: str, tmp_path: Path) -> None:
    base, _ = load_sweep(name)
    assert base.name == name
    assert base.description
    # Only one to try things out has a model of its own; what the others measure holds for the user's.
    assert base.model.source == (TINY_MODEL if name.startswith("smoke") else "")
    found = runs_of(name)
    plans = plan_several([one.config for one in found], tmp_path)
    assert [run.obstacles for run in plans.runs] == [()] * len(found)
    assert len({str(one.settings) for one in found}) == len(found) >= 3
    # One measure for all: else the table compares nothing.
    assert len({(one.config.evaluation, one.config.data) for one in found}) == 1


def test_a_sweep_is_no_preset_of_one_run_and_none_has_the_name_of_one() -> None:
    assert not set(sweep_names()) & set(preset_names())
    with pytest.raises(UsageError, match=r"e2e-qp-gain: asks for several runs.*eqat sweep e2e-qp-gain makes"):
        load("e2e-qp-gain")
    with pytest.raises(UsageError, match="did you mean e2e-qp-gain"):
        load("e2e-qp-gains")


def test_the_experiments_are_the_promised_ones() -> None:
    assert [(one.config.grid.bits, trained(one.config)) for one in runs_of("block-ap-vs-rtn")] == [
        (bits, ("block_ap",)) for bits in (2, 3, 4)
    ]
    assert STAGES["rtn"].baseline  # so that each of these runs measures it too
    parts = [(), ("block_ap",), ("e2e_qp",), ("block_ap", "e2e_qp")]
    assert [trained(one.config) for one in runs_of("e2e-qp-gain")] == parts * 2
    assert [trained(one.config) for one in runs_of("efficient-qat-vs-full-qat")] == [
        ("block_ap", "e2e_qp"),
        ("e2e_qat",),
    ] * 2
    counts = [one.config.e2e_qp.sequences for one in runs_of("e2e-qp-samples")]
    assert counts == [128, 512, 4096, 32764]  # EfficientQAT's
    assert [one.config.e2e_qp.train for one in runs_of("e2e-qp-trainables")] == [
        ("scales",),
        ("zero_points",),
        ("scales", "zero_points"),
    ]
    sets = [set(one.config.block_ap.train) for one in runs_of("block-ap-trainables")]
    both = {"scales", "zero_points"}
    assert sets == [
        *({"clipping"}, both, {"rounding"}, {"weights"}, {"rounding", *both}, {"weights", *both}),
        {"weights", *both, "norms"},
    ]
    assert [one.config.lr_qat.rank for one in runs_of("lr-qat-ranks")] == [1, 8, 32, 128]
    assert len({one.config.lr_qat.downcast for one in runs_of("lr-qat-downcasts")}) == 4


def test_methods_are_compared_as_their_own_presets_train() -> None:
    """On the same text, for as many steps, with what each preset of a method says."""
    of = {one.settings["case"]: one.config for one in runs_of("lr-qat-vs-others")}
    stages = {"peqa": "e2e_qp", "lr-qat": "lr_qat", "full-qat": "e2e_qat"}
    for name, stage in stages.items():
        preset = load(name, overrides={"grid.bits": 3, "model.source": TINY_MODEL})
        assert trained(of[name]) == (stage,)
        for part in ("grid", "data", "evaluation"):
            assert getattr(of[name], part) == getattr(preset, part), (name, part)
    steps = {
        name: (mine := getattr(of[name], stage)).sequences * mine.epochs // mine.batch_size
        for name, stage in stages.items()
    }
    assert len(set(steps.values())) == 1
    seen = [getattr(of[name], stage).sequence_length for name, stage in stages.items()]
    assert len(set(seen)) == 1
