"""The start and the best validated values of a training: two copies, never a third."""

from __future__ import annotations

import torch
from torch import nn

from engine.training.best_state import BestState


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(7))]


def set_to(trained: list[nn.Parameter], value: float) -> None:
    with torch.no_grad():
        for parameter in trained:
            parameter.fill_(value)


def values(trained: list[nn.Parameter]) -> set[float]:
    return {number for parameter in trained for number in parameter.flatten().tolist()}


def addresses(tensors: list[torch.Tensor] | None) -> list[int]:
    assert tensors is not None
    return [tensor.data_ptr() for tensor in tensors]


def test_a_start_that_is_the_best_is_not_copied_and_never_written_over() -> None:
    trained = parameters()
    set_to(trained, 1.0)
    best = BestState(trained)
    assert best.keep_if_best(5.0, at_start=True)
    assert addresses(best.best) == addresses(best.start)
    set_to(trained, 2.0)
    assert best.keep_if_best(4.0)
    set_to(trained, 3.0)
    assert not best.keep_if_best(4.5)
    best.load_best()
    assert values(trained) == {2.0}
    best.restart()
    assert values(trained) == {1.0}
    assert best.best is None
    assert best.val_loss is None


def test_a_better_state_takes_the_place_of_the_best_so_far() -> None:
    trained = parameters()
    best = BestState(trained)
    set_to(trained, 2.0)
    assert best.keep_if_best(4.0)
    there = addresses(best.best)
    set_to(trained, 3.0)
    assert best.keep_if_best(3.0)
    assert addresses(best.best) == there
    set_to(trained, 4.0)
    best.load_best()
    assert values(trained) == {3.0}


def test_what_is_no_number_is_never_the_best() -> None:
    trained = parameters()
    best = BestState(trained)
    assert not best.keep_if_best(None, at_start=True)
    assert not best.keep_if_best(float("nan"), at_start=True)
    assert not best.keep_if_best(float("inf"))
    set_to(trained, 2.0)
    best.load_best()
    assert values(trained) == {2.0}


def test_it_goes_on_from_a_snapshot_of_itself() -> None:
    trained = parameters()
    set_to(trained, 1.0)
    before = BestState(trained)
    before.keep_if_best(5.0, at_start=True)
    snapshot = before.state_dict()
    copied = {name: tensor.clone() for name, tensor in snapshot.tensors.items()}
    snapshot.tensors.clear()
    snapshot.tensors.update(copied)
    after = BestState(trained)
    after.load_state_dict(snapshot)
    set_to(trained, 2.0)
    assert not after.keep_if_best(6.0)
    after.load_best()
    assert values(trained) == {1.0}
    set_to(trained, 3.0)
    assert after.keep_if_best(1.0)
    set_to(trained, 4.0)
    after.load_best()
    assert values(trained) == {3.0}
    after.restart()
    assert values(trained) == {1.0}
