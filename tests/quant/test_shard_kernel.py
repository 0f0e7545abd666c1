"""A message between ranks brings each rank the quantized weights that the others have, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.quant.grid import fake_quantize, fake_quantize_steps
from engine.quant.shard_kernel import Message, Part

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = [
    (2, 64, 256, 1),
    (3, 32, 96, 2),
    (4, 128, 128, 2),
    (8, 32, 64, 2),
    (2, 1200, 1200, 4),
    (2, 18, 54, 2),  # no whole bytes of four values
]


def linear(bits: int, group: int, inputs: int, out: int, *, in_steps: bool) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(bits)
    weight = torch.randn(out, inputs) * (2**bits if in_steps else 1)
    scale = 0.5 + torch.rand(out, inputs // group)
    zero = torch.rand(out, inputs // group) * (2**bits - 1)
    return weight.to(DEVICE), scale.to(DEVICE), zero.to(DEVICE)


@pytest.mark.parametrize(("bits", "group", "inputs", "ranks"), CASES)
@pytest.mark.parametrize("in_steps", [False, True])
def test_what_arrives_is_what_was_sent(
    bits: int, group: int, inputs: int, ranks: int, in_steps: bool
) -> None:
    shapes = [(8, inputs), (4, inputs)]
    wholes = [linear(bits, group, width, out, in_steps=in_steps) for out, width in shapes]
    rooms = [torch.full(shape, torch.nan, device=DEVICE) for shape in shapes]
    messages = []
    for rank in range(ranks):
        own = [[t.view(ranks, -1)[rank] for t in whole] for whole in wholes]
        parts = [Part(*found, room, bits, in_steps) for found, room in zip(own, rooms, strict=True)]
        messages.append(Message(parts, rank, ranks))
        messages[-1].note.fill_(1.5 + rank)
        messages[-1].write()
    for rank, message in enumerate(messages):
        messages[0].bytes[rank] = message.bytes[rank]
    messages[0].read()
    assert messages[0].noted.tolist() == [1.5 + rank for rank in range(ranks)]
    for (weight, scale, zero), room in zip(wholes, rooms, strict=True):
        function = fake_quantize_steps if in_steps else fake_quantize
        assert torch.equal(room, function(weight, scale, zero, bits))


def test_two_bits_travel_as_two_bits() -> None:
    weight, scale, zero = linear(2, 64, 4096, 8, in_steps=False)
    room = torch.empty(8, 4096, dtype=torch.bfloat16, device=DEVICE)
    message = Message([Part(weight.view(-1), scale, zero, room, 2, False)], 0, 1)
    assert message.bytes.numel() == 16 + weight.numel() // 4 + 5 * scale.numel()
