"""The fields of a run: frozen structs, one owner for every default, each with its unit and effect.

Only the shape lives here. :mod:`engine.run.config` reads, overrides and writes configurations (import the
structs from there), and :mod:`engine.run.validation` holds every rule about their values.
"""

from __future__ import annotations

import functools
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

BITS = (2, 3, 4, 8)
GROUP_SIZES = (32, 64, 128, 256, -1)
TASKS = ("winogrande", "piqa", "hellaswag", "arc_easy", "arc_challenge")
"""Zero-shot tasks that are known by name."""

ComputeDtype = Literal["auto", "float32", "bfloat16", "float16"]
LearningRateScaling = Literal["absolute", "relative"]


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every configuration struct: frozen, keyword-only, unknown fields rejected."""


class ModelConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which model is quantized."""

    source: str = ""
    """Local directory, hub id, ``.gguf`` file, ``package://NAME/FILE`` or ``random://tiny-llama``."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; none means the default branch."""
    trust_remote_code: bool = False
    """Run Python code that the model repository ships. Only for repositories you have read."""


class GridConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The integer grid (uniform, group-wise)."""

    bits: int = 4
    """Bits per weight: 2, 3, 4 or 8."""
    group_size: int = 64
    """Weights along the input dimension that share a scale; -1 means the whole row."""
    symmetric: bool = False
    """Fix the zero point at 2^(bits-1) instead of choosing it per group."""
    range: Literal["minmax", "search"] = "search"
    """Initial scale and zero point: the group's minimum and maximum, or a search over shrunken ranges."""
    search_norm: float = 2.5
    """Exponent p of the |error|^p that ``range = "search"`` minimises."""


class DataConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where text comes from."""

    source: str = "builtin"
    """``builtin``, a shortcut (redpajama, c4, wikitext2, slimpajama, fineweb-edu), a hub id, or a path."""
    subset: str | None = None
    """Configuration name of a hub data set."""
    split: str | None = None
    """Split of a hub data set; ``builtin`` and local text know their parts and take none."""
    column: str | None = None
    """Column that holds the text; none means ``text``."""
    revision: str | None = None
    """Branch, tag or commit of a hub data set."""


class BlockAPConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Block-wise training of all parameters (EfficientQAT, section 3.2)."""

    enabled: bool = True
    """Train block by block; without it the blocks are only rounded."""
    train: tuple[Literal["weights", "scales", "zero_points", "norms"], ...] = (
        "weights",
        "scales",
        "zero_points",
        "norms",
    )
    """What is trained. A symmetric grid has no zero points to train: they are left out then."""
    sequences: int = 512
    """Training sequences."""
    val_sequences: int = 16
    """Validation sequences, from a part of the text that training does not see; 0 turns validation off."""
    sequence_length: int = 2048
    """Tokens per sequence."""
    batch_size: int = 4
    """Sequences per optimizer step."""
    epochs: int = 2
    """Passes over the training sequences, per block."""
    loss: Literal["mse", "token_relative_mse"] = "token_relative_mse"
    """``mse`` over all outputs, or each token's squared error divided by its target's mean square."""
    lr_scaling: LearningRateScaling = "relative"
    """``relative`` multiplies a learning rate by each linear's mean initial scale; ``absolute`` does not."""
    lr_weight: float | None = None
    """Learning rate of weights (when absolute, of norms too); none: 2e-5 (2 bits) or 1e-5 when absolute, 0.02
    when relative."""
    lr_quant: float | None = None
    """Learning rate of scales and zero points (when relative, of norms too, times their mean); none: 1e-4
    when absolute, 0.005 when relative."""
    lr_final_fraction: float = 0.05
    """The cosine schedule ends at this fraction of the initial learning rate."""
    weight_decay: float = 0.0
    """AdamW's decoupled decay, as a fraction of the learning rate; 0 turns it off."""
    grad_clip: float = 0.0
    """Largest gradient norm; 0 turns clipping off."""
    patience: int = 0
    """Stop a block after this many epochs without a better validation loss; 0 trains all epochs."""
    compute_dtype: ComputeDtype = "auto"
    """Arithmetic of the forward pass; auto: bfloat16 on a GPU, float32 on the CPU."""


