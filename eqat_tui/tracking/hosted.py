"""Points for wandb and trackio: each of the two keeps runs of its own kind, on this machine or elsewhere.

Both stay on this machine unless their own environment says otherwise (``WANDB_MODE=online``,
``TRACKIO_SPACE_ID``). A point's step is that of its own phase, while wandb wants one that only grows: there
every number is drawn over the step of its group, which is logged beside it.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine.config.writing import flat, to_dict
from engine.errors import EqatError, PreflightError, first_line
from engine.run.directory import RunDirectory
from eqat_tui.output import cell, say
from eqat_tui.outside import outside_runs
from eqat_tui.tracking.points import Point

PROJECT = "eqat"
ANOTHER = "choose another folder with --to"
Log = Callable[[dict[str, Any], int], None]
"""Values by name, and their step."""


def open_wandb(run: RunDirectory, to: Path | None) -> Hosted:
    """A run of wandb's, in ``wandb/`` of this folder or another one; ``wandb sync`` sends it later."""
    folder = (to or Path(".")).absolute()
    outside_runs(folder / "wandb", ANOTHER)
    mode = os.environ.get("WANDB_MODE") or "offline"
    with _failing("wandb"):
        if to is not None:
            folder.mkdir(parents=True, exist_ok=True)
        import wandb

        made = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            name=run.id,
            dir=str(folder),
            mode=mode,
            config=_settings(run),
            settings=wandb.Settings(
                console="off", silent=True, disable_git=True, save_code=False, x_disable_stats=True
            ),
        )
    if mode == "offline":
        say(f"wandb sync {cell(str(Path(made.dir).parent), 1000)} sends it")
    return Hosted("wandb", _into_wandb(made), made.finish)


def open_trackio(run: RunDirectory, to: Path | None) -> Hosted:
    """A run of trackio's, in its own folder or another one; ``trackio show`` draws it."""
    if to is not None:
        outside_runs(to.absolute() / "trackio.db", ANOTHER)
        os.environ["TRACKIO_DIR"] = str(to.absolute())
    with _failing("trackio"), _unheard():
        import trackio

        made = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT") or PROJECT,
            name=run.id,
            config=_settings(run),
            space_id=os.environ.get("TRACKIO_SPACE_ID") or None,
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
    where = f"TRACKIO_DIR={cell(os.environ['TRACKIO_DIR'], 1000)} " if to is not None else ""
    say(f"{where}trackio show --project {PROJECT} draws it")

    def log(values: dict[str, Any], step: int) -> None:
        made.log(values, step=step)

    return Hosted("trackio", log, trackio.finish)


class Hosted:
    """A run of another program. Whatever it raises ends the command in a line."""

    def __init__(
        self, name: str, log: Callable[[dict[str, Any], int], None], finish: Callable[[], Any]
    ) -> None:
        self._name, self._log, self._finish = name, log, finish
        self._begun: float | None = None

    def write(self, points: Sequence[Point]) -> None:
        with _failing(self._name), _unheard():
            for point in points:
                self._begun = point.t if self._begun is None else self._begun
                values: dict[str, Any] = {
                    name: math.nan if value is None else value for name, value in point.values.items()
                }
                values |= point.texts
                # They note when they were told, which may be long after.
                self._log({**values, "second": point.t - self._begun}, max(0, point.step))

    def close(self) -> None:
        with _failing(self._name), _unheard():
            self._finish()


def _into_wandb(made: Any) -> Log:
    """Numbers over a step of their own; texts where wandb keeps the last of each."""
    known: set[str] = set()

    def log(values: dict[str, Any], step: int) -> None:
        numbers = {name: value for name, value in values.items() if not isinstance(value, str)}
        for name, value in values.items():
            if isinstance(value, str):
                made.summary[name] = value
        groups = {name: f"{name.rpartition('/')[0]}/step" for name in numbers if name != "second"}
        for name, counted in groups.items():
            if name not in known:
                known.add(name)
                made.define_metric(name, step_metric=counted)
        if groups:
            made.log({**numbers, **dict.fromkeys(groups.values(), step)})

    return log


def _settings(run: RunDirectory) -> dict[str, Any]:
    """The run's configuration; nothing where it cannot be read, which stops nothing."""
    try:
        return dict(flat(to_dict(run.config())))
    except Exception:  # whatever a damaged file makes a parser raise
        return {}


@contextmanager
def _failing(name: str) -> Iterator[None]:
    """What goes wrong in there is a line: the run knows nothing of it."""
    try:
        yield
    except (EqatError, ImportError):
        raise
    except Exception as error:
        said = first_line(error, 200) if str(error).strip() else type(error).__name__
        raise PreflightError(
            said, where=name, hint="the run is not touched; check its settings and run again"
        ) from error


@contextmanager
def _unheard() -> Iterator[None]:
    """What a library prints for itself is none of what was asked for."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield
