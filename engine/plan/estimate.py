"""What estimates are made of: measured constants, and a configuration applied to a model.

The stages (:mod:`engine.plan.stages`) and the phases beside them (``phases.py``) count bytes and operations;
everything that is not such a count is in :data:`CONSTANTS` and :data:`GPU_RATES`, each entry with what it
stands for and where its value comes from. To calibrate, change a number here and nothing else.
"""

from __future__ import annotations

import msgspec

from engine.architecture.families import GPU_HEAD_VALUES, HEAD_VALUES, Architecture
from engine.config.dtypes import DTYPE_BYTES, resolved_dtype
from engine.config.run import RunConfig
from engine.config.stages import phases_of

MIB, GIB = 1 << 20, 1 << 30


def size_text(count: float) -> str:
    """Bytes for people."""
    if count < MIB:
        return f"{count / 1024:.0f} KiB"
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / MIB:.0f} MiB"


def time_text(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 0.1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


class Constants(msgspec.Struct, frozen=True, kw_only=True):
    """Measured quantities; memory in bytes, time in seconds."""

    # Memory of the process
    base_cpu: int = 450 * MIB
    """Python, torch (CPU build), transformers and datasets imported: 420 MiB, and a tokenizer."""
    base_cuda_build: int = 870 * MIB
    """The same with a CUDA build that computes on the CPU: its libraries are mapped all the same."""
    base_cuda_host: int = 2 * GIB
    """The same with a CUDA build, once the context exists: 1.5 to 2.5 GiB."""
    cuda_context: int = 512 * MIB
    """GPU memory outside torch's allocator: context, cuBLAS workspace, kernels."""
    math_workspace: int = 40 * MIB
    """Per-thread buffers of the CPU matrix library and heap that is never given back."""
    heap_overhead: float = 1.3
    """Resident over live bytes of CPU activations: a block's tensors are below malloc's mmap threshold and
    fragment its heap. Measured on SmolLM2 blocks, 1024 to 4096 tokens."""
    checkpoint_holes: float = 1.1
    """Recomputing blocks keeps one small tensor of each between large ones that come and go, which leaves
    holes in malloc's heap: this many times a block's widest temporaries, for every block. Measured on
    SmolLM2 with 256 to 2048 tokens; a GPU's allocator does not do this."""
    mmap_threshold: int = 32 * MIB
    """Larger CPU tensors bypass the heap, and leave no holes."""

    # Memory of training
    fake_quant_tensors: int = 5
    """float32 temporaries of the largest linear in the backward pass of the fake quantizer."""
    loss_tensors: int = 3
    """float32 hidden states that a block's loss keeps or makes: difference, square, gradient."""
    cpu_dropping_tensors: int = 4
    """More of them where the largest errors are left out: what remains, and pairs of error and place among
    which the largest are found."""
    gpu_dropping_tensors: int = 2
    """The same on a GPU, which needs no pairs."""
    search_tensors: int = 2
    """float32 tensors of as many numbers as the joint search may hold at once: torch's form has three of half
    as many, and the weights."""
    unpack_bytes: int = 16
    """Bytes a weight of the largest linear takes while it is unpacked (int32, uint8 and float steps)."""
    head_values: int = HEAD_VALUES
    """Most logits that are computed together."""
    gpu_head_values: int = GPU_HEAD_VALUES
    """The same on a GPU."""
    logits_cross_entropy: int = 4
    """Chunk-sized tensors at the peak of a cross-entropy step: logits, log-softmax, two gradients."""
    logits_kl: int = 6
    """The same for KL: teacher's log-probabilities, logits, log-softmax, three temporaries."""
    logits_fused: int = 3
    """Chunk-sized tensors of the arithmetic's type at the peak of a compiled step, whose kernels keep none in
    float32: logits and two gradients. Of four layers of a 7B model without it 2.61 GiB are planned, and 2.78
    were measured (benchmarks/README.md, "Every method on one shape")."""
    logits_fused_kl: int = 5
    """The same for KL: logits and log-probabilities of the teacher besides. Reckoned, not measured."""
    logits_evaluation: int = 2
    """Logits and log-softmax."""
    load_factor: float = 1.75
    """Bytes while a tensor is loaded and checked for NaN, relative to its float32 size."""

    # Time on the CPU, for one core with AVX-512
    cpu_flops: float = 100e9
    """Matrix products and everything around them that grows with tokens, float32 (SmolLM2 block: 95e9 to
    105e9 in training and inference)."""
    cpu_flops_no_avx512: float = 45e9
    cpu_step_per_weight: float = 22e-9
    """Fake quantization forward and backward and AdamW, for every weight and step."""
    cpu_unpack_per_weight: float = 10e-9
    """Unpacking a packed weight once."""
    cpu_search_per_weight: float = 5.5e-9
    """One range that is tried for one weight: 4.9e-9 to 6.0e-9 over 15, 30 and 64 of them."""
    cpu_search_error: float = 0.7e-9
    """One weight with one pair of scale and zero point: 0.5e-9 to 0.9e-9 at 2 to 8 bits."""
    cpu_drop_per_number: float = 12e-9
    """Finding the largest errors, for every number of a block's output: 5e-9 to 16e-9, on one core whatever
    there are."""
    cpu_column: float = 30e-6
    """GPTQ's operations on one column, however short."""
    cpu_round_per_weight: float = 60e-9
    """GPTQ's operations on a weight beside products: on its column, and to weigh it against plain rounding
    (SmolLM2's matrices: 55e-9 to 65e-9)."""
    parallel_efficiency: float = 0.9
    """Gain of each core after the first."""

    # Time on a GPU (one H200, torch 2.11)
    gpu_step_bytes: float = 400.0
    """Memory traffic of fake quantization and AdamW, for every weight and step, eager: of 27.5 ms for a
    7B-shaped block at 2 x 2048, 20 ms are left over by matrix products and attention."""
    gpu_compiled_step_bytes: float = 85.0
    """The same, compiled: of 11.4 ms for that block 4.2 are left over."""
    gpu_compiled_launch: float = 5.7e-3
    """Kernel launches of one compiled step, while which the GPU works: the floor for small models."""
    gpu_recorded_step_bytes: float = 95.0
    """One kernel a linear, recorded: of 14.3 ms for that block on an H100 6.9 are left over."""
    gpu_recorded_launch: float = 1.3e-3
    """One recorded step of a small block (SmolLM2 on an H100)."""
    gpu_fast_step_bytes: float = 30.0
    """Recorded and compiled: the kernel moves 28, the gradients' norms read 2."""
    gpu_fast_number_bytes: float = 240.0
    """The same between the products, for every number of the hidden states: of 9.9 ms for a 7B block on an
    H200 2.6 are left over, of which 1.5 are the kernel's and the norms'; of 37.9 for a 70B block 9, of which
    6.4."""
    gpu_shared_step_bytes: float = 28.0
    """What of it several GPUs share out: AdamW and the quantizer."""
    gpu_pack_bytes: float = 4.3
    """Making integers of a weight's latent for the other GPUs. Reckoned, not measured."""
    gpu_fast_launch: float = 0.8e-3
    """One recorded and compiled step of a small block (SmolLM2 on an H100)."""
    gpu_recorded_gap: float = 0.9e-3
    """Between the kernels of one block, forward and backward, in a recorded step of the whole network: of 61
    ms for 8 sequences of 1024 tokens through SmolLM2's 30 blocks on an H100, 27 are left over."""
    gpu_fast_gap: float = 0.6e-3
    """The same, compiled: of 34.0 ms on an H200 17 are left over."""
    gpu_packed_gap: float = 0.39e-3
    """What of both falls away where no pass unpacks integers, because the step before has made the weights:
    one such pass and its step take 23.9 ms, compiled (SmolLM2, 8 sequences of 1024 tokens, H200), of which
    6.2 are left over."""
    gpu_logit_bytes: tuple[float, float] = (40.0, 110.0)
    """Memory traffic of a logit, forward and backward, for cross-entropy and for KL: of 384 and 256 steps of
    E2E-QAT on SmolLM2 10.7 ms each are left over on an H200, 13.7 on an H100 (KL; cross-entropy reckoned)."""
    gpu_kernel_logit_bytes: tuple[float, float] = (6.0, 10.0)
    """The same by the kernels of recorded steps, which read logits twice and write their gradient: a step of
    60 ms takes 46 (SmolLM2, H200)."""
    gpu_fused_logit_bytes: tuple[float, float] = (12.0, 22.0)
    """The same, compiled. Reckoned, not measured by itself."""
    gpu_compile_network: float = 14.0
    """Compiling a network's steps, where nothing of it lies in a cache (SmolLM2, H100)."""
    gpu_compile: float = 30.0
    """Compiling a block's step, once a run."""
    gpu_compile_passage: float = 6.0
    """Compiling one form of a block or head for passages: 3 of them took at most 15 s."""
    gpu_unpack_bytes: float = 40.0
    """Memory traffic of unpacking a packed weight once, eager."""
    gpu_kernel_unpack_bytes: float = 4.0
    """The same by one kernel: 22 us a matrix of a 7B block on an H100."""
    gpu_block_launch: float = 6e-3
    """Kernel launches of one block, forward and backward, eager: the floor for small models."""
    gpu_passage_bytes: float = 280.0
    """Memory traffic of a forward pass through a block beside its matrix products, for every hidden number
    (tokens times hidden size), eager: of 1.97 ms for 2048 tokens of a 7B block on an H100 0.8 are left."""
    gpu_compiled_passage_bytes: float = 72.0
    """The same, compiled: of 5.3 ms for 2048 tokens of a 70B block 0.4 are left. Forward and backward
    together are two and a half times that: of 34.5 ms for 16384 tokens of a 7B block 4 are left."""
    gpu_writing_launch: float = 0.08e-3
    """Of one block for a token of text that the model writes, by recorded steps: 2080 documents of 256 tokens
    take SmolLM2 3.5 s on an H100, 4160 take 5.9."""
    gpu_generating_launch: float = 2.4e-3
    """The same by transformers' own ``generate``, which is launches: 72 to 90 ms a step there."""
    gpu_writing_traffic: float = 2.0
    """Memory traffic of a step of that, for every byte that keys and values take in the end: 2.4 s more for
    the second 2080 documents."""
    gpu_search_bytes: float = 32.0
    """Memory traffic of one candidate range for one weight."""
    gpu_search_error_bytes: float = 50.0
    """Memory traffic of one weight with one pair of scale and zero point, in torch's form: six operations of
    8 bytes. Reckoned, not measured, like the two below."""
    gpu_kernel_search_error: float = 0.5e-12
    """Seconds of the same by one kernel: seven operations of float32, at half of what a H100 does."""
    gpu_column: float = 80e-6
    """Launches of GPTQ's operations on one column, and of a part of the search for its group's range.
    Reckoned, not measured, like the next."""
    gpu_float32: float = 15.0
    """How many times as long as in bfloat16 a matrix product takes in float32."""
    gpu_drop_bytes: float = 60.0
    """Memory traffic of leaving out the largest errors, for every number of a block's output."""

    # Time of either
    prepare: float = 12.0
    """Importing torch and transformers, tokenizing."""
    block_load: float = 0.05
    """Opening and converting a block, beside its bytes."""
    read_rate: float = 500e6
    """Bytes a second at which stored weights are read and converted."""

    # Checkpoints: bytes a second, except where it says otherwise. To be measured (benchmarks/checkpoints.py)
    copy_rate_cuda: float = 3e9
    """From GPU memory into fresh host memory that is not page-locked."""
    copy_rate_cpu: float = 5e9
    """From memory to memory: 3e9 to 8e9 on two cores."""
    write_rate: float = 500e6
    """SHA-256 on one core (1.8e9), then a file, then the disk: 0.2e9 to 0.7e9 on a virtual machine of two
    cores that train, more on a local SSD."""
    verify_rate: float = 1e9
    """Reading and SHA-256."""
    sync: float = 2e-3
    """Seconds until one more file and its name are durable."""

    # Disk: bytes
    run_files: int = 10 << 10
    """config.toml, run.json, status.json and the plan in the event log."""
    generation_base: int = 3 << 10
    """A generation file without its blocks: what it depends on, results, the position in a training."""
    generation_per_block: int = 310
    """Two entries and three losses."""
    events_per_block: int = 900
    """Begin, end and checkpoints in the event log."""
    events_rate: float = 2000.0
    """Of the event log, a second: metrics four times, memory once."""
    export_texts: int = 7 << 10
    """Model card and configurations."""
    tokenizer_entry: int = 75
    """Tokenizer files, for each token of the vocabulary, where they cannot be seen: tokenizer.json holds
    every token and every merge (SmolLM2 72)."""


CONSTANTS = Constants()

GPU_RATES: dict[str, tuple[float, float]] = {
    # name contains: (bf16 operations a second that matrix products reach, bytes a second that kernels reach)
    "H200": (740e12, 4.0e12),
    "H100": (740e12, 2.8e12),
    "B200": (1500e12, 6.5e12),
    "A100": (250e12, 1.6e12),
    "L40": (180e12, 0.7e12),
    "RTX 4090": (150e12, 0.85e12),
    "RTX 3090": (65e12, 0.8e12),
    "A10": (70e12, 0.5e12),
    "L4": (60e12, 0.25e12),
    "V100": (90e12, 0.75e12),
    "T4": (40e12, 0.25e12),
}
"""H200 measured; the others are about 80 % of the data sheet."""
UNKNOWN_GPU = (60e12, 0.5e12)


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """A configuration applied to a model, on the CPU or a GPU."""

    arch: Architecture
    config: RunConfig
    cuda: bool
    windows: int
    """Evaluation windows."""
    compiled: frozenset[str] = frozenset()
    """Stages whose training is compiled, and keeps less for its backward pass."""
    open_micro_batches: frozenset[str] = frozenset()
    """Stages of the whole network that leave to the plan how many sequences pass at a time; ``config`` says
    one, until that is settled."""
    short_of_memory: bool = True
    """Where that is left to the plan, a training of the whole network recomputes activations."""
    whole: RunConfig | None = None
    """Of a run on several GPUs, of which ``config`` is the share of one (:mod:`engine.plan.ranks`)."""
    adding: float = 0.0
    """Seconds in which several GPUs add up a byte."""
    documents: int | None = None
    """Of the model's own text that are written at a time; none where nobody knows what memory there is."""

    @property
    def asked(self) -> RunConfig:
        """The configuration of the run, of all GPUs."""
        return self.whole or self.config

    def bytes_of(self, dtype: str) -> int:
        """Bytes of a number in a configured compute dtype."""
        return DTYPE_BYTES[resolved_dtype(dtype, cuda=self.cuda)]

    @property
    def model_bytes(self) -> int:
        """Bytes of a number outside the training of blocks."""
        return self.bytes_of("auto")

    def evaluation_bytes(self) -> int:
        """Hidden states of all evaluation windows."""
        section = self.config.evaluation
        return self.windows * section.sequence_length * self.arch.hidden * self.model_bytes

    def phases(self) -> list[str]:
        """Names of the phases, in order."""
        return phases_of(self.config)
