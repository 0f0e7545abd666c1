"""A training of the whole transformers model as one would write it by hand: autograd, torch's own AdamW."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from engine.config.e2e_qat import E2EQATConfig
from engine.config.lr_qat import LRQATConfig
from engine.data.sampler import BatchSampler
from engine.quant.slots import slot


def whole_model(folder: Path, linears: Mapping[str, nn.Module]) -> Any:
    """The model at ``folder``, of which nothing is trained but these modules: ``0.mlp.up_proj`` and so on."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)
    for name, linear in linears.items():
        index, _, inner = name.partition(".")
        slot(model, f"model.layers.{index}.{inner}").set(linear)
    return model


def norms(model: Any) -> dict[str, nn.Parameter]:
    """Those of a Llama's blocks, to be trained: ``0.input_layernorm.weight`` and so on."""
    found = {
        f"{index}.{name}.weight": getattr(layer, name).weight.requires_grad_(True)
        for index, layer in enumerate(model.model.layers)
        for name in ("input_layernorm", "post_attention_layernorm")
    }
    assert found
    return found


def train(
    model: Any,
    folder: Path,
    config: E2EQATConfig | LRQATConfig,
    groups: list[dict[str, Any]],
    ids_NT: Tensor,
    *,
    schedule: str,
) -> list[float]:
    """Train ``groups`` (of AdamW, with their rates) of ``model``; the norm of each step's gradient."""
    teacher = AutoModelForCausalLM.from_pretrained(folder).eval()
    rates = [group["lr"] for group in groups]
    trained = [parameter for group in groups for parameter in group["params"]]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0, fused=False)
    sampler = BatchSampler(len(ids_NT), config.batch_size, config.epochs, seed=5)
    warmup, gradients = math.ceil(config.warmup_fraction * sampler.steps), []
    for _, step, rows in sampler:
        ids_BT = ids_NT[rows]
        logits_BTV, length = model(ids_BT).logits, ids_BT.shape[1]
        said = functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())
        if config.loss == "kl":
            with torch.no_grad():
                target = teacher(ids_BT).logits.log_softmax(-1)
            value = (target.exp() * (target - logits_BTV.log_softmax(-1))).sum(-1).mean()
            value = value + config.text_weight * said * (length - 1) / length
        else:
            value = said
        optimizer.zero_grad()
        value.backward()
        norm = torch.stack([p.grad.square().sum() for p in trained if p.grad is not None]).sum().sqrt()
        gradients.append(norm.item())
        if config.grad_clip and norm > config.grad_clip:
            for parameter in trained:
                if parameter.grad is not None:
                    parameter.grad *= config.grad_clip / norm
        left = (sampler.steps - step) / (sampler.steps - warmup)
        if schedule == "cosine":
            left = 0.5 * (1 + math.cos(math.pi * (1 - left)))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * ((step + 1) / warmup if step < warmup else left)
        optimizer.step()
    return gradients


def assert_same_but_for_few(one: Tensor, other: Tensor, tolerance: float, *, few: float = 0.02) -> None:
    """Adam divides a gradient by its own size: next to nothing, rounding decides its direction."""
    off = ~torch.isclose(one, other, rtol=1e-3, atol=tolerance)
    assert off.float().mean() < few, f"{off.sum()} of {off.numel()} differ"
