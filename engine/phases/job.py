"""What every phase works with: the run, the model, the text, and what is checkpointed so far."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from engine.checkpoints.commits import Checkpoints
from engine.checkpoints.store import CheckpointStore
from engine.config.dtypes import resolved_dtype
from engine.config.run import RunConfig
from engine.data.activations import ActivationStore, make_store
from engine.data.sampler import ALONE, World
from engine.evaluation.tasks import TokenizedTask
from engine.models.causal_lm import CausalLM
from engine.models.source import ModelSource
from engine.phases.preparation import Tokens
from engine.plan.fit import host_budget
from engine.plan.plan import Plan
from engine.quant.packed import PackedBlock, PackedWeight
from engine.reporter import Reporter
from engine.run.directory import RunDirectory
from engine.run.facts import E2E_DONE, block_entry, scales_entry
from engine.system.files import make_folder


@dataclass
class Job:
    """One attempt at one run, prepared."""

    run: RunDirectory
    config: RunConfig
    plan: Plan
    report: Reporter
    source: ModelSource
    lm: CausalLM
    tokens: Tokens
    store: CheckpointStore
    world: World = ALONE
    tasks: Mapping[str, TokenizedTask] = field(default_factory=dict)
    """Questions of zero-shot tasks, by the task's name."""
    perplexities: dict[str, float] = field(default_factory=dict)
    """By stage, as far as measured."""
    accuracies: dict[str, dict[str, float]] = field(default_factory=dict)
    """By stage and task, as far as measured."""

    def __post_init__(self) -> None:
        self.checkpoints = Checkpoints(self.store, self.report, self.config.runtime)

    @property
    def device(self) -> torch.device:
        return self.lm.device

    @property
    def blocks(self) -> int:
        return self.lm.blocks

    def seed(self, index: int) -> int:
        """A seed of its own for each block (the end-to-end training counts as one more), so that a block
        draws the same whether or not others ran before it."""
        return self.config.runtime.seed * 1_000_003 + index

    # What is trained so far

    def is_finished(self, index: int) -> bool:
        """Whether block ``index`` is quantized and committed."""
        return block_entry(index) in self.store

    def all_blocks_finished(self) -> bool:
        return all(self.is_finished(index) for index in range(self.blocks))

    def packed(self, index: int) -> PackedBlock:
        """Block ``index`` as quantized so far: after E2E-QP with its trained scales."""
        grid = self.config.grid
        packed = PackedBlock.from_tensors(self.store.get(block_entry(index)), grid.bits, grid.symmetric)
        if not self.store.fact(E2E_DONE):
            return packed
        trained = self.store.get(scales_entry(index))
        linears = {
            name: PackedWeight(
                weight.words,
                trained[f"{name}.scale"],
                trained[f"{name}.zero_point"],
                weight.bits,
                weight.symmetric,
            )
            for name, weight in packed.linears.items()
        }
        return PackedBlock(linears, packed.others)

    def packed_block(self, index: int) -> nn.Module:
        """Block ``index`` as quantized so far, on the device."""
        return self.packed(index).install(self.lm.load_block(index))

    def dense_block(self, index: int) -> nn.Module:
        """The same with its weights dequantized once: larger, and faster where few tokens pass at a time."""
        return self.packed(index).install_dense(self.lm.load_block(index))

    # Activations

    def activations(self, name: str, tokens: Tensor, dtype: torch.dtype) -> ActivationStore:
        """Room for the hidden states of ``tokens``; waits while the disk has none."""
        shape = (*tokens.shape, self.lm.hidden_size)

        def reserve() -> ActivationStore:
            make_folder(self.run.cache_dir, root=self.run.path)
            return make_store(
                self.plan.activation_store,
                shape,
                dtype,
                self.device,
                path=self.run.cache_dir / f"{name}.bin",
                # Two streams live at the same time.
                budget_bytes=host_budget(self.config, self.plan.machine) // 2,
            )

        needed = math.prod(shape) * dtype.itemsize
        return self.checkpoints.patiently(reserve, needed, "the file of activations", self.run.cache_dir)

    @torch.no_grad()
    def embed(self, tokens: Tensor, *stores: ActivationStore) -> None:
        """Fill ``stores`` with what the first block receives."""
        batch = self.config.block_ap.batch_size
        for start in range(0, tokens.shape[0], batch):
            self.report.leave_if_asked()
            hidden = self.lm.embed(tokens[start : start + batch].to(self.device))
            for store in stores:
                store.write(start, hidden)


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The torch dtype of a configured one."""
    dtype = getattr(torch, resolved_dtype(name, cuda=device.type == "cuda"))
    assert isinstance(dtype, torch.dtype)
    return dtype
