"""Samples share windows, keep their places, and what does not fit is counted."""

from __future__ import annotations

import numpy
import pytest
import torch

from engine.data.packing import Answers, Sample, fill
from engine.data.sampler import BatchSampler


def sample(size: int, learned: int, token: int = 1) -> Sample:
    """A sample of so many tokens, the last of which are to be learned."""
    return Sample(numpy.full(size, token), numpy.arange(size) >= size - learned)


def test_samples_share_a_window_and_know_where_they_begin() -> None:
    found = fill(
        [sample(3, 1, 5), sample(6, 2, 6), sample(4, 2, 7)],
        windows=2,
        length=8,
        packed=True,
        order="",
        passes=1,
    )
    assert found.tokens_NT.tolist() == [[5, 5, 5, 7, 7, 7, 7, 0], [6, 6, 6, 6, 6, 6, 0, 0]]
    answers = found.answers
    assert answers.positions_NT is not None
    assert answers.positions_NT.tolist() == [[0, 1, 2, 0, 1, 2, 3, 0], [0, 1, 2, 3, 4, 5, 0, 1]]
    assert answers.predicts_NT.int().tolist() == [[0, 1, 0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 0, 0, 0]]
    assert answers.counts_N.tolist() == [3, 2]
    assert found.tokens == 13


def test_the_first_token_of_a_sample_is_predicted_by_nobody() -> None:
    found = fill([sample(2, 1), sample(3, 3)], windows=1, length=8, packed=True, order="", passes=1)
    assert found.answers.predicts_NT[0].nonzero()[:, 0].tolist() == [0, 2, 3]


def test_apart_each_has_a_window_and_batches_are_cut_to_the_longest() -> None:
    found = fill(
        [sample(3, 1), sample(100, 2), sample(70, 2)], windows=9, length=128, packed=False, order="", passes=1
    )
    answers = found.answers
    assert answers.positions_NT is None
    assert answers.lengths_N.tolist() == [3, 100, 70]
    assert [answers.longest(torch.tensor(rows)) for rows in ([0], [0, 2], [1])] == [64, 128, 128]
    assert answers.predicts_NT.sum(1).tolist() == [1, 2, 2]


def test_what_is_longer_than_a_window_is_cut_and_counted() -> None:
    samples = [sample(4, 2), sample(10, 5), sample(20, 3)]
    cut = fill(samples, windows=4, length=8, packed=True, order="", passes=1).cut
    assert (cut.samples, cut.longer, cut.empty, cut.lost, cut.learned) == (3, 2, 1, 2 + 3, 10)
    (line,) = cut.words("some", "training", 8)
    assert "2 of 3 conversations are longer than 8 tokens and were cut, which lost 5 of 10 tokens" in line
    assert "1 had no answer left" in line


def test_samples_are_read_again_until_there_are_enough_and_no_more_often_than_said() -> None:
    samples = [sample(6, 2, token) for token in range(1, 6)]
    found = fill(samples, windows=8, length=8, packed=True, order="a", passes=4)
    assert (len(found.tokens_NT), found.passes) == (8, 2)
    again = fill(samples, windows=8, length=8, packed=True, order="a", passes=4)
    assert torch.equal(found.tokens_NT, again.tokens_NT)
    assert len(fill(samples, windows=99, length=8, packed=True, order="a", passes=4).tokens_NT) == 20
    assert len(fill([], windows=3, length=8, packed=True, order="a", passes=4).tokens_NT) == 0


def test_no_window_is_left_half_empty_while_there_are_short_samples() -> None:
    draw = numpy.random.default_rng(0)
    samples = [sample(int(size), 1) for size in draw.integers(4, 60, 4000)]
    found = fill(samples, windows=200, length=128, packed=True, order="", passes=1)
    assert found.tokens > 0.97 * found.tokens_NT.numel()


def test_batches_of_like_length_see_every_sequence_once_an_epoch() -> None:
    lengths = torch.randint(1, 512, (403,), generator=torch.Generator().manual_seed(0))
    sampler = BatchSampler(403, 4, 2, seed=5, lengths=lengths)
    plain = BatchSampler(403, 4, 2, seed=5)
    batches = [batch.indices for batch in sampler]
    for epoch in (batches[:101], batches[101:]):
        assert torch.cat(epoch).sort().values.tolist() == list(range(403))
        assert [len(batch) for batch in epoch] == [4] * 100 + [3]

    def padding(found: list[torch.Tensor]) -> int:
        return sum(int((lengths[batch].max() - lengths[batch]).sum()) for batch in found)

    assert padding(batches) < 0.2 * padding([batch.indices for batch in plain])
    other = BatchSampler(403, 4, 2, seed=5, lengths=lengths)
    other.seek(57)
    assert torch.equal(next(iter(other)).indices, batches[57])
    firsts = [int(lengths[batch].max()) for batch in batches[:100]]
    assert firsts != sorted(firsts, reverse=True), "the batches are mixed"


@pytest.mark.parametrize("packed", [True, False])
def test_rows_of_answers_are_their_own(packed: bool) -> None:
    found = fill(
        [sample(5, 2), sample(4, 1), sample(8, 3)], windows=3, length=8, packed=packed, order="", passes=1
    )
    part = found.answers[1:]
    assert isinstance(part, Answers)
    assert torch.equal(part.counts_N, found.answers.counts_N[1:])
