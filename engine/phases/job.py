"""What every phase works with: the run, the model, the text, and what is checkpointed so far."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import msgspec
import torch
from torch import Tensor, nn

from engine.checkpoints.commits import Checkpoints
from engine.checkpoints.store import CheckpointStore
from engine.config.dtypes import resolved_dtype
from engine.config.run import RunConfig
from engine.config.stages import Stage, network_stages, stages_of
from engine.data.activations import ActivationStore, make_store
from engine.data.encoding import Encoder
from engine.evaluation.harness import HarnessTasks
from engine.evaluation.tasks import TokenizedTask
from engine.export.stored import as_stored, export_dtype, outer_as_stored, stored_outer
from engine.models.causal_lm import CausalLM
from engine.models.source import ModelSource
from engine.phases.text import Tokens
from engine.plan.costs import costs_of
from engine.plan.fit import host_budget
from engine.plan.plan import Plan
from engine.plan.portions import together
from engine.plan.streams import streams_batch
from engine.quant.packed import PackedBlock, PackedWeight, overlaid
from engine.reporter import Reporter
from engine.run.directory import RunDirectory
from engine.run.facts import HEAD, TOGETHER, block_entry, done_fact, micro_batch_fact, stage_entry
from engine.system.files import make_folder
from engine.training.world import ALONE, World


@dataclass
class Job:
    """One attempt at one run, prepared."""

    run: RunDirectory
    config: RunConfig
    plan: Plan
    report: Reporter
    source: ModelSource
    lm: CausalLM
    encoder: Encoder
    tokens: Tokens
    store: CheckpointStore
    world: World = ALONE
    tasks: Mapping[str, TokenizedTask] = field(default_factory=dict)
    """Questions of zero-shot tasks, by the task's name."""
    harness: HarnessTasks | None = None
    """Tasks that lm-eval asks."""
    perplexities: dict[str, float] = field(default_factory=dict)
    """By stage, as far as measured."""
    answer_perplexities: dict[str, float] = field(default_factory=dict)
    """The same of the answers of held-out conversations."""
    accuracies: dict[str, dict[str, float]] = field(default_factory=dict)
    """By stage and task, as far as measured."""
    full: ActivationStore | None = None
    """The original model's last hidden states, from where they come into being until a training has learnt
    from them."""

    def __post_init__(self) -> None:
        runtime = self.config.runtime
        if self.world.rank:  # the first rank has the same state, and keeps it
            runtime = msgspec.structs.replace(runtime, checkpoint_minutes=0.0)
        self.checkpoints = Checkpoints(self.store, self.report, runtime)

    @property
    def device(self) -> torch.device:
        return self.lm.device

    @property
    def blocks(self) -> int:
        return self.lm.blocks

    @property
    def takes_kernels(self) -> bool:
        """Whether steps are recorded and kernels of our own are tried: on a GPU; deterministic kernels are
        torch's, launched one by one."""
        runtime = self.config.runtime
        return self.device.type == "cuda" and runtime.compile != "off" and not runtime.deterministic

    def seed(self, index: int) -> int:
        """A seed of its own for each block, so that a block draws the same whether or not others ran before
        it."""
        return self.config.runtime.seed * 1_000_003 + index

    def network_seed(self, stage: Stage) -> int:
        """A seed of its own for a stage that trains all blocks together; behind those of the blocks."""
        return self.seed(self.blocks + network_stages().index(stage))

    def micro_batch(self, stage: Stage) -> int:
        """Sequences that pass at a time where ``stage`` trains the whole network: as asked for, else as the
        plan of the first attempt chose."""
        return costs_of(stage).micro_batch(self.config) or int(self.store.fact(micro_batch_fact(stage)))

    # What is trained so far

    def is_finished(self, index: int) -> bool:
        """Whether block ``index`` is quantized and committed."""
        return block_entry(index) in self.store

    def all_blocks_finished(self) -> bool:
        return all(self.is_finished(index) for index in range(self.blocks))

    def packed(self, index: int) -> PackedBlock:
        """Block ``index`` as quantized so far: what made it, overlaid by what stages of the whole network
        trained of it, tensor by tensor."""
        tensors = self.store.get(block_entry(index))
        for stage in network_stages():
            if self.is_done(stage):
                tensors = overlaid(tensors, self.store.get(stage_entry(stage, index)))
        return PackedBlock.from_tensors(tensors, self.config.grid.shared)

    def newest_stage(self) -> Stage:
        """The quantized version of the model that is the newest so far."""
        done = [stage for stage in stages_of(self.config) if stage.scope == "block" or self.is_done(stage)]
        return done[-1]

    def is_done(self, stage: Stage) -> bool:
        """Whether a stage of the whole network is trained."""
        return bool(self.store.fact(done_fact(stage)))

    @functools.cached_property
    def export_dtype(self) -> torch.dtype:
        """What an export stores everything in that is not quantized; its figures are measured with that."""
        return export_dtype(self.config.export.dtype, self.lm)

    @functools.cached_property
    def heads(self) -> dict[str, PackedWeight]:
        """The quantized embedding and head, by name without ``.weight``; none where they stay numbers."""
        grid = self.config.grid.head
        return {} if grid is None else PackedBlock.from_tensors(self.store.get(HEAD), grid).linears

    def outer_as_exported(self) -> AbstractContextManager[None]:
        """Inside, embedding, final norm and head have the values of an export."""
        return outer_as_stored(self.lm, self.export_dtype, self.heads)

    def stored_outer(self) -> Iterator[tuple[str, Tensor]]:
        """These values by name, those that the model has not already."""
        return stored_outer(self.lm, self.export_dtype, self.heads)

    def exported(self, index: int) -> PackedBlock:
        """Block ``index`` as quantized so far, with the values that an export has."""
        return as_stored(self.packed(index), self.export_dtype, self.lm.block_prefix(index))

    def packed_block(self, index: int) -> nn.Module:
        """The same as a module, on the device."""
        return self.exported(index).install(self.lm.load_block(index))

    def dense_block(self, index: int) -> nn.Module:
        """The same with its weights dequantized once: larger, and faster where few tokens pass at a time."""
        return self.exported(index).install_dense(self.lm.load_block(index))

    # Activations

    def activations(self, name: str, tokens: Tensor, dtype: torch.dtype) -> ActivationStore:
        """Room for the hidden states of ``tokens``, those of them that lie on this rank; waits while the disk
        has none."""
        file = f"{name}-{self.world.rank}.bin" if self.world.rank else f"{name}.bin"
        shape = (*tokens.shape, self.lm.hidden_size)

        def reserve() -> ActivationStore:
            make_folder(self.run.cache_dir, root=self.run.path)
            return make_store(
                self.plan.activation_store,
                shape,
                dtype,
                self.device,
                path=self.run.cache_dir / file,
                # Two streams live at the same time, on every rank.
                budget_bytes=host_budget(self.config, self.plan.machine) // (2 * self.world.size),
            )

        needed = math.prod(shape) * dtype.itemsize
        return self.checkpoints.patiently(reserve, needed, "the file of activations", self.run.cache_dir)

    def together(self, shape: Sequence[int]) -> int:
        """How many sequences of a stream ``[N, T, H]`` pass through a block together."""
        _, length, hidden = shape
        return together(streams_batch(self.config), length, hidden, self._numbers_together())

    def windows_together(self, windows_NT: Tensor) -> int:
        """How many windows pass through a block together where they are measured."""
        windows, length = windows_NT.shape
        batch, hidden = self.config.evaluation.batch_size, self.lm.hidden_size
        return min(max(1, windows), together(batch, length, hidden, self._numbers_together()))

    def _numbers_together(self) -> int:
        return int(self.store.fact(TOGETHER) or 0)

    @torch.no_grad()
    def embed(self, tokens: Tensor, *stores: ActivationStore, positions_NT: Tensor | None = None) -> None:
        """Fill ``stores`` with what the first block receives. Positions are those of packed samples."""
        batch = self.together(stores[0].shape)
        for start in range(0, tokens.shape[0], batch):
            self.report.leave_if_asked()
            rows = slice(start, start + batch)
            positions = None if positions_NT is None else positions_NT[rows]
            hidden = self.lm.embed(tokens[rows].to(self.device), positions)
            for store in stores:
                store.write(start, hidden)


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The torch dtype of a configured one."""
    dtype = getattr(torch, resolved_dtype(name, cuda=device.type == "cuda"))
    assert isinstance(dtype, torch.dtype)
    return dtype
