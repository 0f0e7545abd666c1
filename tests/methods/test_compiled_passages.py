"""Blocks compiled for the streams that pass through them, and for perplexity: the same numbers."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tiny
import torch
from quiet import Heard
from torch import Tensor, nn

from engine.config.grid import GridConfig
from engine.config.model import ModelConfig
from engine.data.activations import make_store
from engine.evaluation.perplexity import perplexity
from engine.methods.advance import Portions, advance
from engine.methods.blockwise.rtn import round_to_nearest
from engine.models.causal_lm import CausalLM
from engine.models.source import ModelSource

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LENGTH = 24

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a compiler")


@pytest.fixture(params=["llama2", "gemma2"])
def lm(request: pytest.FixtureRequest, tmp_path: Path) -> CausalLM:
    tiny.build(tmp_path / "model", request.param, num_hidden_layers=4)
    return CausalLM(
        ModelSource.open(ModelConfig(source=str(tmp_path / "model"))),
        DEVICE,
        torch.bfloat16 if DEVICE.type == "cuda" else torch.float32,
    )


def compiled(lm: CausalLM) -> tuple[CausalLM, list[str]]:
    torch._dynamo.reset()  # what another test has compiled
    failures: list[str] = []
    lm.compile(expect_silence=lambda seconds: None, on_failure=failures.append)
    return lm, failures


def forms() -> int:
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


@pytest.mark.parametrize("packed", [False, True])
def test_perplexity_is_the_same_and_blocks_share_what_is_compiled(lm: CausalLM, packed: bool) -> None:
    def block_for(index: int) -> nn.Module:
        block = lm.load_block(index)
        if not packed:
            return block
        return round_to_nearest(block, lm.linear_names(index), GridConfig(bits=4, group_size=32)).install(
            block
        )

    ids = tiny.tokens(7, LENGTH)
    plain = perplexity(lm, block_for, ids, batch_size=2).nll_mean
    lm, failures = compiled(lm)
    before = forms()
    fast = perplexity(lm, block_for, ids, batch_size=2).nll_mean
    assert not failures
    kinds = 1 if lm.tail is not None else 2  # gemma2's layers look back a window, or all the way
    heads = 1 if lm.tail is not None else 0
    assert 0 < forms() - before <= kinds + heads, "not one for each of four blocks; none for a single window"
    assert fast == pytest.approx(plain, rel=1e-6 if DEVICE.type == "cpu" else 2e-3)
    assert fast != 0.0


@pytest.mark.parametrize("packed", [False, True])
def test_a_stream_passes_to_the_same_place(lm: CausalLM, packed: bool) -> None:
    ids = tiny.tokens(7, LENGTH)

    def passed() -> Tensor:
        store = make_store("device", (*ids.shape, lm.hidden_size), lm.dtype, DEVICE)
        store.write(0, lm.embed(ids))
        for index in range(lm.blocks):
            block = lm.load_block(index, dtype=torch.float32)
            if packed:
                names = lm.linear_names(index)
                round_to_nearest(block, names, GridConfig(bits=4, group_size=32)).install(block)
            advance(lm, index, block, store, Portions(2), lm.dtype, Heard())
        return store.read(slice(0, len(ids))).float()

    plain = passed()
    lm, failures = compiled(lm)
    fast = passed()
    assert not failures
    assert (fast - plain).norm() < (1e-5 if DEVICE.type == "cpu" else 2e-2) * plain.norm()


def test_only_what_comes_often_is_compiled_and_nothing_that_is_differentiated(
    lm: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, _ = compiled(lm)
    called: list[object] = []
    monkeypatch.setattr(
        lm, "repeated", lambda function: called.append(function) or (lambda *a: torch.zeros(()))
    )
    block, hidden = lm.load_block(0), lm.embed(tiny.tokens(2, LENGTH))
    with torch.no_grad():
        lm.run_block(block, 0, hidden)
    lm.run_block(block, 0, hidden, often=True)
    assert not called
    with torch.no_grad():
        lm.run_block(block, 0, hidden, often=True)
    assert len(called) == 1
