"""Plain greedy decoding, against which faster ways to the same text are held."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from engine.evaluation.continuation import end_tokens
from engine.models.causal_lm import CausalLM


def plain_greedy(lm: CausalLM, block_for: Callable[[int], nn.Module], ids: list[int], new: int) -> list[int]:
    """The most likely token, again and again, the whole text through every block each time."""
    blocks = [block_for(index) for index in range(lm.blocks)]
    ids, begin = list(ids), len(ids)
    with torch.no_grad():
        while len(ids) < begin + new and (len(ids) == begin or ids[-1] not in end_tokens(lm)):
            hidden = lm.embed(torch.tensor([ids]))
            for index, block in enumerate(blocks):
                hidden = lm.run_block(block, index, hidden)
            ids.append(int(lm.head(hidden)[0, -1].argmax()))
    return ids[begin:]
