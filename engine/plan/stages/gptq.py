"""GPTQ: of one block, its weights twice and the Hessian of one linear's inputs.

memory    float32 weights and latents of a block; then the largest of (a batch on its way through the block,
          what one linear is given of it, one Hessian), (four matrices of a Hessian's size, while its factor
          is inverted) and (two of them, and what is rounded together)
a block   passages of the stream: one for every step of the order in which linears are called, as far as that
          step, and one through the quantized block; products of tokens for the Hessians; factors of these;
          two choices of ranges for every group; rounding column by column
disk      every finished block once, and its latents where a stage starts from them; stored streams; there is
          no state in the middle of a block
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from functools import partial

from engine.architecture.families import Architecture
from engine.config.gptq import GPU_VALUES, VALUES, GPTQConfig
from engine.config.joint_search import candidates
from engine.config.kept_latents import kept_latents
from engine.config.latents import Downcast
from engine.config.run import RunConfig
from engine.plan.costs import Ladder, Pain, StageCosts, Text, Training, halves
from engine.plan.estimate import CONSTANTS, Workload
from engine.plan.memory_terms import Memory
from engine.plan.object_sizes import block_bytes
from engine.plan.passages import compiling_form, passing
from engine.plan.rates import Speed, load_seconds, search_seconds, unpacking
from engine.plan.streams import stored_pairs, streams_bytes

HESSIANS = 4
"""Matrices of its size at the peak of inverting it: itself, its factor, ones, the inverse. Two of them stay
while linears are rounded."""
ROUNDING_TENSORS = 8
"""float32 tensors of the rows that are rounded together."""
PARTS_OF_A_PASSAGE = 2.2
"""Passages as far as query, key and value, the output of the attention, gate and up, and down."""
OPERATIONS_A_COLUMN = 7
"""Of a weight, for every column: an error moves what is behind it (1), and three rows' errors are weighed."""


class GPTQCosts(StageCosts):
    """Of ``gptq``."""

    def section(self, config: RunConfig) -> GPTQConfig:
        section: GPTQConfig = getattr(config, self.stage.name)
        return section

    def text(self, config: RunConfig) -> Text:
        section = self.section(config)
        return Text(
            section=self.stage.name,
            sequences=section.sequences,
            val_sequences=section.val_sequences,
            sequence_length=section.sequence_length,
            compute_dtype=section.compute_dtype,
        )

    def latents(self, config: RunConfig) -> Downcast | None:
        return kept_latents(config)

    def streams(self) -> int:
        return 1

    def streams_batch(self, config: RunConfig) -> int:
        return self.section(config).batch_size

    # Memory

    def memory(self, work: Workload) -> Memory:
        section, arch = self.section(work.config), work.arch
        compute = work.bytes_of(section.compute_dtype)
        parts = {
            "weights of a block": 4 * arch.params_per_block,
            "latents": 4 * arch.linear_params_per_block,
            **gptq_parts(work, section.batch_size, section.sequence_length, compute),
        }
        return Memory(parts, streams_bytes(work))

    # Time

    def seconds(self, work: Workload, rates: Speed, stored_bytes: int) -> float:
        load = load_seconds(work.arch, stored_bytes)
        return load + compiling_form(work, rates) + work.arch.blocks * self.block_seconds(work, rates)

    def block_seconds(self, work: Workload, rates: Speed) -> float:
        """Of one block, from the weights as they came to the stream behind it."""
        section = self.section(work.config)
        sequences, length, batch = section.sequences, section.sequence_length, section.batch_size
        advance = self.passage_seconds(work, rates)
        return gptq_seconds(work, rates, sequences, length, batch) + advance

    def passage_seconds(self, work: Workload, rates: Speed) -> float:
        """The stream through a finished block."""
        section = self.section(work.config)
        through = passing(work, rates, section.sequences, section.sequence_length, section.batch_size)
        return through + unpacking(work, rates)

    # Checkpoints

    def training(self, work: Workload, rates: Speed, stored_bytes: int) -> Training:
        blocks = work.arch.blocks
        reading = load_seconds(work.arch, stored_bytes) / blocks
        whole, passage = self.block_seconds(work, rates), self.passage_seconds(work, rates)
        return Training(
            phase=self.stage.name,
            times=blocks,
            whole=reading + whole,
            passage=reading + passage,
            step=whole - passage,
            bytes=0,
        )

    def kept(self, work: Workload, streams_every: int, snapshots: int) -> int:
        one = block_bytes(work.arch, work.config.grid, self.latents(work.config))
        pairs = stored_pairs(work, streams_every)
        stored = pairs * streams_every * one + min(2, pairs) * streams_bytes(work)
        return max(self.result_bytes(work) + min(1, pairs) * streams_bytes(work), stored)

    # What does not fit

    def smaller(self, config: RunConfig) -> Iterator[Ladder]:
        section, name = self.section(config), self.stage.name
        yield Ladder(Pain.OTHER_STEPS, name, "batch_size", halves(section.batch_size, 1), is_batch=True)
        yield Ladder(Pain.LESS_TEXT, name, "sequences", halves(section.sequences, 32))
        yield Ladder(Pain.SHORTER_TEXT, name, "sequence_length", halves(section.sequence_length, 256))


