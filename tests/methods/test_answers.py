"""Learning the answers of conversations: samples that share a window are alone in it, and every answer token
of a batch counts alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
import tiny
import torch
from quiet import Heard
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from engine.config.model import ModelConfig
from engine.data.activations import make_store
from engine.data.packing import Filled, Sample, fill
from engine.errors import PreflightError
from engine.evaluation.answer_perplexity import answer_perplexity
from engine.methods.network.network import Network, NetworkData
from engine.methods.network.teacher import Teacher
from engine.models.causal_lm import CausalLM
from engine.models.source import ModelSource
from engine.phases.instructions import check_packing
from engine.training.loop import Settings, Training
from engine.training.stepper import ParameterGroup

CPU = torch.device("cpu")
LENGTH = 48
OTHERS: dict[str, dict[str, Any]] = {
    "opt": {
        "model_type": "opt",
        "hidden_size": 64,
        "ffn_dim": 128,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "word_embed_proj_dim": 64,
        "max_position_embeddings": 64,
        "vocab_size": 320,
    },
    "bloom": {"model_type": "bloom", "hidden_size": 64, "n_head": 4, "n_layer": 2, "vocab_size": 320},
}
"""Beside the tiny models: positions that masks do not follow, and none at all."""


def opened(folder: Path, name: str, device: torch.device = CPU) -> CausalLM:
    if name in OTHERS:
        from transformers import AutoConfig

        config = AutoConfig.for_model(**OTHERS[name])
        tiny.random_model(config).save_pretrained(folder)
        tiny.byte_tokenizer(320).save_pretrained(folder)
    else:
        tiny.build(folder, name)
    return CausalLM(ModelSource.open(ModelConfig(source=str(folder))), device, torch.float32)


def samples(*sizes: tuple[int, int]) -> list[Sample]:
    """Samples of so many tokens, the last of which are an answer."""
    draw = numpy.random.default_rng(1)
    return [Sample(draw.integers(3, 300, size), numpy.arange(size) >= size - said) for size, said in sizes]


def windows(found: list[Sample], *, packed: bool = True, most: int = 99) -> Filled:
    return fill(found, windows=most, length=LENGTH, packed=packed, order="", passes=1)


def last_hidden(lm: CausalLM, ids_BT: Tensor, positions_BT: Tensor | None = None) -> Tensor:
    hidden = lm.embed(ids_BT, positions_BT)
    for index in range(lm.blocks):
        hidden = lm.run_block(lm.load_block(index), index, hidden, positions_BT=positions_BT)
    return hidden


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["llama3", "mistral", "qwen2_sliding", "gemma2", "gemma3", "phi3", "smollm3", "olmo2"]
)
def test_logits_of_a_packed_sample_are_its_own_alone(tmp_path: Path, name: str) -> None:
    lm = opened(tmp_path / name, name)
    own = samples((13, 4), (11, 2), (20, 9), (5, 1))
    found = windows(own)
    assert [len(row) for row in (found.tokens_NT,)] == [2]
    logits = lm.head(last_hidden(lm, found.tokens_NT, found.answers.positions_NT))
    # Eager, since some releases pass Gemma 2 through a kernel that leaves its soft cap out.
    eager = {"attn_implementation": "eager", "dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / name, **eager).eval()
    places = {0: (0, 0), 1: (0, 13), 2: (0, 24), 3: (1, 0)}  # in the order in which they fit
    assert found.answers.segments_NT[0, [0, 13, 24, 44]].tolist() == [0, 1, 2, 3]
    for number, (row, begin) in places.items():
        ids = torch.from_numpy(own[number].ids)
        assert torch.equal(found.tokens_NT[row, begin : begin + len(ids)], ids)
        alone = model(ids[None]).logits[0]
        assert torch.allclose(
            logits[row, begin : begin + len(ids)], alone, atol=2e-5 * float(alone.abs().max())
        )


@torch.no_grad()
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["llama2", "mistral", "qwen2_sliding", "gemma2", "gemma3", "phi3"])
def test_on_a_gpu_a_packed_sample_is_alone_in_half_precision_too(tmp_path: Path, name: str) -> None:
    lm = opened(tmp_path / name, name, torch.device("cuda"))
    check_packing(lm)
    own = samples((13, 4), (11, 2), (20, 9))
    found = windows(own)
    for dtype, tolerance in ((torch.float32, 1e-3), (torch.bfloat16, 3e-2)):
        blocks = [lm.load_block(index, dtype) for index in range(lm.blocks)]

        def passed(ids: Tensor, positions: Tensor | None, blocks: list[nn.Module] = blocks) -> Tensor:
            hidden = lm.embed(ids, positions).to(next(blocks[0].parameters()).dtype)
            for index, block in enumerate(blocks):
                hidden = lm.run_block(block, index, hidden, positions_BT=positions)
            return lm.head(hidden)[0].float()

        logits = passed(found.tokens_NT, found.answers.positions_NT)
        begin = 0
        for sample in own:
            alone = passed(torch.from_numpy(sample.ids)[None], None)
            error = (logits[begin : begin + len(alone)] - alone).abs().max()
            assert error <= tolerance * alone.abs().max()
            begin += len(alone)


@torch.no_grad()
def test_without_positions_samples_would_see_each_other(tmp_path: Path) -> None:
    lm = opened(tmp_path / "m", "llama2")
    found = windows(samples((13, 4), (11, 2)))
    apart = last_hidden(lm, found.tokens_NT, found.answers.positions_NT)
    together = last_hidden(lm, found.tokens_NT)
    assert torch.allclose(apart[0, :13], together[0, :13], atol=1e-5)
    assert not torch.allclose(apart[0, 13:24], together[0, 13:24], atol=1e-2)


def test_a_model_that_takes_no_positions_is_refused(tmp_path: Path) -> None:
    check_packing(opened(tmp_path / "mistral", "mistral"))
    with pytest.raises(PreflightError, match=r"takes no positions.*instructions.packing = false"):
        check_packing(opened(tmp_path / "bloom", "bloom"))


def test_a_model_whose_masks_do_not_follow_positions_is_refused(tmp_path: Path) -> None:
    """OPT makes a mask of its own before transformers could look for packed samples."""
    with pytest.raises(PreflightError, match="block 0 puts out depends on the sample before"):
        check_packing(opened(tmp_path / "opt", "opt"))


def test_a_model_whose_blocks_see_what_was_before_is_refused(tmp_path: Path) -> None:
    lm = opened(tmp_path / "m", "llama2")
    load = lm.load_block

    class Leaks(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, hidden: Tensor, **arguments: Any) -> Tensor:
            output = self.block(hidden, **arguments)
            mixed: Tensor = output + hidden.roll(1, 1)
            return mixed

    lm.load_block = lambda index, dtype=None: Leaks(load(index, dtype))  # type: ignore[method-assign]
    with pytest.raises(PreflightError, match="block 0 puts out depends on the sample before"):
        check_packing(lm)


# -- the loss ------------------------------------------------------------------------------------------


class Norms(Network):
    """Trains the norms of blocks that are not quantized."""

    def __init__(self, lm: CausalLM, data: NetworkData, **options: Any) -> None:
        blocks = [lm.load_block(index) for index in range(lm.blocks)]
        super().__init__(lm, blocks, data, torch.float32, **options)
        parameters = [p.requires_grad_(True) for block in blocks for p in block.parameters() if p.ndim == 1]
        self.groups = [ParameterGroup("norms", parameters, 1e-3)]

    def project(self) -> None: ...


def settings(batch: int, micro: int) -> Settings:
    return Settings(
        epochs=1, batch_size=batch, micro_batch=micro, weight_decay=0.0, grad_clip=0.0, lr_final_fraction=1.0,
        patience=0, seed=3, device=CPU, dtype=torch.float32, where="norms", tokens_per_sequence=LENGTH,
    )  # fmt: skip


def gradients(network: Norms, rows: Tensor, micro: int) -> tuple[float, list[Tensor]]:
    training = Training(network, len(rows), settings(len(rows), micro), Heard())
    loss = training._accumulate(rows, micro)
    return loss.item(), [p.grad.clone() for p in network.leaves if p.grad is not None]


def by_hand(
    folder: Path, found: list[Sample], *, divergence: bool = False, text_weight: float = 1.0
) -> tuple[float, list[Tensor]]:
    """The mean over all answer tokens of the samples, each read alone by transformers; the model teaches
    itself with its logits of another temperature in the place of a teacher."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    norms = [p.requires_grad_(True) for p in model.model.layers.parameters() if p.ndim == 1]
    total, count = torch.zeros(()), 0
    for sample in found:
        ids, learned = torch.from_numpy(sample.ids), torch.from_numpy(sample.learned)
        hidden = model.model(ids[None]).last_hidden_state[0]
        logits = model.lm_head(hidden)[:-1][learned[1:]]
        if divergence:
            teacher = model.lm_head(model.model.norm(TAUGHT[ids]))[:-1][learned[1:]].detach().log_softmax(-1)
            total = total + functional.kl_div(
                logits.log_softmax(-1), teacher, reduction="sum", log_target=True
            )
        if text_weight:
            total = total + text_weight * functional.cross_entropy(
                logits, ids[1:][learned[1:]], reduction="sum"
            )
        count += int(learned[1:].sum())
    loss = total / count
    return loss.item(), list(torch.autograd.grad(loss, norms))


