"""Many documents sampled at once, in memory that does not grow, each step one recorded graph.

``generate`` of transformers launches some thousand small kernels a token and copies all keys and values for
each: of a model of 135M weights that takes 90 ms a token on an H100, whatever the number of documents. Here
keys and values have their places from the beginning, a step attends to the first of them (a multiple of
:data:`PIECE`) under a mask, and on a GPU is recorded once for each such length.

The layers are the model's own, and so are their rotary tables and norms. Only the attention of one token is
ours, because several query heads that share keys would otherwise have those copied for each: they stand as
rows of one query instead (grouped queries, arXiv 2305.13245).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticLayer

from engine.gpu.recorded import Graphed
from engine.models.skeleton import text_config

if TYPE_CHECKING:
    from collections.abc import Iterator

PIECE = 64
"""A step attends to a multiple of so many tokens."""
ATTENTION, THEIRS = "eqat_one_token", "sdpa"
"""Names of our attention and of torch's among those of transformers."""
TOLD = 16
"""After so many tokens the caller hears how far it is, for which the GPU is waited for."""
TRIED = 8
"""Documents of which logits are compared with the model's plain forward: the first ones, and those at
:data:`LATER`. What is wrong about positions, masks or places hardly shows, or not at all, at the first."""
LATER = PIECE + 1
"""Where a step of the second length is a recorded one."""
CLOSE = 0.05
"""How far these may lie from it, of the largest of them, in most documents: 16-bit sums in another order."""


def one_token(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of one token: query ``[N, heads, 1, D]``, keys and values ``[N, kv_heads, L, D]``, bool mask
    ``[1, 1, 1, L]``; ``[N, 1, heads, D]``."""
    documents, heads, tokens, size = query.shape
    if tokens != 1 or others.get("softcap") is not None or others.get("position_bias") is not None:
        raise ValueError("attention of one token, and of nothing but keys and values")
    rows = query.reshape(documents, key.shape[1], heads // key.shape[1], size)
    # Two products, which a GPU does faster for so few rows than torch's own function does, and whose kernels
    # are loaded already.
    weights = torch.matmul(rows, key.transpose(-1, -2)).float()
    weights = weights * (size**-0.5 if scaling is None else scaling)
    if attention_mask is not None:
        weights = weights.masked_fill(~attention_mask, float("-inf"))
    found = torch.matmul(weights.softmax(-1).to(value.dtype), value)
    return found.reshape(documents, 1, heads, value.shape[-1]), None


class _Places(StaticLayer):  # type: ignore[misc]  # transformers is not typed
    """Keys and values of a layer, of which the first ``seen`` are attended to."""

    seen = PIECE

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = super().update(*args, **kwargs)
        return keys[:, :, : self.seen], values[:, :, : self.seen]


class Writer:
    """Documents while they are written. The model must be one that :func:`writes` accepts."""

    def __init__(self, model: Any, starts_NS: Tensor, tokens: int) -> None:
        """So many ``tokens`` come behind each of ``starts_NS``, int64 on the model's device."""
        self.model, (count, given) = model, starts_NS.shape
        self.device = starts_NS.device
        self.text_NL = torch.zeros((count, given + tokens), dtype=torch.int64, device=self.device)
        self.text_NL[:, :given] = starts_NS
        self.given = given
        most = -(-self.text_NL.shape[1] // PIECE) * PIECE
        layers = len(DynamicCache(config=text_config(model.config)).layers)
        self.places = [_Places(most) for _ in range(layers)]
        self.cache = Cache(layers=self.places)
        self.token_N1 = self.text_NL[:, :1].clone()
        self.place_1 = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.columns_L = torch.arange(most, device=self.device)

    def step(self) -> tuple[Tensor, Tensor]:
        """The logits ``[N, V]`` behind :attr:`token_N1`, and a token int64 ``[N, 1]`` drawn from them."""
        seen = self.places[0].seen
        logits_NV = self.model(
            input_ids=self.token_N1,
            position_ids=self.place_1[None].expand(len(self.token_N1), 1),
            attention_mask=(self.columns_L[:seen] <= self.place_1)[None, None, None],
            past_key_values=self.cache,
            use_cache=True,
        ).logits[:, -1]
        self.place_1 += 1
        # The largest of logits less the logarithms of exponential noise is a sample of their softmax
        # (Gumbel's trick).
        noise_NV = torch.empty_like(logits_NV, dtype=torch.float32).exponential_().log_()
        return logits_NV, (logits_NV.float() - noise_NV).argmax(-1, keepdim=True)

    def __call__(self, told: Callable[[int], None] = lambda tokens: None) -> Tensor | None:
        """The documents int64 ``[N, L]``; none where the model's plain forward computes something else.
        ``told`` hears how many tokens of each stand there, and may raise."""
        recorded = Graphed(self.step, self.device, on_failure=lambda why: None)
        compared = self.given - 1, min(max(self.given, LATER), self.text_NL.shape[1] - 2)
        with _attention(self.model), torch.no_grad():
            for place in range(self.text_NL.shape[1] - 1):
                if place % PIECE == 0:
                    recorded.forget()
                    for layer in self.places:
                        layer.seen = place + PIECE
                    logits_NV, drawn_N1 = self.step()  # plainly: it chooses algorithms
                else:
                    logits_NV, drawn_N1 = recorded()
                if place in compared and not self._agrees(logits_NV, place):
                    return None
                if place + 1 >= self.given:
                    self.text_NL[:, place + 1 : place + 2] = drawn_N1
                self.token_N1.copy_(self.text_NL[:, place + 1 : place + 2])
                if place % TOLD == 0:
                    if self.device.type == "cuda":
                        torch.cuda.current_stream(self.device).synchronize()
                    told(place + 2)
        recorded.forget()
        told(self.text_NL.shape[1])
        return self.text_NL

    def _agrees(self, logits_NV: Tensor, place: int) -> bool:
        with _attention(self.model, THEIRS):
            plain_NV = self.model(input_ids=self.text_NL[:TRIED, : place + 1], use_cache=False).logits[:, -1]
        worst_N = (logits_NV[:TRIED].float() - plain_NV.float()).abs().amax(-1)
        # Where the two differ all documents do; a router of experts may have turned over in some.
        return bool(worst_N.median() <= CLOSE * plain_NV.float().abs().amax())


def writes(model: Any, tokens: int) -> bool:
    """Whether documents of so many tokens of this model can be written so: its layers are attention to all of
    them, by torch's own function."""
    config = text_config(model.config)
    if getattr(config, "_attn_implementation", None) != THEIRS:
        return False
    layers = DynamicCache(config=config).layers
    windows = [getattr(layer, "sliding_window", None) or tokens for layer in layers]
    plain = all(isinstance(layer, DynamicLayer) for layer in layers)
    return bool(layers) and plain and min(windows) >= tokens


@contextmanager
def _attention(model: Any, name: str = ATTENTION) -> Iterator[None]:
    """The model with attention of this name; as before afterwards. Blocks that were copied have a
    configuration of their own."""
    AttentionInterface.register(ATTENTION, one_token)
    found: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = {id(config): config for config in found if hasattr(config, "_attn_implementation")}
    before = {key: config._attn_implementation for key, config in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation = name
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]
