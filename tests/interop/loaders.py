"""How each format's own loader reads an export: a function of the folder and tokens, which returns logits.

What a loader needs to be installed is in install.sh. Loaders that unpack the weights also hand those out, by
the names that the original has for them.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

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


def computing_in(model: Any, dtype: torch.dtype) -> Any:
    """The model with its numbers in ``dtype``; its integers stay. transformers refuses that of GPTQ files."""
    return torch.nn.Module.to(model, dtype)


def transformers(folder: Path, ids: Tensor, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", **options)


def gptqmodel(folder: Path, ids: Tensor, dtype: torch.dtype = torch.float16) -> Loaded:
    from transformers import GPTQConfig

    # Left to itself it takes a kernel of PyTorch's at 4 bits, which has no whole rows and rounds more.
    plain = GPTQConfig(bits=4, backend="torch")
    model = transformers(folder, ids, dtype=torch.float16, quantization_config=plain)
    return run(computing_in(model, dtype), ids), {}


def compressed_tensors(folder: Path, ids: Tensor) -> Loaded:
    from transformers import CompressedTensorsConfig

    config = CompressedTensorsConfig(dequantize=True)
    model = transformers(folder, ids, dtype=torch.float32, quantization_config=config)
    return run(model, ids), linears(model)


def auto_round(folder: Path, ids: Tensor, dtype: torch.dtype = torch.float16) -> Loaded:
    model = transformers(folder, ids, dtype=torch.float16)
    assert not linears(model), "the blocks' linears were not replaced"
    return run(computing_in(model, dtype), ids), {}


def awq(folder: Path, ids: Tensor, dtype: torch.dtype = torch.float16) -> Loaded:
    from transformers import AwqConfig

    plain = AwqConfig(backend="torch_awq")
    model = transformers(folder, ids, dtype=torch.float16, quantization_config=plain)
    if dtype != torch.float16:
        # Its kernel multiplies in 16 bits whatever it is handed, for minutes on a CPU: the same weights as it
        # unpacks them, by torch.
        for name, module in [*model.named_modules()]:
            if hasattr(module, "_dequantize_weight_for_inference"):
                model.set_submodule(name, unpacked_by_itself(module))
    return run(computing_in(model, dtype), ids), {}


def unpacked_by_itself(module: Any) -> torch.nn.Linear:
    """One of gptqmodel's linears as a plain one, with the weight that it makes for a product."""
    some = torch.zeros(1, module.in_features, dtype=torch.float16)
    weight_IO = module._dequantize_weight_for_inference(some, dtype=torch.float16)
    plain = torch.nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
    plain.weight = torch.nn.Parameter(weight_IO.T.contiguous(), requires_grad=False)
    if module.bias is not None:
        plain.bias = torch.nn.Parameter(module.bias, requires_grad=False)
    return plain


def plain(folder: Path, ids: Tensor) -> Loaded:
    model = transformers(folder, ids, dtype=torch.float32)
    return run(model, ids), linears(model)


def mlx(folder: Path, ids: Tensor, dtype: torch.dtype | None = None) -> Loaded:
    import mlx.core as mx
    import mlx.nn as nn
    import numpy as np
    from mlx_lm import load
    from mlx_lm.utils import dequantize_model

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
    if dtype is not None:
        model = dequantize_model(model)  # the same weights, unpacked by mlx
        model.set_dtype(getattr(mx, str(dtype).removeprefix("torch.")))
        for _, module in model.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                # Seen as before, and in memory column by column, which its library reads in less time.
                module.weight = mx.contiguous(module.weight.T).T
    logits = model(mx.array(ids.numpy())).astype(mx.float32)
    return torch.from_numpy(np.array(logits)), weights


def onnx(folder: Path, ids: Tensor) -> Loaded:
    import numpy as np
    import onnxruntime

    model = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    (padded,) = model.run(["logits"], _left_padded(ids))
    inputs = {"input_ids": ids.numpy(), "attention_mask": np.ones_like(ids.numpy())}
    (logits,) = model.run(["logits"], inputs)
    # Texts of several lengths are padded on the left for generation, and predict the same.
    assert np.abs(padded[:, PADDING:] - logits).max() < 1e-3 * logits.std()
    return torch.from_numpy(logits), {}


PADDING = 5


def _left_padded(ids: Tensor) -> dict[str, Any]:
    mask = torch.nn.functional.pad(torch.ones_like(ids), (PADDING, 0))
    return {
        "input_ids": torch.nn.functional.pad(ids, (PADDING, 0)).numpy(),
        "attention_mask": mask.numpy(),
    }


class Loader(NamedTuple):
    """What loads a format."""

    packages: tuple[str, ...]
    """Whose releases a result is of, the one that matters last."""
    load: Callable[..., Loaded]
    """Of a folder and tokens; where ``sets_dtype`` says so, also of what to compute in."""

    sets_dtype: bool = False
    """It computes in 16 bits unless it is told; in those, a CPU takes minutes where a model is no toy."""
    windows: int | None = None
    """So many windows of text are enough where a model is no toy; none for all of them."""

    @property
    def words(self) -> str:
        """``transformers 5.23.0, gptqmodel 7.7.0``."""
        return ", ".join(f"{name} {version(name)}" for name in self.packages)


LOADERS = {
    "gptq_v2": Loader(("transformers", "gptqmodel"), gptqmodel, sets_dtype=True),
    "compressed-tensors": Loader(("transformers", "compressed-tensors"), compressed_tensors),
    "awq": Loader(("transformers", "gptqmodel"), awq, sets_dtype=True),
    "auto-round": Loader(("transformers", "auto-round"), auto_round, sets_dtype=True),
    "gptq": Loader(("transformers", "gptqmodel"), gptqmodel, sets_dtype=True),
    # Its products on a CPU have no library behind them: 2 GFLOP/s here, 5 tokens a second of a 135M model.
    "mlx": Loader(("mlx", "mlx-lm"), mlx, sets_dtype=True, windows=1),
    "hf": Loader(("transformers",), plain),
    "onnx": Loader(("onnxruntime",), onnx),
}
"""By format."""