class E2EQPConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """End-to-end training of quantization parameters (EfficientQAT, section 3.3)."""

    enabled: bool = True
    """Train the scales of the whole model after its blocks."""
    train: tuple[Literal["scales", "zero_points"], ...] = ("scales",)
    """What is trained; the integers are fixed."""
    sequences: int = 512
    """Training sequences."""
    val_sequences: int = 16
    """Validation sequences; 0 turns validation off and keeps the last state."""
    sequence_length: int = 2048
    """Tokens per sequence."""
    batch_size: int = 8
    """Sequences per optimizer step (effective, over all ranks and micro-batches)."""
    micro_batch_size: int = 1
    """Sequences per forward and backward pass."""
    epochs: int = 1
    """Passes over the training sequences."""
    loss: Literal["cross_entropy", "kl"] = "kl"
    """Next-token cross-entropy, or KL divergence to the full-precision model's prediction."""
    lr_scaling: LearningRateScaling = "relative"
    """As in ``block_ap``."""
    lr: float | None = None
    """Learning rate; none: 2e-5 (2 bits) or 1e-5 when absolute, 0.005 when relative."""
    lr_final_fraction: float = 0.0
    """The cosine schedule ends at this fraction of the initial learning rate."""
    warmup_fraction: float = 0.03
    """Part of the steps over which the learning rate rises from 0."""
    weight_decay: float = 0.0
    """AdamW's decoupled decay, as a fraction of the learning rate; 0 turns it off."""
    grad_clip: float = 0.3
    """Largest gradient norm; 0 turns clipping off."""
    patience: int = 0
    """Stop after this many epochs without a better validation loss; 0 trains all epochs."""
    activation_checkpointing: Literal["auto", "on", "off"] = "auto"
    """Recompute each block in the backward pass instead of keeping its activations, which takes a third more
    time; auto: where memory asks for it."""
    compute_dtype: ComputeDtype = "auto"
    """As in ``block_ap``."""


class EvaluationConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Perplexity on non-overlapping windows."""

    enabled: bool = True
    """Measure perplexity before, between and after."""
    data: DataConfig = DataConfig(source="wikitext2", split="test")
    sequence_length: int = 2048
    """Tokens per window (context)."""
    windows: int = 0
    """At most this many windows; 0 takes the whole text."""
    batch_size: int = 4
    """Windows per forward pass."""
    tasks: tuple[str, ...] = ()
    """Zero-shot tasks: winogrande, piqa, hellaswag, arc_easy, arc_challenge, or .jsonl files of questions."""
    task_limit: int = 0
    """At most this many questions of each task; 0 takes all."""


class ExportConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which packed checkpoints are written at the end."""

    formats: tuple[Literal["gptq_v2"], ...] = ("gptq_v2",)
    """Layouts of the packed checkpoint; none writes nothing."""
    shard_gib: float = 4.0
    """Largest safetensors file, GiB."""


class RuntimeConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where and how it runs. Nothing here is part of what is computed, except ``seed``."""

    device: str = "auto"
    """``auto`` (a GPU when there is one), ``cpu``, ``cuda`` or ``cuda:N``."""
    seed: int = 0
    """Decides which text is drawn and in which order it is seen."""
    threads: int = 0
    """CPU threads; 0 takes every core this process may use."""
    activation_store: Literal["auto", "device", "host", "disk"] = "auto"
    """Where the two activation streams live; auto: the fastest place that has room."""
    host_memory_gib: float = 0.0
    """Budget of host memory, GiB; 0: what is free now, less a reserve."""
    deterministic: bool = False
    """Bitwise reproducible kernels on a GPU, slower; the CPU always is."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile Block-AP's steps on a GPU (torch.compile); auto: where that saves more than its half minute."""
    checkpoint_minutes: float = 5.0
    """A kill loses at most this much training; 0 checkpoints between blocks only."""
    checkpoint_share: float = 0.02
    """Largest part of the time that may go into checkpoints; where the two disagree, this one wins."""
    streams: Literal["auto", "stored", "recomputed"] = "auto"
    """How a resumed run gets its activations back; auto: stored where that costs little time and disk."""


class RunConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One run, completely."""

    name: str = "custom"
    """Preset or file the run started from; a label, no part of what is computed."""
    description: str = ""
    model: ModelConfig = ModelConfig()
    grid: GridConfig = GridConfig()
    data: DataConfig = DataConfig()
    block_ap: BlockAPConfig = BlockAPConfig()
    e2e_qp: E2EQPConfig = E2EQPConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    export: ExportConfig = ExportConfig()
    runtime: RuntimeConfig = RuntimeConfig()


@functools.cache
def field_types(section: type[Section]) -> Mapping[str, Any]:
    """Type of each field of a section, by name."""
    return {field.name: field.type for field in msgspec.structs.fields(section)}


def is_section(kind: Any) -> bool:
    """Whether a field of this type is a section of its own."""
    return isinstance(kind, type) and issubclass(kind, Section)


def describe(kind: Any) -> str:
    """What a field of type ``kind`` takes, in words."""
    if isinstance(kind, types.UnionType):
        return " or ".join(describe(option) for option in typing.get_args(kind))
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(kind)))
    if typing.get_origin(kind) is tuple:
        return "a list, each " + describe(typing.get_args(kind)[0])
    if is_section(kind):
        return "a table"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "none"}
    return words.get(kind, str(kind))
