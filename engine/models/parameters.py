"""Parameters and buffers out of a checkpoint: checked together before the first is read, and one by one."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from engine.architecture.refusals import missing_tensor, refuse_stored_type
from engine.errors import PreflightError
from engine.models.finite import finite
from engine.models.foreign import foreign
from engine.models.gguf import GGUFReader
from engine.models.names import TensorNames
from engine.models.random_weights import RandomReader
from engine.models.source import ModelSource
from engine.models.weights import TYPE_NAMES, NamedReader, SafetensorsReader, WeightReader


def named(model: PreTrainedModel, source: ModelSource) -> tuple[TensorNames, WeightReader]:
    """The names of a model's tensors in its checkpoint, and the checkpoint under the model's names."""
    if isinstance(source.weights, GGUFReader | RandomReader):
        return TensorNames(model, ()), source.weights
    stored = source.weights.names()
    if isinstance(source.weights, SafetensorsReader):
        stored += source.weights.unlisted()
    with foreign(f"the names of {type(model).__name__}'s tensors are not understood", source.name):
        names = TensorNames(model, stored)
    return names, NamedReader(source.weights, names.stored)


def check_checkpoint(
    model: nn.Module, names: TensorNames, weights: WeightReader, source: ModelSource
) -> None:
    """Every parameter is stored, in its shape and as a float, before the first one is read."""
    for name, parameter in model.named_parameters():
        if name in names.converted:
            raise PreflightError(
                f"tensor {name!r} is not stored, but made of others ({names.converted[name]})",
                where=source.name,
                hint="load the model with transformers and save it with "
                "model.save_pretrained(folder, save_original_format=False)",
            )
        if name not in weights:
            raise missing_tensor(name, source.name)
        stored, wanted = list(weights.shape(name)), list(parameter.shape)
        if stored != wanted:
            raise PreflightError(
                f"tensor {name!r} has shape {stored}, but config.json asks for {wanted}",
                where=weights.where(name),
                hint="check that config.json belongs to these weights",
            )
        refuse_stored_type(name, TYPE_NAMES[weights.dtype(name)], weights.where(name))
    if not isinstance(source.weights, GGUFReader):
        # What other checkpoints hold besides is sorted out in carried.py.
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
    if not finite(tensor):
        where = f"{weights.where(name)}: {name}"
        if finite(stored):
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
    """Move computed buffers to the device; take those that belong into a checkpoint from there.

    A buffer that is no part of the model's ``state_dict`` is not read, whatever the checkpoint holds.
    """
    for name, buffer in list(module.named_buffers(recurse=recurse)):
        owner, _, leaf = name.rpartition(".")
        holder = module.get_submodule(owner)
        kept = leaf not in holder._non_persistent_buffers_set and prefix + name in weights
        stored = weights.load(prefix + name) if kept else buffer
        if stored.shape != buffer.shape:
            raise PreflightError(
                f"tensor {prefix + name!r} has shape {list(stored.shape)}, "
                f"but config.json asks for {list(buffer.shape)}",
                where=weights.where(prefix + name),
                hint="check that config.json belongs to these weights",
            )
        holder._buffers[leaf] = stored.to(device=device, dtype=buffer.dtype)