TAUGHT = torch.randn(320, 64, generator=torch.Generator().manual_seed(7))
"""Last hidden states of a teacher that sees nothing but the token itself."""


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("loss", ["cross_entropy", "kl", "kl and text"])
def test_every_answer_token_of_a_batch_counts_alike_however_it_is_cut(
    tmp_path: Path, packed: bool, loss: str
) -> None:
    """One window has 3 tokens of answers, another 40: the gradient is that of the whole batch."""
    lm = opened(tmp_path / "m", "llama2")
    own = samples((48, 3), (45, 40), (20, 7), (24, 11), (47, 1))
    found = windows(own, packed=packed)
    rows = torch.arange(len(found.tokens_NT))
    assert len(rows) == (4 if packed else 5)
    teacher = None
    if loss != "cross_entropy":
        store = make_store("device", (*found.tokens_NT.shape, lm.hidden_size), torch.float32, CPU)
        store.write(0, TAUGHT[found.tokens_NT])
        teacher = Teacher(store)
    data = NetworkData(found.tokens_NT, len(rows), teacher, found.answers)
    weight = {"cross_entropy": 1.0, "kl": 0.0, "kl and text": 0.3}[loss]
    expected, wanted = by_hand(tmp_path / "m", own, divergence=teacher is not None, text_weight=weight)
    for micro in (1, 2, len(rows)):
        network = Norms(lm, data, text_weight=0.0 if teacher is None else weight, recompute=micro == 1)
        got, grads = gradients(network, rows, micro)
        assert got == pytest.approx(expected, rel=1e-5)
        assert len(grads) == len(wanted)
        for one, other in zip(grads, wanted, strict=True):
            assert torch.allclose(one, other, atol=1e-5 * float(other.abs().max()) + 1e-8)


