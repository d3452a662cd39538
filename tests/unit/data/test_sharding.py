import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from horovod_jobs.data.sharding import (
    check_divides,
    epoch_permutation,
    evaluation_indices,
    micro_batches,
    num_batches,
    rank_slice,
    weighted_slice,
)
from horovod_jobs.errors import ConfigError

sizes = st.integers(1, 9)


@given(n=st.integers(0, 300), seed=st.integers(0, 2**40), epoch=st.integers(0, 1000))
def test_epoch_is_a_permutation(n, seed, epoch):
    order = epoch_permutation(n, seed=seed, epoch=epoch)
    assert order.dtype == torch.int64
    assert sorted(order.tolist()) == list(range(n))


def test_epoch_depends_on_seed_and_epoch_and_not_on_the_global_generator():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = epoch_permutation(1000, seed=3, epoch=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(epoch_permutation(1000, seed=3, epoch=5), first)
    others = [epoch_permutation(1000, seed=seed, epoch=epoch) for seed, epoch in ((3, 6), (4, 5), (4, 4), (2, 6))]
    assert not any(torch.equal(first, other) for other in others)


def test_epoch_order_stays_what_it_was():
    # Resuming an old checkpoint needs the same order: a change of this is a change of the format.
    assert epoch_permutation(8, seed=0, epoch=0).tolist() == [0, 1, 6, 7, 3, 2, 4, 5]


@given(count=st.integers(0, 500), size=sizes)
def test_rank_slices_are_a_balanced_partition(count, size):
    slices = [rank_slice(count, rank=rank, size=size) for rank in range(size)]
    assert [position for part in slices for position in range(count)[part]] == list(range(count))
    lengths = [len(range(count)[part]) for part in slices]
    assert max(lengths) - min(lengths) <= 1


@given(
    n=st.integers(0, 200),
    global_batch=st.integers(1, 64),
    size=sizes,
    accumulate=st.integers(1, 5),
    drop_last=st.booleans(),
)
def test_ranks_together_read_each_global_batch_once(n, global_batch, size, accumulate, drop_last):
    order = epoch_permutation(n, seed=0, epoch=0)
    count = num_batches(n, global_batch=global_batch, drop_last=drop_last)
    seen = []
    for step in range(count):
        batch = order[step * global_batch : (step + 1) * global_batch]
        parts = [micro_batches(batch, rank=rank, size=size, accumulate=accumulate) for rank in range(size)]
        assert all(len(mine) == accumulate for mine in parts)
        assert torch.equal(torch.cat([part for mine in parts for part in mine]), batch)
        seen += batch.tolist()
    expected = n // global_batch * global_batch if drop_last else n
    assert seen == order.tolist()[:expected]


def shares_of(weights):
    return [weight / sum(weights) for weight in weights]


weights_of = st.lists(st.floats(0.0, 10.0), min_size=1, max_size=9).filter(lambda weights: sum(weights) > 0.01)


@given(count=st.integers(0, 500), weights=weights_of)
def test_weighted_slices_are_a_partition_within_one_sample_of_their_shares(count, weights):
    shares = shares_of(weights)
    slices = [weighted_slice(count, rank=rank, shares=shares) for rank in range(len(shares))]
    assert [position for part in slices for position in range(count)[part]] == list(range(count))
    for part, share in zip(slices, shares, strict=True):
        assert abs(len(range(count)[part]) - count * share) <= 1 + 1e-6


@given(count=st.integers(0, 500), size=sizes)
def test_equal_weights_are_even_to_one_sample(count, size):
    lengths = [len(range(count)[weighted_slice(count, rank=rank, shares=[1 / size] * size)]) for rank in range(size)]
    assert sum(lengths) == count
    assert max(lengths) - min(lengths) <= 1 + (size > 2), "two roundings, of half a sample each"


@given(
    n=st.integers(0, 200),
    global_batch=st.integers(1, 64),
    accumulate=st.integers(1, 5),
    weights=st.lists(weights_of, min_size=1, max_size=4),
)
def test_ranks_together_read_each_sample_once_whatever_the_shares(n, global_batch, accumulate, weights):
    """The shares change from batch to batch; sizes differ as well, as in a job that goes on in another world."""
    order = epoch_permutation(n, seed=0, epoch=0)
    seen = []
    for step, batch in enumerate(order.split(global_batch) if n else ()):
        shares = shares_of(weights[step % len(weights)])
        parts = [
            micro_batches(batch, rank=rank, size=len(shares), accumulate=accumulate, shares=shares)
            for rank in range(len(shares))
        ]
        assert all(len(mine) == accumulate for mine in parts)
        for mine in parts:
            assert max(map(len, mine)) - min(map(len, mine)) <= 1
        assert torch.equal(torch.cat([part for mine in parts for part in mine]), batch)
        seen += torch.cat([part for mine in parts for part in mine]).tolist()
    assert seen == order.tolist()


def test_a_share_of_all_and_a_share_of_nothing():
    assert weighted_slice(10, rank=0, shares=(1.0, 0.0)) == slice(0, 10)
    assert weighted_slice(10, rank=1, shares=(1.0, 0.0)) == slice(10, 10)
    with pytest.raises(ConfigError, match="rank=2 is not one of 2 ranks"):
        weighted_slice(10, rank=2, shares=(0.5, 0.5))


@given(n=st.integers(0, 300), size=sizes, batch=st.integers(1, 40))
def test_evaluation_reads_each_sample_once(n, size, batch):
    parts = [part for rank in range(size) for part in evaluation_indices(n, rank=rank, size=size, batch=batch)]
    assert [index for part in parts for index in part.tolist()] == list(range(n))
    assert all(1 <= len(part) <= batch and part.dtype == torch.int64 for part in parts)


@given(unit=st.integers(1, 30), size=sizes, accumulate=st.integers(1, 5))
def test_a_divisible_batch_gives_equal_micro_batches(unit, size, accumulate):
    check_divides(unit * size * accumulate, size=size, accumulate=accumulate)
    batch = torch.arange(unit * size * accumulate)
    lengths = {
        len(part) for rank in range(size) for part in micro_batches(batch, rank=rank, size=size, accumulate=accumulate)
    }
    assert lengths == {unit}


@pytest.mark.parametrize(
    ("global_batch", "size", "accumulate", "message"),
    [
        (100, 8, 1, "global_batch=100 does not divide by 8 ranks (x 1 accumulation steps); use 96 or 104"),
        (3, 2, 4, "global_batch=3 does not divide by 2 ranks (x 4 accumulation steps); use 8"),
        (0, 2, 1, "global_batch=0 is not a positive number; use at least 1"),
    ],
)
def test_a_batch_that_does_not_divide(global_batch, size, accumulate, message):
    with pytest.raises(ConfigError) as caught:
        check_divides(global_batch, size=size, accumulate=accumulate)
    assert str(caught.value) == message


def test_a_rank_outside_the_world():
    with pytest.raises(ConfigError, match="rank=2 is not one of 2 ranks"):
        rank_slice(10, rank=2, size=2)
