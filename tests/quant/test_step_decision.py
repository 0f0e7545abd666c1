"""One kernel for what decides about a step, against the plain stepper's own way."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton")

from engine.quant.quant_step import CORRECTION1, GRAD_FACTOR, LR_FACTOR, ROOT_CORRECTION2, SKIP
from engine.quant.step_decision import Decision
from engine.training.stepper import ParameterGroup, Stepper

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BETAS = (0.9, 0.999)
NORMAL, WITHOUT_END = (0.5, 1e-30, 3e4), (float("nan"), float("inf"), -float("inf"))


def scalar(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(value, dtype=dtype, device=DEVICE)


def plain(dtype: torch.dtype) -> Stepper:
    """Of a parameter that nobody trains."""
    group = ParameterGroup("weights", [nn.Parameter(torch.zeros(1, device=DEVICE))], 0.1)
    return Stepper([group], weight_decay=0.0, grad_clip=0.0, device=DEVICE, dtype=dtype)


def of_stepper(stepper: Stepper) -> Decision:
    bad, worst = torch.zeros((), device=DEVICE), torch.zeros((), device=DEVICE)
    return Decision(BETAS, DEVICE, bad=bad, worst=worst, scaled=stepper.scale.enabled)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("count", [1, 7, 33])
def test_it_decides_as_the_plain_stepper_does(dtype: torch.dtype, count: int) -> None:
    chance = random.Random(count)
    stepper = plain(dtype)
    decision = of_stepper(stepper)
    taken = 0
    for number in range(40):
        norms = [abs(chance.choice(NORMAL)) * chance.random() for _ in range(count)]
        if chance.random() < 0.3:
            norms[chance.randrange(count)] = chance.choice(WITHOUT_END)
        loss = chance.choice([*WITHOUT_END, *[1.5] * 9])
        if stepper.scale.enabled:
            stepper.scale.factor.fill_(chance.choice([1.0, 1024.0]))
        known = torch.tensor(norms, device=DEVICE)
        expected = stepper.judge(known.norm(), scalar(loss))
        factor = scalar(1 / (1 + number))
        found = decision(known, scalar(loss), factor, stepper.scale.factor)
        assert found.item() == expected.item(), (norms, loss)
        taken += not expected.item()
        assert decision.count.item() == taken
        for own, others in ((decision._bad, stepper.bad_in_a_row), (decision._worst, stepper.worst_in_a_row)):
            assert own.item() == others.item()
        controls = decision.controls.tolist()
        assert controls[SKIP] == expected.item()
        assert controls[LR_FACTOR] == factor.item()
        assert controls[GRAD_FACTOR] == 1 / stepper.scale.factor.item()
        corrections = 1 - BETAS[0] ** taken, math.sqrt(1 - BETAS[1] ** taken)
        found_corrections = controls[CORRECTION1], controls[ROOT_CORRECTION2]
        assert found_corrections == pytest.approx(corrections, rel=1e-6, abs=0)
    assert 0 < taken < 40


def test_going_on_from_a_count_is_going_on() -> None:
    """To the last bit, however many steps there were."""
    one = scalar(1.0)
    through = of_stepper(plain(torch.float32))
    for _ in range(250):
        through(one.view(1), one, one, one)
    again = of_stepper(plain(torch.float32))
    again.taken(249)
    again(one.view(1), one, one, one)
    assert torch.equal(through._counts, again._counts)
    assert torch.equal(through.controls, again.controls)