@pytest.mark.parametrize("packed", [True, False])
def test_validation_and_answer_perplexity_are_the_mean_over_answer_tokens(
    tmp_path: Path, packed: bool
) -> None:
    lm = opened(tmp_path / "m", "llama2")
    own = samples((48, 3), (45, 40), (20, 7), (24, 11))
    found = windows(own, packed=packed)
    expected, _ = by_hand(tmp_path / "m", own)
    network = Norms(lm, NetworkData(found.tokens_NT, 0, None, found.answers))
    for micro in (1, 3):
        assert network.validate(micro) == pytest.approx(expected, rel=1e-5)
        measured, tokens = answer_perplexity(
            lm, lm.load_block, found.tokens_NT, found.answers, batch_size=micro
        )
        assert measured == pytest.approx(float(numpy.exp(expected)), rel=1e-5)
        assert tokens == 3 + 40 + 7 + 11


def test_apart_batches_are_of_samples_of_like_length(tmp_path: Path) -> None:
    lm = opened(tmp_path / "m", "llama2")
    found = windows(samples((48, 3), (5, 2), (47, 7), (6, 3)), packed=False)
    network = Norms(lm, NetworkData(found.tokens_NT, 4, None, found.answers))
    training = Training(network, 4, settings(2, 2), Heard())
    order = training.sampler.order(0).tolist()
    assert {frozenset(order[:2]), frozenset(order[2:])} == {frozenset((0, 2)), frozenset((1, 3))}
