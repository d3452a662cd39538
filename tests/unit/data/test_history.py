"""Figures of the past tell of the past only."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from horovod_jobs.data.history import Known, binned, history, so_far

COUNT = 60


def interactions(seed: int) -> dict[str, Tensor]:
    """Few people and items, and seconds of which several interactions share one."""
    generator = torch.Generator().manual_seed(seed)
    genres = torch.randint(0, 5, (8, 3), generator=generator)
    item = torch.randint(1, 8, (COUNT,), generator=generator)
    return {
        "user": torch.randint(1, 6, (COUNT,), generator=generator),
        "item": item,
        "genres": genres[item],
        "times": torch.randint(0, 25, (COUNT,), generator=generator),
        "clicked": torch.randint(0, 2, (COUNT,), generator=generator),
    }


@given(seed=st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_sums_of_earlier_rows_are_what_a_loop_counts(seed: int) -> None:
    rows = interactions(seed)
    total, count = so_far(rows["clicked"], keys=rows["user"], times=rows["times"])
    for row in range(COUNT):
        earlier = (rows["user"] == rows["user"][row]) & (rows["times"] < rows["times"][row])
        assert count[row] == int(earlier.sum())
        assert total[row] == int(rows["clicked"][earlier].sum())


@given(seed=st.integers(0, 1000), row=st.integers(0, COUNT - 1))
@settings(max_examples=25, deadline=None)
def test_a_click_changes_nothing_before_the_next_second(seed: int, row: int) -> None:
    rows = interactions(seed)
    other = {**rows, "clicked": rows["clicked"].clone()}
    other["clicked"][row] = 1 - other["clicked"][row]
    later = rows["times"] > rows["times"][row]
    before, after = history(**rows), history(**other)
    for name, figure in before.items():
        torch.testing.assert_close(after[name].values[~later], figure.values[~later], rtol=0, atol=1e-12, msg=name)
    if bool((later & (rows["user"] == rows["user"][row])).any()):
        assert not torch.equal(before["user_rate"].values[later], after["user_rate"].values[later])


def test_rates_of_the_few_are_drawn_to_that_of_all() -> None:
    clicked = torch.tensor([0, 0, 0, 0, 0, 0, 1, 0])
    user = torch.tensor([1, 1, 1, 1, 1, 1, 2, 2])
    found = history(
        user=user,
        item=torch.arange(1, 9),
        genres=torch.ones(8, 1, dtype=torch.int64),
        times=torch.arange(8),
        clicked=clicked,
    )
    assert not found["user_rate"].there[6], "nothing is known of a person's first interaction"
    usual = (1 + 1) / (7 + 2)
    assert float(found["user_rate"].values[7]) == pytest.approx((1 + 5 * usual) / (1 + 5))
    assert float(found["user_kindness"].values[7]) > 0


def test_bins_hold_about_as_many_rows_each_and_0_is_for_nothing_known() -> None:
    values = torch.linspace(0, 1, 1000, dtype=torch.float64)
    there = torch.ones(1000, dtype=torch.bool)
    there[:10] = False
    ids, size = binned(Known(values, there, 10), rows=torch.arange(1000))
    assert size == 11
    assert ids[:10].tolist() == [0] * 10
    counts = torch.bincount(ids, minlength=11)
    assert counts[1:].min() >= 89
    assert counts[1:].max() <= 101
    only, few = binned(Known(torch.zeros(5, dtype=torch.float64), there[:5], 10), rows=torch.arange(5))
    assert int(only.max()) < few
