"""The phases of a run, in the order that the table of stages gives them (:mod:`engine.config.stages`).

    prepare               open the model, draw and tokenize the text
    evaluate_fp           perplexity of the model as it came
    <stage of blocks>     train block after block (Block-AP), or only round them
    evaluate_rtn, ...     perplexity of plain round-to-nearest, and of what was trained
    <stage of the whole network>, evaluate_...
    export                write, verify

A finished run can be evaluated or exported again, and its models asked for a sample of their words
(``generate``).

A phase that an earlier attempt finished is found in the checkpoint and told again; one that was interrupted
goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch

from engine.config.run import RunConfig
from engine.config.runtime import GPUS
from engine.config.stages import EVALUATE, STAGES, last_stage, measured_stage, phases_of
from engine.config.tables import load_named
from engine.phases.copies import copy_verified, verified_exports
from engine.phases.evaluation import evaluate
from engine.phases.export import export, recover_exports
from engine.phases.job import Job
from engine.phases.joining import Call, Prepared, together
from engine.phases.measured import measure_as_asked
from engine.phases.prepare import prepare
from engine.phases.samples import write_samples
from engine.plan.plan import Plan
from engine.reporter import Reporter
from engine.run.directory import RunDirectory
from engine.run.events import RankPeaks
from engine.run.housekeeping import remove_cache
from engine.run.task import Asked
from engine.training.world import ALONE, World


@dataclass
class Pipeline:
    """One attempt at one run."""

    run: RunDirectory
    config: RunConfig
    plan: Plan
    report: Reporter
    device: torch.device
    asked: Asked = field(default_factory=Asked)
    join: Callable[[], World] = lambda: ALONE
    """Gives the other processes that compute with this one, once they are there."""

    job: Job = field(init=False)

    def phases(self) -> list[str]:
        """Names of the phases of this attempt, in order."""
        if self.asked.task == "run":
            return phases_of(self.config)
        if self.asked.task == "eval":
            return ["prepare", f"{EVALUATE}{last_stage(self.config).name}"]
        return ["prepare", self.asked.task]

    def __call__(self) -> None:
        """Run every phase that is not finished yet."""
        if self.asked.task == "export" and self.asked.export_to is not None and self._copied():
            return
        self.report.begin(self.phases(), {phase.name: phase.seconds for phase in self.plan.phases})
        with self.report.phase("prepare"):
            recover_exports(self.run)
            self.prepare()
        for name in self.phases()[1:]:
            with self.report.phase(name):
                self._call_others(name)
                self._work_of(name)()
                if self.job.world.several and together(name) is not None:
                    peaks = self.job.world.gathered(self.report.peaks(), RankPeaks)
                    self.report.ranks = tuple(peaks)
        self._call_others("")
        if self.asked.task == "run":
            # A finished run keeps what it made, and nothing that only helped to make it.
            remove_cache(self.run)

    def _copied(self) -> bool:
        """Copy what was verified already, which needs neither the model nor its text; False where it has to
        be made first."""
        copy_to, planned = self.asked.export_to, {phase.name: phase.seconds for phase in self.plan.phases}
        assert copy_to is not None
        self.report.begin(["export"], planned)
        self.report.doing = "looking at the export"
        recover_exports(self.run)
        exports = verified_exports(self.run, self.config.export.formats, self.report)
        if exports is None:
            return False
        with self.report.phase("export"):
            copy_verified(self.run, exports, copy_to, self.report)
        return True

    def prepare(self) -> None:
        """Open everything that the phases work with."""
        allowed = (GPUS,) if self.asked.allows_other_size else ()
        self.job = prepare(
            self.run,
            self.config,
            self.plan,
            self.report,
            self.device,
            self.asked.task,
            may_differ=allowed,
            asks=not self.asked.how.is_asked,
        )
        self.job.world = self.join()
        self.job.world.tell(Prepared.of(self.job))

    def _call_others(self, phase: str) -> None:
        """To a phase that all processes do together; the others of a run wait while the first does the rest
        alone."""
        if self.job.world.several and (not phase or together(phase) is not None):
            self.job.world.tell(Call.to(phase, self.job))

    def _work_of(self, phase: str) -> Callable[[], None]:
        measured = measured_stage(phase)
        if measured and self.asked.how.is_asked:
            return partial(measure_as_asked, self.job, STAGES[measured], self.asked.how)
        if measured:
            return partial(evaluate, self.job, STAGES[measured], again=self.asked.task == "eval")
        if phase in STAGES:
            return partial(load_named(STAGES[phase].run), self.job)
        others: dict[str, Callable[[], None]] = {
            "export": lambda: export(self.job, self.asked.export_to),
            "generate": lambda: write_samples(self.job, self.asked.prompt, self.asked.new_tokens),
        }
        return others[phase]
