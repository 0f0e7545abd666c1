"""The options of commands that can give a run to Slurm, each with the words of its help."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from eqat_tui.clusters.asked import AskedOfSlurm, goes_to_slurm

TAKES = "slurm"
"""The parameter of a command that is given what the options say."""


def _options(
    on: Annotated[
        str,
        typer.Option(
            "--on", metavar="PLACE", help="local: on this machine. slurm: as a job of this cluster's."
        ),
    ] = "local",
    partition: Annotated[
        str, typer.Option("--partition", metavar="NAME", help="With --on slurm: where jobs wait and run.")
    ] = "",
    account: Annotated[
        str, typer.Option("--account", metavar="NAME", help="With --on slurm: who pays.")
    ] = "",
    time: Annotated[
        str,
        typer.Option(
            "--time",
            metavar="TIME",
            help="With --on slurm: what a job may take (4:00:00); what takes longer goes on in another.",
        ),
    ] = "",
    cpus: Annotated[
        int, typer.Option("--cpus", min=0, metavar="N", help="With --on slurm: cores of a run.")
    ] = 0,
    memory: Annotated[
        str, typer.Option("--memory", metavar="SIZE", help="With --on slurm: memory of the host, 64G.")
    ] = "",
    sbatch: Annotated[
        list[str] | None,
        typer.Option(
            "--sbatch",
            metavar="OPTION",
            help="With --on slurm: any option of sbatch, --sbatch=--gres=gpu:a100:1; repeatable.",
        ),
    ] = None,
) -> AskedOfSlurm | None:
    """What is asked of Slurm; none where this machine is to make the run.

    Raises:
        UsageError: for a place that there is not, and for what is asked of Slurm without it.
    """
    asked = AskedOfSlurm(
        partition=partition, account=account, time=time, cpus=cpus, memory=memory, more=tuple(sbatch or ())
    )
    return asked if goes_to_slurm(on, asked) else None


def on_a_cluster(command: Callable[..., int]) -> Callable[..., int]:
    """``command`` with these options in the place of its parameter ``slurm``, which is given what they
    say."""
    ours = inspect.signature(_options, eval_str=True).parameters
    theirs = inspect.signature(command, eval_str=True)
    named: dict[str, inspect.Parameter] = {}
    for name, parameter in theirs.parameters.items():
        named |= ours if name == TAKES else {name: parameter}

    @functools.wraps(command)
    def wrapped(**given: Any) -> int:
        asked = _options(**{name: given.pop(name) for name in ours})
        return command(**given, **{TAKES: asked})

    # What typer reads. The annotations as well: those that were wrapped are of another list.
    wrapped.__signature__ = theirs.replace(parameters=list(named.values()))  # type: ignore[attr-defined]
    wrapped.__annotations__ = {name: parameter.annotation for name, parameter in named.items()}
    return wrapped
