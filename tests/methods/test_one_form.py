"""Compiling what blocks do in a training of the whole network: one form serves all of them, whatever is
trained."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import pytest
import tiny
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from engine.config.grid import GridConfig
from engine.config.lr_qat import LRQATConfig
from engine.config.model import ModelConfig
from engine.methods.blockwise.rtn import round_to_nearest
from engine.methods.network.lr_qat import low_rank_linears
from engine.methods.network.norms import norm_groups
from engine.models.causal_lm import CausalLM, block_forward
from engine.models.source import ModelSource
from engine.quant.fake_linear import latent_linears

TYPE = torch.bfloat16
Family = Literal["llama2", "gemma3"]
KINDS: dict[Family, int] = {"llama2": 1, "gemma3": 2}
"""How many kinds of layers a model has: some look at all of a text, some at what is near."""
Stage = Literal["e2e_qp", "e2e_qat", "lr_qat"]


def block_of(lm: CausalLM, index: int, method: Stage) -> nn.Module:
    block = lm.load_block(index, dtype=TYPE)
    packed = round_to_nearest(lm.load_block(index), lm.linear_names(index), GridConfig(bits=3, group_size=32))
    if method == "e2e_qp":
        packed.install(block)
        return block
    named = latent_linears(block, packed)
    if method == "lr_qat":
        low_rank_linears(block, named, LRQATConfig(rank=4, downcast="integer", start="integers"), index)
    return block


@pytest.mark.parametrize("family", get_args(Family))
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("method", get_args(Stage))
def test_a_form_serves_all_blocks_of_a_kind(
    tmp_path: Path, family: Family, norms: bool, method: Stage
) -> None:
    folder = tiny.build(tmp_path / "model", family)
    lm = CausalLM(ModelSource.open(ModelConfig(source=str(folder))), torch.device("cpu"), TYPE)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(block_forward, backend=counter, dynamic=False)
    hidden = torch.randn(2, 8, lm.hidden_size, dtype=TYPE).requires_grad_(True)
    for index in range(lm.blocks):
        block = block_of(lm, index, method)
        if norms:
            assert norm_groups(block, 0.1, relative=True)
        arguments = lm.block_kwargs(index, 2, 8, TYPE, None)
        assert torch.isfinite(compiled(block, hidden, arguments)).all()
    assert lm.blocks > KINDS[family]
    assert counter.frame_count <= KINDS[family]
