"""What the first of several processes tells the others, so that they can compute with it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from engine.checkpoints.followed import Contents, FollowedStore, contents_of
from engine.config.run import RunConfig
from engine.config.stages import STAGES, measured_stage
from engine.config.tables import load_named
from engine.data.encoding import Encoder
from engine.models.causal_lm import CausalLM
from engine.phases.evaluation import evaluate
from engine.phases.imported import open_source
from engine.phases.job import Job, compute_dtype
from engine.phases.kernels import switch_on_kernels
from engine.phases.prepare import compile_passages
from engine.phases.text import Tokens
from engine.plan.plan import Plan
from engine.reporter import Reporter
from engine.run.directory import RunDirectory
from engine.training.world import World


class Prepared(NamedTuple):
    """What came of the preparation."""

    plan: Plan
    tokens: Tokens
    identity: dict[str, str]
    contents: Contents

    @classmethod
    def of(cls, job: Job) -> Prepared:
        return cls(job.plan, job.tokens, job.store.identity, contents_of(job.store))


class Call(NamedTuple):
    """To a phase that all do together; to none at the end."""

    phase: str
    contents: Contents

    @classmethod
    def to(cls, phase: str, job: Job) -> Call:
        return cls(phase, contents_of(job.store))


def together(phase: str) -> Callable[[Job], None] | None:
    """What all processes do in a phase; none where the first does it alone."""
    measured = measured_stage(phase)
    if measured:
        return partial(evaluate, stage=STAGES[measured])
    if phase in STAGES and STAGES[phase].ranks == "together":
        work: Callable[[Job], None] = load_named(STAGES[phase].run)
        return work
    return None


def joined(
    run: RunDirectory,
    config: RunConfig,
    told: Prepared,
    report: Reporter,
    device: torch.device,
    world: World,
) -> Job:
    """Another process's part of what the first has prepared."""
    switch_on_kernels(config, device, report)
    source = open_source(config)
    lm = CausalLM(source, device, compute_dtype("auto", device))
    if told.plan.compiles_passages:
        compile_passages(lm, report)
    encoder = Encoder(source.tokenizer(), rows=lm.vocab_size, bos=config.model.bos)
    store = FollowedStore(run.checkpoints_dir, told.identity, told.contents)
    return Job(run, config, told.plan, report, source, lm, encoder, told.tokens, store, world)
