"""The phases of a run, in order.

    prepare          open the model, draw and tokenize the text
    evaluate_fp      perplexity of the model as it came
    block_ap         train block after block            (or `rtn`: only round them)
    evaluate_rtn     perplexity of plain round-to-nearest
    evaluate_block_ap
    e2e_qp           train the scales through the whole network
    evaluate_e2e_qp
    export           write, verify

A finished run can be evaluated or exported again, and its models asked for a sample of their words
(``generate``).

A phase that an earlier attempt finished is found in the checkpoint and told again; one that was interrupted
goes on where it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from engine import telemetry
from engine.checkpoints.store import CheckpointStore
from engine.config.grid import GridConfig
from engine.config.run import RunConfig
from engine.config.stages import phases_of, versions
from engine.data.tasks import questions, task_name
from engine.data.text import corpus_name
from engine.errors import DamagedRun, UsageError
from engine.evaluation.perplexity import PerplexityResult, perplexity
from engine.evaluation.tasks import Accuracy, TokenizedTask, accuracies, hidden_bytes, tokenize
from engine.gpu.compiled import SWITCH_HINT
from engine.methods.blockwise.rtn import round_to_nearest
from engine.models.causal_lm import CausalLM
from engine.models.source import ModelSource
from engine.phases.blocks import round_blocks, train_blocks
from engine.phases.end_to_end import train_end_to_end
from engine.phases.export import export, recover_exports
from engine.phases.job import Job, compute_dtype
from engine.phases.preparation import (
    PREPARE_SILENCE,
    deciding_fields,
    digest,
    draw_tokens,
    share_origin,
    warn_of_changes,
    write_manifest,
)
from engine.phases.samples import NEW_TOKENS, write_samples
from engine.plan.fit import host_budget
from engine.plan.plan import Plan
from engine.quant.packed import Kernels
from engine.reporter import Reporter
from engine.run import events
from engine.run.directory import RunDirectory
from engine.run.facts import E2E_DONE
from engine.run.housekeeping import remove_cache
from engine.training.world import ALONE, World

Task = Literal["run", "eval", "export", "generate"]

EVALUATION = "the file of an evaluation's activations"
"""What a full disk has no room for while a model is evaluated."""


@dataclass
class Pipeline:
    """One attempt at one run."""

    run: RunDirectory
    config: RunConfig
    plan: Plan
    report: Reporter
    device: torch.device
    task: Task = "run"
    world: World = ALONE
    prompt: str = ""
    """What the models continue in the task ``generate``, by at most ``new_tokens`` tokens."""
    new_tokens: int = NEW_TOKENS
    export_to: Path | None = None
    """Where the task ``export`` copies its checkpoints as well."""

    job: Job = field(init=False)

    def phases(self) -> list[str]:
        """Names of the phases this configuration runs, in order."""
        if self.task == "run":
            return phases_of(self.config)
        if self.task == "eval":
            return ["prepare", "evaluate_e2e_qp" if self.config.e2e_qp.enabled else "evaluate_block_ap"]
        return ["prepare", self.task]

    def __call__(self) -> None:
        """Run every phase that is not finished yet."""
        self.report.begin(self.phases(), {phase.name: phase.seconds for phase in self.plan.phases})
        with self.report.phase("prepare"):
            recover_exports(self.run)
            self.prepare()
        for name in self.phases()[1:]:
            with self.report.phase(name):
                self._phase_method(name)()
        self._clean_up()

    def _clean_up(self) -> None:
        """A finished run keeps what it made, and nothing that only helped to make it."""
        if self.task == "run":
            remove_cache(self.run)

    def _phase_method(self, name: str) -> Callable[[], None]:
        methods: dict[str, Callable[[], None]] = {
            "evaluate_fp": lambda: self.evaluate("fp", self._full_block),
            "block_ap": lambda: train_blocks(self.job),
            "rtn": lambda: round_blocks(self.job),
            "evaluate_rtn": lambda: self.evaluate("rtn", self._rounded_block),
            "evaluate_block_ap": lambda: self.evaluate("block_ap", self.job.packed_block),
            "e2e_qp": lambda: train_end_to_end(self.job),
            "evaluate_e2e_qp": lambda: self.evaluate("e2e_qp", self.job.packed_block),
            "export": lambda: export(self.job, self.export_to),
            "generate": lambda: write_samples(self.job, self.prompt, self.new_tokens),
        }
        return methods[name]

    def prepare(self) -> None:
        """Open the model (no block is loaded yet), tokenize, open the checkpoint."""
        run, config, report = self.run, self.config, self.report
        report.expect_silence(PREPARE_SILENCE)
        self._switch_on_kernels()
        source = ModelSource.open(config.model)
        lm = CausalLM(source, self.device, compute_dtype("auto", self.device))
        if self.task == "run" and self.plan.compiles_passages:
            lm.compile(expect_silence=report.expect_silence, on_failure=self._slower_passages)
        tokens = draw_tokens(config, source.tokenizer(), report)
        identity = {name: value for name, value in source.identity().items() if name not in ("path", "name")}
        made_from = {
            "model": digest(identity),
            "tokenizer": source.assets_identity(),
            **tokens.digests(),
        }
        report.expect_silence(PREPARE_SILENCE)
        store = CheckpointStore(
            run.checkpoints_dir,
            {**deciding_fields(config), **made_from},
            on_damage=lambda message: report.warning("checkpoint", message),
        )
        share_origin(run, store, report)
        warn_of_changes(run, self.device, report)
        write_manifest(run, config, source, self.device, made_from)
        self.job = Job(run, config, self.plan, report, source, lm, tokens, store, self.world)
        if config.evaluation.enabled and self.task in ("run", "eval"):
            self.job.tasks = self._questions(source)
        if self.task != "run":
            self._require_finished()
        for stage in versions():
            known = store.fact(f"eval_{stage}")
            if known and known["perplexity"] is not None:
                self.job.perplexities[stage] = known["perplexity"]
            if known and known.get("accuracy"):
                self.job.accuracies[stage] = known["accuracy"]

    def _switch_on_kernels(self) -> None:
        """Packed weights are unpacked by one kernel where Triton works, else by torch's operations."""
        if self.device.type != "cuda" or self.config.runtime.compile == "off":
            return
        try:
            Kernels.switch_on(self.device)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of Triton, its compiler, the host's compiler, the driver
            self.report.warning(
                "compile",
                f"packed weights are slower, Triton does not work here: {str(error).strip()[:200]}",
                hint=SWITCH_HINT,
            )

    def _slower_passages(self, why: str) -> None:
        self.report.warning(
            "compile",
            f"evaluation and streams are slower, blocks cannot be compiled: {why}",
            hint=SWITCH_HINT,
        )

    def _questions(self, source: ModelSource) -> dict[str, TokenizedTask]:
        """Early, so that a task that cannot be read does not wait for the first evaluation to say so."""
        found = {}
        for name in self.config.evaluation.tasks:
            self.report.leave_if_asked()
            self.report.expect_silence(PREPARE_SILENCE)
            asked = questions(name, self.config.evaluation.task_limit)
            found[task_name(name)] = tokenize(asked, source.tokenizer())
        return found

    def _require_finished(self) -> None:
        """`eval`, `export` and `generate` work on what a run has trained; there must be all of it."""
        store = self.job.store
        trained = self.job.all_blocks_finished()
        if trained and (store.fact(E2E_DONE) or not self.config.e2e_qp.enabled) and not self._lost_figures():
            return
        if store.damage:
            raise DamagedRun(
                f"its checkpoint is damaged ({store.damage}), and this trains nothing",
                where=self.run.id,
                hint=f"eqat resume {self.run.id} trains what is damaged again",
            )
        raise UsageError(
            "the run has not finished training", where=self.run.id, hint=f"eqat resume {self.run.id}"
        )

    def _lost_figures(self) -> bool:
        """Whether damage took a perplexity that the export's card tells: without it the export would be
        another."""
        wanted = [name for name in phases_of(self.config) if name.startswith("evaluate_")]
        facts = (name.replace("evaluate_", "eval_") for name in wanted)
        store = self.job.store
        return (
            self.task == "export" and bool(store.damage) and any(store.fact(name) is None for name in facts)
        )

    # Evaluation

    def evaluate(self, stage: str, block_for: Callable[[int], nn.Module]) -> None:
        """Perplexity and tasks of one version of the model, unless an earlier attempt measured them."""
        job = self.job
        known = job.store.fact(f"eval_{stage}")
        if known is None or self.task == "eval":
            result = self._measure(block_for)
            known = {
                "perplexity": result.perplexity if math.isfinite(result.perplexity) else None,
                "tokens": result.tokens,
                "seconds": result.seconds,
                **self._ask(block_for),
            }
            job.store.remember(f"eval_{stage}", known)
            job.checkpoints.commit(self.report.phase_name)
        if known["perplexity"] is not None:
            job.perplexities[stage] = known["perplexity"]
        if known.get("accuracy"):
            job.accuracies[stage] = known["accuracy"]
        self.report.emit(
            events.Eval(
                stage=stage,
                sequence_length=self.config.evaluation.sequence_length,
                corpus=corpus_name(self.config.evaluation.data),
                **known,
            )
        )

    def _measure(self, block_for: Callable[[int], nn.Module]) -> PerplexityResult:
        """Half as many windows at a time, from the beginning, as long as memory does not suffice."""
        batch = self.config.evaluation.batch_size
        lm, windows = self.job.lm, self.job.tokens.evaluation
        needed = windows.numel() * lm.hidden_size * lm.dtype.itemsize
        while True:
            try:
                return self.job.checkpoints.patiently(
                    partial(self._perplexity, block_for, batch), needed, EVALUATION, self.run.cache_dir
                )
            except torch.OutOfMemoryError:
                if batch == 1:
                    raise
            batch //= 2
            telemetry.release_memory()
            self.report.warning(
                "micro_batch", f"out of memory; evaluating again with {batch} windows at a time"
            )

    def _perplexity(self, block_for: Callable[[int], nn.Module], batch_size: int) -> PerplexityResult:
        return perplexity(
            self.job.lm,
            block_for,
            self.job.tokens.evaluation,
            batch_size=batch_size,
            store_kind=self.plan.activation_store,
            store_path=self.run.cache_dir / "evaluation.bin",
            store_budget_bytes=host_budget(self.config, self.plan.machine) // 2,
            on_progress=self.report.step,
            on_batch=self.report.leave_if_asked,
        )

    def _ask(self, block_for: Callable[[int], nn.Module]) -> dict[str, dict[str, float]]:
        """Zero-shot tasks, where there are any."""
        if not self.job.tasks:
            return {}
        needed = hidden_bytes(self.job.lm, self.job.tasks)
        found = self.job.checkpoints.patiently(
            partial(self._accuracies, block_for), needed, EVALUATION, self.run.cache_dir
        )
        return {
            "accuracy": {name: result.accuracy for name, result in found.items()},
            "questions": {name: result.questions for name, result in found.items()},
        }

    def _accuracies(self, block_for: Callable[[int], nn.Module]) -> dict[str, Accuracy]:
        return accuracies(
            self.job.lm,
            block_for,
            self.job.tasks,
            folder=self.run.cache_dir,
            on_progress=self.report.step,
            on_batch=self.report.leave_if_asked,
        )

    def _full_block(self, index: int) -> nn.Module:
        return self.job.lm.load_block(index)

    def _rounded_block(self, index: int) -> nn.Module:
        """Plain round-to-nearest between minimum and maximum: the baseline every method is compared with."""
        block = self.job.lm.load_block(index)
        grid = self.config.grid
        plain = GridConfig(
            bits=grid.bits, group_size=grid.group_size, symmetric=grid.symmetric, range="minmax"
        )
        return round_to_nearest(block, self.job.lm.linear_names(index), plain).install(block)
