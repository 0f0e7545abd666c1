"""A model's structure without its weights, and where the decoder blocks are in it.

transformers builds the module tree from ``config.json``; while it does, every parameter is replaced by
one on the meta device, which has a shape and no memory. Buffers stay real: the rotary tables and
Gemma's embedding scale are computed when the model is built and are in no checkpoint, so on the meta
device they would be lost.

What this project cannot quantize is found here from the structure, before any weight is read.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from engine.architecture.refusals import already_quantized, encoder_decoder
from engine.architecture.unfit import CONV1D, ONLY_LINEAR, Unfit, first_unfit, is_norm, unfit
from engine.errors import PreflightError
from engine.models.foreign import foreign, memory_headroom

STRUCTURE_BYTES = 1 << 30
"""Room for rotary tables and masks, which are buffers of a structure."""


@contextmanager
def parameters_on_meta(keep: Callable[[Tensor], bool] | None = None) -> Iterator[None]:
    """Modules built inside have their parameters on the meta device, except those ``keep`` accepts."""
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        # A parameter that already is on the meta device is registered as it is: tied weights must
        # stay one object.
        if parameter is not None and not parameter.is_meta and not (keep is not None and keep(parameter)):
            parameter = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
        original(module, name, parameter)

    nn.Module.register_parameter = register  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The language model's own configuration; that of the text part where the model is multimodal."""
    return config.get_text_config()


def build_skeleton(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    *,
    trust_remote_code: bool = False,
    keep: Callable[[Tensor], bool] | None = None,
) -> PreTrainedModel:
    """The causal language model that transformers selects for ``config``, without weights, on the CPU."""
    # config.json never chooses the kernels: it could name some that have to be fetched, or that leave out
    # what a model needs, so both are always said.
    options: dict[str, Any] = {
        "dtype": dtype,
        "trust_remote_code": trust_remote_code,
        "attn_implementation": "sdpa",
        "experts_implementation": "eager",
    }
    if getattr(text_config(config), "attn_logit_softcapping", None) is not None:
        # Fused attention leaves the soft cap out; some releases of transformers select it all the same.
        options["attn_implementation"] = "eager"
    where = str(getattr(config, "name_or_path", "") or "config.json")
    doing = f"transformers cannot build a model of type {config.model_type!r}"
    with foreign(doing, where, fields=config.to_dict):
        try:
            model = _built(config, options, keep)
        except (ValueError, ImportError) as error:
            if "scaled_dot_product_attention" not in str(error):
                raise
            # How a class says that it has no fused attention.
            model = _built(config, {**options, "attn_implementation": "eager"}, keep)
        return model.eval().requires_grad_(False)


def _built(
    config: PreTrainedConfig, options: dict[str, Any], keep: Callable[[Tensor], bool] | None
) -> PreTrainedModel:
    try:
        with parameters_on_meta(keep), memory_headroom(_headroom(config)):
            return AutoModelForCausalLM.from_config(_ours(config), **options)
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        raise PreflightError(
            f"model type {config.model_type!r} has no causal language model in this version of transformers",
            where="config.json",
            hint="only decoder-only language models (AutoModelForCausalLM) can be quantized",
        ) from error
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "can't allocate memory" not in str(error):
            raise
        raise PreflightError(
            f"a model of type {config.model_type!r} with these sizes takes too much memory before it has a "
            "single weight",
            where="config.json",
            hint="check its numbers of positions and layers",
        ) from error


def _ours(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy that transformers may write dtype and attention choice into, which asks for nothing but logits
    in the form that the engine reads them, and has no token for padding that the embedding has no row for:
    -1 or the vocabulary's size is how many say that there is none, and nothing here is padded."""
    own = copy.deepcopy(config)
    for part in {id(one): one for one in (own, text_config(own))}.values():
        part.return_dict, part.output_hidden_states, part.output_attentions = True, False, False
        padding, rows = getattr(part, "pad_token_id", None), getattr(part, "vocab_size", None)
        if isinstance(padding, int) and isinstance(rows, int) and not 0 <= padding < rows:
            part.pad_token_id = None
    return own


def _headroom(config: PreTrainedConfig) -> int:
    """Bytes that may be reserved while the structure is built: each parameter for a moment, its buffers for
    good."""
    text = text_config(config)
    sizes = [getattr(text, name, 0) for name in ("vocab_size", "intermediate_size", "hidden_size")]
    vocab, intermediate, hidden = (size if isinstance(size, int) else 0 for size in sizes)
    return STRUCTURE_BYTES + 16 * hidden * max(vocab, 4 * intermediate, 4 * hidden)


def refuse_config(config: PreTrainedConfig, name: str) -> None:
    """Refuse what the configuration alone shows to be impossible. The plan has read the same file; a class of
    transformers may know more than its file says."""
    if getattr(config, "quantization_config", None):
        stored = config.quantization_config
        method = stored.get("quant_method") if isinstance(stored, dict) else None
        raise already_quantized(method or getattr(stored, "quant_method", ""), name)
    if getattr(config, "is_encoder_decoder", False):
        raise encoder_decoder(name)


def find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder blocks: of the lists as long as the model is deep, the heaviest."""
    depth = getattr(text_config(model.config), "num_hidden_layers", None)
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and isinstance(depth, int) and len(module) == depth > 0
    ]
    widths = [getattr(text_config(model.config), name, None) for name in ("hidden_size", "vocab_size")]
    if not lists or not all(isinstance(width, int) for width in widths):
        raise PreflightError(
            f"{type(model).__name__} has no list of {depth} decoder blocks",
            where="config.json",
            hint="only models built as a list of decoder blocks can be quantized block by block",
        )
    return max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))


def linear_names(block: nn.Module) -> tuple[str, ...]:
    """Names, relative to the block, of its linear layers in the order in which they were built."""
    return tuple(name for name, module in block.named_modules() if isinstance(module, nn.Linear))


def refuse_block(block: nn.Module, prefix: str) -> None:
    """Refuse a block that multiplies by weights which are not those of an ``nn.Linear``.

    Those of known families were refused by what their files show (:mod:`engine.architecture.refusals`); here
    the modules speak, which know more of a model that nobody knows.
    """
    found = []
    for module_name, module in block.named_modules():
        if isinstance(module, nn.Linear) or is_norm(f"{module_name}."):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim > 1:
                full = ".".join(part for part in (prefix, module_name, name) if part)
                # transformers' own, which GPT-2 and its like consist of.
                conv1d = type(module).__name__ == "Conv1D"
                found.append(Unfit(full, CONV1D) if conv1d else unfit(full, parameter.shape))
    if (first := first_unfit(found)) is not None:
        raise first.refusal()
    if not linear_names(block):
        raise PreflightError(
            f"{type(block).__name__} holds no nn.Linear, so there is nothing to quantize",
            where=prefix,
            hint=ONLY_LINEAR,
        )


def initial_vectors(config: PreTrainedConfig) -> tuple[dict[str, tuple[int, ...]], dict[str, Tensor]]:
    """Shapes of all parameters, and values of the vectors (norms, biases), of a freshly built model."""
    model = build_skeleton(config, torch.float32, keep=lambda parameter: parameter.ndim < 2)
    # named_parameters leaves out the second name of a tied weight, which is what a checkpoint does.
    parameters = dict(model.named_parameters())
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    vectors = {name: p.detach().clone() for name, p in parameters.items() if not p.is_meta}
    return shapes, vectors
