"""What sbatch is given, from what was typed."""

from __future__ import annotations

import pytest

from engine.config.loading import load
from engine.errors import UsageError
from eqat_tui.clusters.asked import AskedOfSlurm, goes_to_slurm
from eqat_tui.clusters.script import array_of


def test_a_job_has_the_gpus_of_its_run_unless_other_ones_are_asked_for() -> None:
    def options(asked: AskedOfSlurm, **settings: object) -> list[str]:
        return asked.options(
            [load("smoke", overrides={f"runtime.{name}": v for name, v in settings.items()})]
        )

    assert options(AskedOfSlurm()) == ["--gres=gpu:1"]
    assert options(AskedOfSlurm(), gpus=4) == ["--gres=gpu:4"]
    assert options(AskedOfSlurm(), device="cpu") == []
    assert options(AskedOfSlurm(more=("--gpus-per-node=a100:2",)), gpus=2) == ["--gpus-per-node=a100:2"]
    full = AskedOfSlurm(
        partition="long,short", account="ml", time="2-12", cpus=8, memory="64G", more=("--nice=9",)
    )
    full.check()
    assert options(full, device="cpu") == [
        *("--partition=long,short", "--account=ml", "--time=2-12", "--cpus-per-task=8", "--mem=64G"),
        "--nice=9",
    ]


@pytest.mark.parametrize(
    ("asked", "where"),
    [
        (AskedOfSlurm(time="four hours"), "--time"),
        (AskedOfSlurm(memory="much"), "--memory"),
        (AskedOfSlurm(partition="a b"), "--partition"),
        (AskedOfSlurm(account="--wrap=id"), "--account"),
        (AskedOfSlurm(more=("script.sh",)), "--sbatch"),
        (AskedOfSlurm(more=("--array=1-9",)), "--sbatch"),
        (AskedOfSlurm(more=("-a1-9",)), "--sbatch"),
        (AskedOfSlurm(more=("--arr=1-9",)), "--sbatch"),
        (AskedOfSlurm(more=("-W",)), "--sbatch"),
        (AskedOfSlurm(more=("--wrap=id",)), "--sbatch"),
        (AskedOfSlurm(more=("-Jname",)), "--sbatch"),
    ],
)
def test_what_slurm_would_not_understand_or_is_not_to_be_chosen_is_refused(
    asked: AskedOfSlurm, where: str
) -> None:
    with pytest.raises(UsageError) as refused:
        goes_to_slurm("slurm", asked)
    assert refused.value.where == where


def test_options_of_a_cluster_mean_nothing_on_this_machine() -> None:
    assert not goes_to_slurm("local", AskedOfSlurm())
    assert goes_to_slurm("slurm", AskedOfSlurm())
    with pytest.raises(UsageError, match="--on slurm"):
        goes_to_slurm("local", AskedOfSlurm(time="10"))
    with pytest.raises(UsageError, match="local or slurm"):
        goes_to_slurm("moon", AskedOfSlurm())


def test_tasks_of_an_array_are_those_runs_that_are_left() -> None:
    assert array_of([1, 2, 3], 0) == "1-3"
    assert array_of([7, 2, 3, 5], 2) == "2-3,5,7%2"
    assert array_of([4], 1) == "4%1"
