"""The order of training is a function of the seed, can be resumed anywhere and divided over ranks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.data.sampler import BatchSampler, strata_of
from engine.errors import IdentityError

counts = st.integers(1, 40)
batch_sizes = st.integers(1, 9)
epochs = st.integers(0, 4)
seeds = st.integers(0, 2**63)


def steps_of(sampler: BatchSampler) -> list[tuple[int, int, list[int]]]:
    return [(epoch, step, indices.tolist()) for epoch, step, indices in sampler]


@given(counts, batch_sizes, epochs, seeds, st.booleans())
def test_every_epoch_sees_every_sequence_once(
    count: int, batch: int, epochs: int, seed: int, drop_last: bool
) -> None:
    sampler = BatchSampler(count, batch, epochs, seed, drop_last=drop_last)
    taken = steps_of(sampler)
    assert [step for _, step, _ in taken] == list(range(sampler.steps)) == list(range(len(sampler)))
    for epoch in range(epochs):
        seen = [index for e, _, indices in taken if e == epoch for index in indices]
        assert len(set(seen)) == len(seen)
        assert len(seen) == (count - count % batch if drop_last and count >= batch else count)


@given(counts, batch_sizes, epochs, seeds, st.data())
def test_resumed_order_is_the_uninterrupted_order(
    count: int, batch: int, epochs: int, seed: int, data: st.DataObject
) -> None:
    whole = steps_of(BatchSampler(count, batch, epochs, seed))
    stop = data.draw(st.integers(0, len(whole)))
    first = BatchSampler(count, batch, epochs, seed)
    iterator = iter(first)
    for _ in range(stop):
        next(iterator)
    second = BatchSampler(count, batch, epochs, seed)
    second.load_state_dict(first.state_dict())
    assert steps_of(second) == whole[stop:]


@given(
    counts, st.sampled_from([(2, 2), (4, 4), (4, 2), (8, 8), (16, 2), (6, 3), (12, 4)]), seeds, st.booleans()
)
def test_ranks_together_take_the_batches_of_the_schedule(
    count: int, shape: tuple[int, int], seed: int, grouped: bool
) -> None:
    """Whatever the number of ranks that divides a batch: each takes what lies with it, and all of it."""
    batch, most = shape
    lengths = torch.arange(count) * 7 % 11 if grouped else None
    strata = strata_of(batch, most)
    schedule = BatchSampler(count, batch, 2, seed, lengths=lengths, strata=strata)
    assert all(len(order.unique()) == count for order in map(schedule.order, range(2)))
    whole = steps_of(schedule)
    assert [len(rows) for _, _, rows in whole[: count // batch]] == [batch] * (count // batch)
    for world in (n for n in (1, 2, 3, 4, 8) if most % n == 0):
        ranks = [
            BatchSampler(count, batch, 2, seed, rank, world, lengths=lengths, strata=strata)
            for rank in range(world)
        ]
        assert world == 1 or strata_of(batch, world) == strata, "it is the same for as many as can be"
        for (epoch, step, rows), *shares in zip(whole, *map(steps_of, ranks), strict=True):
            assert all(share[:2] == (epoch, step) for share in shares)
            assert sorted(row for share in shares for row in share[2]) == sorted(rows)
            assert all(row % world == rank for rank, share in enumerate(shares) for row in share[2])
            assert max(len(share[2]) for share in shares) <= batch // world
            assert ranks[0].whole(step).tolist() == rows


@pytest.mark.parametrize("batch", [8, 16, 24])
def test_one_process_and_eight_have_one_schedule(batch: int) -> None:
    alone = steps_of(BatchSampler(100, batch, 2, seed=7))
    for world in (2, 4, 8):
        ranks = [steps_of(BatchSampler(100, batch, 2, 7, rank, world)) for rank in range(world)]
        together = [
            sorted(row for share in shares for row in share[2]) for shares in zip(*ranks, strict=True)
        ]
        assert together == [sorted(rows) for _, _, rows in alone], world


def test_of_like_length_a_process_alone_chooses_among_all() -> None:
    lengths = torch.randint(16, 512, (800,), generator=torch.Generator().manual_seed(0))
    alone = BatchSampler(800, 8, 1, seed=7, lengths=lengths)
    stratified = BatchSampler(800, 8, 1, seed=7, lengths=lengths, strata=8)

    def padded(sampler: BatchSampler) -> int:
        return sum(int(lengths[rows].max()) * len(rows) for _, _, rows in sampler)

    assert alone.strata == 0
    assert int(lengths.sum()) < padded(alone) < 0.95 * padded(stratified)


@pytest.mark.parametrize("batch", [1, 3, 5, 9])
def test_a_batch_that_nobody_shares_out_has_one_order_of_all(batch: int) -> None:
    sampler, plain = BatchSampler(50, batch, 1, seed=7), BatchSampler(50, batch, 1, seed=7, strata=0)
    assert "strata" not in sampler.state_dict()
    assert steps_of(sampler) == steps_of(plain)


def test_a_schedule_goes_on_where_as_many_ranks_can_take_its_batches() -> None:
    eight = BatchSampler(50, 8, 2, seed=7, rank=1, world_size=2)
    eight.seek(3)
    for rank, world in ((0, 4), (5, 8), (0, 1)):
        other = BatchSampler(50, 8, 2, 7, rank, world)
        other.load_state_dict(eight.state_dict())
        assert (other.step, other.strata) == (3, 8)
        assert other.whole(3).tolist() == eight.whole(3).tolist()
    three = BatchSampler(50, 12, 2, seed=7, rank=1, world_size=3)
    with pytest.raises(IdentityError, match="strata = 4, this run has 3"):
        three.load_state_dict(BatchSampler(50, 12, 2, seed=7).state_dict())
    alone = BatchSampler(50, 12, 2, seed=7)
    alone.load_state_dict(three.state_dict())
    assert alone.whole(2).tolist() == three.whole(2).tolist(), "in the order that it was begun in"
    assert alone.state_dict() == three.state_dict()


@pytest.mark.parametrize("strata", [16, 5, -8])
def test_strata_that_no_batch_can_have_are_refused(strata: int) -> None:
    sampler = BatchSampler(50, 8, 2, seed=7)
    with pytest.raises(IdentityError, match=f"strata = {strata}, this run has 8"):
        sampler.load_state_dict({**sampler.state_dict(), "strata": strata})


def test_a_training_begun_when_a_process_alone_had_one_order_of_all_goes_on_in_it() -> None:
    earlier = BatchSampler(50, 8, 2, seed=7, strata=0)
    whole = steps_of(earlier)
    earlier.seek(4)
    state = earlier.state_dict()
    assert "strata" not in state, "as it was written then"
    now = BatchSampler(50, 8, 2, seed=7)
    assert now.order(0).tolist() != earlier.order(0).tolist()
    now.load_state_dict(state)
    assert steps_of(now) == whole[4:]
    two = BatchSampler(50, 8, 2, seed=7, rank=1, world_size=2)
    with pytest.raises(IdentityError, match="strata = 0, this run has 8"):
        two.load_state_dict(state)


def test_order_depends_on_seed_and_epoch_and_not_on_global_randomness() -> None:
    torch.manual_seed(1)
    one = BatchSampler(50, 5, 2, seed=7)
    first = steps_of(one)
    torch.manual_seed(2)
    torch.rand(3)
    state = torch.get_rng_state()
    assert steps_of(BatchSampler(50, 5, 2, seed=7)) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert steps_of(BatchSampler(50, 5, 2, seed=8)) != first
    assert not torch.equal(one.order(0), one.order(1))
    one.seek(0)
    assert steps_of(one) == first


def test_state_of_other_settings_is_refused_by_name() -> None:
    sampler = BatchSampler(50, 5, 2, seed=7)
    with pytest.raises(IdentityError, match="batch_size"):
        sampler.load_state_dict(BatchSampler(50, 10, 2, seed=7).state_dict())


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="effective batch"):
        BatchSampler(10, 3, 1, 0, rank=0, world_size=2)
    with pytest.raises(ValueError, match="rank 2"):
        BatchSampler(10, 2, 1, 0, rank=2, world_size=2)
    with pytest.raises(ValueError, match="0 sequences"):
        BatchSampler(0, 2, 1, 0)
    with pytest.raises(ValueError, match="step 99"):
        BatchSampler(10, 2, 1, 0).seek(99)