def gptq_parts(work: Workload, batch: int, length: int, compute: int) -> dict[str, int]:
    """What GPTQ holds of a block beside its weights and latents, ``compute`` bytes a number."""
    arch, tokens = work.arch, batch * length
    inputs = max(linear.in_features for linear in arch.linears)
    passed = compute * tokens * (3 * arch.intermediate + 6 * arch.hidden)
    if arch.eager_attention:
        passed += batch * arch.heads * length**2 * (2 * compute + 4)
    measuring = passed + 4 * tokens * inputs + 4 * inputs**2
    return {"activations or Hessians": max(measuring, *map(partial(_rounding, work), _steps(arch)))}


def _rounding(work: Workload, step: tuple[int, int]) -> int:
    """Bytes while the Hessian of one step is factored, or its linears are rounded as one matrix."""
    inputs, weights = step
    at_once = min(_at_once(work), weights)
    factoring = HESSIANS * inputs**2 + weights
    return 4 * max(factoring, 2 * inputs**2 + 3 * weights + ROUNDING_TENSORS * at_once)


def _at_once(work: Workload) -> int:
    return GPU_VALUES if work.cuda else VALUES


def _columns(work: Workload) -> int:
    """Columns that are rounded one after the other, again for every part of the rows."""
    return sum(inputs * math.ceil(weights / _at_once(work)) for inputs, weights in _steps(work.arch))


def _steps(arch: Architecture) -> list[tuple[int, int]]:
    """Inputs and weights of the linears that are rounded as one matrix: at most those of one part of the
    block, with inputs as wide."""
    found: Counter[tuple[str, int]] = Counter()
    for linear in arch.linears:
        found[linear.name.rpartition(".")[0], linear.in_features] += linear.weights
    return [(inputs, weights) for (_, inputs), weights in found.items()]


def gptq_seconds(work: Workload, rates: Speed, sequences: int, length: int, batch: int) -> float:
    """Measuring the inputs of a block's linears on so many sequences, and rounding them."""
    arch, config = work.arch, work.config
    passages = PARTS_OF_A_PASSAGE * passing(work, rates, sequences, length, batch)
    inputs = (arch.hidden, arch.heads * arch.head_dim, arch.hidden, arch.intermediate)
    operations = 2.0 * sequences * length * sum(width**2 for width in inputs)
    operations += 1.5 * sum(width**3 for width in inputs)
    operations += OPERATIONS_A_COLUMN * sum(linear.weights * linear.in_features for linear in arch.linears)
    products = operations / (rates.flops / (CONSTANTS.gpu_float32 if work.cuda else 1))
    column = CONSTANTS.gpu_column if work.cuda else CONSTANTS.cpu_column
    per_weight = 0.0 if work.cuda else CONSTANTS.cpu_round_per_weight
    columns = _columns(work) * column + arch.linear_params_per_block * per_weight
    choosing = 2 * search_seconds(work, rates)
    if config.gptq.scales == "search":
        choosing = 2 * candidates(config.grid.shared) * arch.linear_params_per_block * rates.search_error
    return passages + products + columns + choosing
