"""How each format's own loader reads an export: a function of the folder and tokens, which returns logits.

What a loader needs to be installed is in install.sh. Loaders that unpack the weights also hand those out, by
the names that the original has for them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Weights = dict[str, Tensor]
Loaded = tuple[Tensor, Weights]


def run(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(ids).logits.float()
    return logits


def linears(model: Any) -> Weights:
    """Weights of the blocks' plain linears."""
    return {
        f"{name}.weight": module.weight.detach()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in name
    }


def transformers(folder: Path, ids: Tensor, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", **options)


def gptqmodel(folder: Path, ids: Tensor) -> Loaded:
    from transformers import GPTQConfig

    # Left to itself it takes a kernel of PyTorch's at 4 bits, which has no whole rows and rounds more.
    plain = GPTQConfig(bits=4, backend="torch")
    return run(transformers(folder, ids, dtype=torch.float16, quantization_config=plain), ids), {}


def compressed_tensors(folder: Path, ids: Tensor) -> Loaded:
    from transformers import CompressedTensorsConfig

    config = CompressedTensorsConfig(dequantize=True)
    model = transformers(folder, ids, dtype=torch.float32, quantization_config=config)
    return run(model, ids), linears(model)


def auto_round(folder: Path, ids: Tensor) -> Loaded:
    model = transformers(folder, ids, dtype=torch.float16)
    assert not linears(model), "the blocks' linears were not replaced"
    return run(model, ids), {}


def awq(folder: Path, ids: Tensor) -> Loaded:
    from transformers import AwqConfig

    plain = AwqConfig(backend="torch_awq")
    return run(transformers(folder, ids, dtype=torch.float16, quantization_config=plain), ids), {}


def plain(folder: Path, ids: Tensor) -> Loaded:
    model = transformers(folder, ids, dtype=torch.float32)
    return run(model, ids), linears(model)


def mlx(folder: Path, ids: Tensor) -> Loaded:
    import mlx.core as mx
    import numpy as np
    from mlx_lm import load

    model, _ = load(str(folder))
    weights = {
        f"{name}.weight": torch.from_numpy(
            np.array(
                mx.dequantize(module.weight, module.scales, module.biases, module.group_size, module.bits)
            )
        )
        for name, module in model.named_modules()
        if hasattr(module, "scales")
    }
    logits = model(mx.array(ids.numpy())).astype(mx.float32)
    return torch.from_numpy(np.array(logits)), weights


LOADERS: dict[str, tuple[str, Callable[[Path, Tensor], Loaded]]] = {
    "gptq_v2": ("transformers with gptqmodel", gptqmodel),
    "compressed-tensors": ("transformers with compressed-tensors", compressed_tensors),
    "awq": ("transformers with gptqmodel", awq),
    "auto-round": ("transformers with auto-round", auto_round),
    "gptq": ("transformers with gptqmodel", gptqmodel),
    "mlx": ("mlx-lm", mlx),
    "hf": ("transformers", plain),
}
"""By format: the loader in words, and how it is asked."""
