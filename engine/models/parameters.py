"""Parameters and buffers out of a checkpoint: checked together before the first is read, and one by one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engine.errors import PreflightError
from engine.models.gguf import GGUFReader
from engine.models.source import ModelSource
from engine.models.weights import WeightReader


def check_checkpoint(model: nn.Module, weights: WeightReader, source: ModelSource) -> None:
    """Every parameter is stored, in its shape and as a float, before the first one is read."""
    for name, parameter in model.named_parameters():
        if name not in weights:
            raise PreflightError(
                f"tensor {name!r} is missing from the checkpoint",
                where=source.name,
                hint="download the model again, or check that config.json belongs to these weights",
            )
        stored, wanted = list(weights.shape(name)), list(parameter.shape)
        if stored != wanted:
            raise PreflightError(
                f"tensor {name!r} has shape {stored}, but config.json asks for {wanted}",
                where=weights.where(name),
                hint="check that config.json belongs to these weights",
            )
        dtype = weights.dtype(name)
        if not dtype.is_floating_point or dtype.itemsize < 2:
            raise PreflightError(
                f"tensor {name!r} is stored as {dtype}: the model is already quantized",
                where=weights.where(name),
                hint="start from the original 16-bit model",
            )
    if not isinstance(source.weights, GGUFReader):
        # Others carry harmless extras: rotary tables, a vision tower, heads for other purposes.
        return
    if unused := source.weights.leftover(name for name, _ in model.named_parameters()):
        raise PreflightError(
            f"tensor {unused[0]!r} has no place in the model that its configuration describes",
            where=source.name,
            hint="use the model's safetensors checkpoint",
        )


def load_parameter(
    weights: WeightReader, name: str, shape: torch.Size, dtype: torch.dtype, device: torch.device
) -> nn.Parameter:
    """A stored tensor as a parameter that is not trained.

    Raises:
        PreflightError: for numbers that are none, or that ``dtype`` cannot hold.
    """
    stored = weights.load(name)
    tensor = stored.to(device=device, dtype=dtype)
    if not _finite(tensor):
        where = f"{weights.where(name)}: {name}"
        if _finite(stored):
            raise PreflightError(
                f"weights up to {stored.abs().max().item():.3g} do not fit into {dtype}",
                where=where,
                hint="use bfloat16 or float32",
            )
        raise PreflightError(
            "the weights contain NaN or infinity", where=where, hint="download the model again"
        )
    return nn.Parameter(tensor.reshape(shape), requires_grad=False)


def load_buffers(
    weights: WeightReader, module: nn.Module, prefix: str, device: torch.device, *, recurse: bool = True
) -> None:
    """Move computed buffers to the device; take those that a checkpoint stores from there."""
    for name, buffer in list(module.named_buffers(recurse=recurse)):
        stored = weights.load(prefix + name) if prefix + name in weights else buffer
        if stored.shape != buffer.shape:
            raise PreflightError(
                f"tensor {prefix + name!r} has shape {list(stored.shape)}, "
                f"but config.json asks for {list(buffer.shape)}",
                where=weights.where(prefix + name),
                hint="check that config.json belongs to these weights",
            )
        owner, _, leaf = name.rpartition(".")
        module.get_submodule(owner)._buffers[leaf] = stored.to(device=device, dtype=buffer.dtype)


def _finite(tensor: Tensor) -> bool:
    """In parts: the answer for every element of a large embedding at once would be large as well."""
    return all(bool(part.isfinite().all()) for part in tensor.reshape(-1).split(1 << 24))
