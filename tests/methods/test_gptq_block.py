"""GPTQ on a block: which linears go together, what each of them is measured on, and what is left for a
training to go on from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from quiet import Heard, one_block
from torch import Tensor, nn

from engine.config.block_ap import BlockAPConfig
from engine.config.gptq import GPTQConfig
from engine.config.grid import GridConfig
from engine.config.model import ModelConfig
from engine.data.activations import ActivationStore, make_store
from engine.errors import StopRequested
from engine.methods.blockwise import gptq_block as module
from engine.methods.blockwise.gptq import without_strange
from engine.methods.blockwise.gptq_block import BlockOnStream, gptq_block, input_groups, latents
from engine.methods.blockwise.reconstruction import Streams, distance
from engine.methods.blockwise.rtn import round_to_nearest
from engine.methods.blockwise.start import AtOnce
from engine.models.causal_lm import CausalLM
from engine.models.source import ModelSource
from engine.quant.packed import PackedBlock

CPU = torch.device("cpu")
SEQUENCES, LENGTH = 8, 24
GRID = GridConfig(bits=3, group_size=32)
ALL = AtOnce(2, 1 << 22)


@pytest.fixture
def opened(tmp_path: Path) -> Callable[..., CausalLM]:
    def build(name: str, **changes: object) -> CausalLM:
        folder = tiny.build(tmp_path / name, name, num_hidden_layers=2, **changes)
        return CausalLM(ModelSource.open(ModelConfig(source=str(folder))), CPU, torch.float32)

    return build


def stream_of(lm: CausalLM, sequences: int = SEQUENCES) -> ActivationStore:
    ids = tiny.tokens(sequences, LENGTH)
    store = make_store("device", (*ids.shape, lm.hidden_size), torch.float32, CPU)
    store.write(0, lm.embed(ids))
    return store


def first_block(lm: CausalLM, stream: ActivationStore | None = None) -> BlockOnStream:
    block = lm.load_block(0, dtype=torch.float32)
    return BlockOnStream(lm, 0, block, stream or stream_of(lm), SEQUENCES, torch.float32)


def given_to(on: BlockOnStream, name: str) -> Tensor:
    """Everything that a linear is given, ``[N, I]``."""
    seen: list[Tensor] = []
    hook = on.block.get_submodule(name).register_forward_hook(lambda m, i, o: seen.append(i[0].flatten(0, 1)))
    on.lm.run_block(on.block, on.index, on.stream.read(range(on.sequences)))
    hook.remove()
    return torch.cat(seen)


LLAMA = [
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
]


@pytest.mark.parametrize("name", ["llama2", "llama_biases", "gemma2", "qwen3", "olmo2"])
def test_linears_that_are_given_the_same_go_together_in_the_order_of_calls(
    opened: Callable[..., CausalLM], name: str
) -> None:
    on = first_block(opened(name))
    names = on.lm.linear_names(0)
    assert input_groups(on, GRID.of_each(reversed(names))) == LLAMA
    assert not any(module._forward_pre_hooks for module in on.block.modules())


def test_fused_projections_are_linears_like_others(opened: Callable[..., CausalLM]) -> None:
    on = first_block(opened("phi3"))
    names = ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"]
    assert input_groups(on, GRID.of_each(on.lm.linear_names(0))) == [(name,) for name in names]


def test_a_tensor_that_changes_between_two_linears_is_another_input() -> None:
    class Shifting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.unused = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, hidden: Tensor) -> Tensor:
            given = hidden.clone()
            first = self.a(input=given)
            return first + self.b(given.add_(1))

    class Model:
        device = CPU

        def run_block(self, block: nn.Module, index: int, hidden: Tensor) -> Tensor:
            return block(hidden)

    store = make_store("device", (4, 5, 8), torch.float32, CPU)
    store.write(0, torch.randn(4, 5, 8))
    on = BlockOnStream(Model(), 0, Shifting(), store, 4, torch.float32)  # type: ignore[arg-type]
    assert input_groups(on, GRID.of_each(("unused", "b", "a"))) == [("a",), ("b",), ("unused",)]


def test_each_linear_is_measured_behind_those_that_are_rounded_already(
    opened: Callable[..., CausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    on, seen = first_block(opened("llama2")), {}
    real = module.round_matrix

    def noted(weight: Tensor, hessian: Tensor, *arguments: object, **options: object) -> object:
        name = next(n for n in on.lm.linear_names(0) if _begins(on.block.get_submodule(n).weight, weight))
        given = given_to(on, name)  # of the block as it is now
        seen[name] = (hessian.clone(), without_strange(given.t() @ given))
        return real(weight, hessian, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "round_matrix", noted)
    untouched = first_block(on.lm)
    gptq_block(on, GPTQConfig(), GRID, Heard(), ALL)
    assert list(seen) == [group[0] for group in LLAMA]
    for measured, expected in seen.values():
        torch.testing.assert_close(measured, expected, rtol=1e-4, atol=1e-5)
    original = given_to(untouched, "mlp.down_proj")
    assert (seen["mlp.down_proj"][0] - without_strange(original.t() @ original)).abs().max() > 1e-2


def _begins(part: Tensor, whole: Tensor) -> bool:
    return part.shape[1] == whole.shape[1] and torch.equal(part, whole[: len(part)])


def output_error(on: BlockOnStream, packed: PackedBlock) -> float:
    hidden = on.stream.read(range(SEQUENCES))
    made = packed.install(on.lm.load_block(0))
    return distance(
        on.lm.run_block(made, 0, hidden), on.lm.run_block(on.lm.load_block(0), 0, hidden), "mse"
    ).item()


@pytest.mark.parametrize("name", ["llama_biases", "gemma2", "phi3"])
@pytest.mark.parametrize("grid", [GRID, GridConfig(bits=4, group_size=-1, symmetric=True)])
def test_a_block_errs_less_than_a_rounded_one(
    opened: Callable[..., CausalLM], name: str, grid: GridConfig
) -> None:
    on = first_block(opened(name))
    packed, found = gptq_block(on, GPTQConfig(), grid, Heard(), ALL)
    assert 0 < found.error < 0.9 * found.plain_error
    rounded = round_to_nearest(on.lm.load_block(0), on.lm.linear_names(0), grid)
    assert output_error(on, packed) < 0.9 * output_error(on, rounded)
    if name == "llama_biases":
        kept = dict(on.lm.load_block(0).named_parameters())
        assert torch.equal(packed.others["mlp.down_proj.bias"].float(), kept["mlp.down_proj.bias"])


def test_scales_can_be_searched_for_what_inputs_carry(opened: Callable[..., CausalLM]) -> None:
    lm = opened("llama2")
    one, other = (
        gptq_block(first_block(lm), GPTQConfig(scales=scales), GRID, Heard(), ALL)  # type: ignore[arg-type]
        for scales in ("range", "search")
    )
    assert other[1].error < one[1].error
    name = "mlp.down_proj"
    assert not torch.equal(one[0].linears[name].scale, other[0].linears[name].scale)


# -- as a start of Block-AP ----------------------------------------------------------------------------


def test_latents_round_to_the_integers_and_lie_off_their_middles(opened: Callable[..., CausalLM]) -> None:
    lm = opened("llama2")
    stream = stream_of(lm)
    packed, _ = gptq_block(first_block(lm, stream), GPTQConfig(), GRID, Heard(), ALL)
    on = first_block(lm, stream)
    start = latents(on, GPTQConfig(), GRID, Heard(), ALL).start
    original = lm.load_block(0)
    for name, weight in packed.linears.items():
        latent = on.block.get_submodule(name).weight
        scale, zero = start.ranges[name]
        assert torch.equal(scale, weight.scale.float())
        assert torch.equal(zero.to(torch.uint8), weight.zero_point)
        assert (latent - weight.dequantize()).abs().max() > 0.3 * scale.min()
        assert not torch.equal(latent, original.get_submodule(name).weight)


def settings(**changes: object) -> BlockAPConfig:
    values: dict[str, object] = {
        "sequences": 6,
        "val_sequences": 2,
        "sequence_length": LENGTH,
        "batch_size": 2,
        "epochs": 1,
        "loss": "mse",
    }
    return BlockAPConfig(**{**values, **changes}).resolved(GRID)  # type: ignore[arg-type]


def test_block_ap_begins_where_gptq_ends(opened: Callable[..., CausalLM]) -> None:
    lm = opened("llama2")
    trained = {}
    for start in ("range", "gptq"):
        streams = Streams(stream_of(lm), stream_of(lm), SEQUENCES)
        config = settings(start=start, val_sequences=0)
        trained[start] = one_block(
            lm, 0, streams, config, GRID, seed=0, dtype=torch.float32, progress=Heard()
        )
    # As far off as GPTQ's own block on the sequences that are reported on, measured on those that it has.
    on = first_block(lm)
    on = BlockOnStream(lm, 0, on.block, on.stream, SEQUENCES, torch.float32)
    packed, _ = gptq_block(on, GPTQConfig(), GRID, Heard(), ALL)
    hidden = on.stream.read(range(4))
    made, full = packed.install(lm.load_block(0)), lm.load_block(0)
    expected = distance(lm.run_block(made, 0, hidden), lm.run_block(full, 0, hidden), "mse").item()
    assert trained["gptq"].initial_loss == pytest.approx(expected, rel=1e-4)
    assert trained["gptq"].initial_loss < 0.9 * trained["range"].initial_loss
    assert trained["gptq"].final_loss < trained["gptq"].initial_loss


def test_what_is_not_trained_stays_gptqs(opened: Callable[..., CausalLM]) -> None:
    lm = opened("llama2")
    streams = Streams(stream_of(lm), stream_of(lm), SEQUENCES)
    config = settings(start="gptq", train=("scales",))
    gptq = GPTQConfig(sequences=3, damping=0.1)
    found = one_block(
        lm, 0, streams, config, GRID, seed=0, dtype=torch.float32, progress=Heard(), gptq=gptq
    ).packed
    on = first_block(lm)
    own, _ = gptq_block(BlockOnStream(lm, 0, on.block, on.stream, 3, torch.float32), gptq, GRID, Heard(), ALL)
    for name, weight in own.linears.items():
        assert torch.equal(found.linears[name].zero_point, weight.zero_point)
        assert not torch.equal(found.linears[name].scale, weight.scale)


# -- when things go wrong ------------------------------------------------------------------------------


def test_a_stop_is_heard_between_batches(opened: Callable[..., CausalLM]) -> None:
    on = first_block(opened("llama2"))
    heard = Heard(stop_at=3)
    with pytest.raises(StopRequested):
        gptq_block(on, GPTQConfig(), GRID, heard, ALL)
    assert heard.boundaries == 3
    assert not any(module._forward_pre_hooks for module in on.block.modules())


class Small:
    """A stream of whose sequences memory suffices for one at a time."""

    def __init__(self, stream: ActivationStore) -> None:
        self.stream = stream

    def read(self, rows: range) -> Tensor:
        if len(rows) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return self.stream.read(rows)


def test_where_memory_is_short_fewer_sequences_pass_and_fewer_rows_are_rounded(
    opened: Callable[..., CausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = opened("llama2")
    plenty = first_block(lm)
    short = BlockOnStream(lm, 0, lm.load_block(0), Small(plenty.stream), SEQUENCES, torch.float32)  # type: ignore[arg-type]
    real = module.round_matrix

    def crowded(weight: Tensor, *arguments: object, values: int, **options: object) -> object:
        if values > 1 << 11:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(weight, *arguments, values=values, **options)  # type: ignore[arg-type]

    expected, _ = gptq_block(plenty, GPTQConfig(), GRID, Heard(), ALL)
    monkeypatch.setattr(module, "round_matrix", crowded)
    heard = Heard()
    packed, found = gptq_block(short, GPTQConfig(), GRID, heard, AtOnce(4, 1 << 14))
    assert found.start.at_once == AtOnce(1, 1 << 11)
    said = [message for code, message in heard.warnings if code == "micro_batch"]
    assert said[:2] == [
        "block 0: out of memory with 4 sequences at a time; going on with 2",
        "block 0: out of memory with 2 sequences at a time; going on with 1",
    ]
    assert len(said) == 2 + 3
    for name, weight in expected.linears.items():
        same = (packed.linears[name].codes() == weight.codes()).float().mean()
        assert same > 0.95, name


def test_inputs_that_are_not_finite_are_told_of(opened: Callable[..., CausalLM]) -> None:
    lm = opened("llama2")
    stream = stream_of(lm)
    broken = stream.read(range(1))
    broken[0, 3, 5] = torch.inf
    stream.write(0, broken)
    heard = Heard()
    packed, _ = gptq_block(first_block(lm, stream), GPTQConfig(), GRID, heard, ALL)
    assert [code for code, _ in heard.warnings].count("not_finite") == len(LLAMA)
    assert all(weight.scale.isfinite().all() for weight in packed.linears.values())
