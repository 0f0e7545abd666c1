"""Models, machines and settings that plans are made of in the tests."""

from __future__ import annotations

from typing import Any

import msgspec

from engine.config.block_ap import BlockAPConfig
from engine.config.data import DataConfig
from engine.config.e2e_qp import E2EQPConfig
from engine.config.grid import GridConfig
from engine.config.model import ModelConfig
from engine.config.run import RunConfig
from engine.plan.estimate import GIB
from engine.plan.machine import Machine

LLAMA_2 = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
}
SHAPES: dict[str, dict[str, Any]] = {
    "135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
        "vocab_size": 49152,
    },
    "7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    "70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}
LLAMA_2_7B = LLAMA_2 | SHAPES["7b"]
H200 = Machine(
    gpu_name="NVIDIA H200",
    gpu_free=139 * GIB,
    gpu_total=141 * GIB,
    host_free=500 * GIB,
    disk_free=2000 * GIB,
    cpus=16,
)
PAPER = RunConfig(
    grid=GridConfig(bits=2, group_size=64, range="minmax"),
    data=DataConfig(source="redpajama"),
    block_ap=BlockAPConfig(sequences=4096, val_sequences=64, sequence_length=2048, batch_size=2),
    e2e_qp=E2EQPConfig(
        sequences=4096, val_sequences=0, sequence_length=4096, micro_batch_size=1, loss="cross_entropy"
    ),
)


def machine(**changes: Any) -> Machine:
    """The H200, changed."""
    return msgspec.structs.replace(H200, **changes)


def paper(source: str, **changes: Any) -> RunConfig:
    """The published recipe for the model at ``source``."""
    return msgspec.structs.replace(PAPER, model=ModelConfig(source=source), **changes)
