"""What was known at the time of each interaction: how often a person and an item had been seen before, and how they had been judged.

Only what happened in an earlier second counts, so nothing tells of the interaction itself or of what came later. Rates of the few
are drawn towards those of the many: towards the rate of all so far, and what a person likes of a genre towards what that person likes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

# How many interactions the rate of all so far weighs in that of one person, one item, and one person in one genre.
_PERSON, _ITEM, _TASTE = 5.0, 10.0, 5.0


class Known(NamedTuple):
    """A figure ``[N]`` (float64) of each interaction, where there is one (``there`` ``[N]``), in so many ``bins``."""

    values: Tensor
    there: Tensor
    bins: int


def so_far(values: Tensor, *, keys: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """For each row the sum of ``values`` ``[N]`` over the rows of the same key and an earlier time, and how many these are."""
    order = times.argsort(stable=True)
    order = order[keys[order].argsort(stable=True)]
    key, time = keys[order], times[order]
    position = torch.arange(len(order))
    new_key = torch.ones(len(order), dtype=torch.bool)
    new_key[1:] = key[1:] != key[:-1]
    new_time = new_key.clone()
    new_time[1:] |= time[1:] != time[:-1]
    begin = torch.where(new_key, position, 0).cummax(0).values
    until = torch.where(new_time, position, 0).cummax(0).values
    sums = torch.cat([torch.zeros(1, dtype=torch.float64), values[order].double().cumsum(0)])
    total, count = torch.empty(len(order), dtype=torch.float64), torch.empty(len(order), dtype=torch.float64)
    total[order], count[order] = sums[until] - sums[begin], (until - begin).double()
    return total, count


def history(*, user: Tensor, item: Tensor, genres: Tensor, times: Tensor, clicked: Tensor) -> Mapping[str, Known]:
    """Figures of the past at each interaction.

    Args:
        user, item, times, clicked: ``[N]`` int64; clicked is 0 or 1.
        genres: ``[N, columns]`` int64, 0 for none.
    """
    clicks = clicked.double()
    of_all, seen = so_far(clicks, keys=torch.zeros_like(user), times=times)
    usual = (of_all + 1.0) / (seen + 2.0)
    of_item, item_count = so_far(clicks, keys=item, times=times)
    item_rate = (of_item + _ITEM * usual) / (item_count + _ITEM)
    of_user, user_count = so_far(clicks, keys=user, times=times)
    user_rate = (of_user + _PERSON * usual) / (user_count + _PERSON)
    # A person who saw good films only is not kind yet: how much more often than others, for the same films.
    kinder, _ = so_far(clicks - item_rate, keys=user, times=times)
    kindness = kinder / (user_count + _PERSON)
    better, _ = so_far(clicks - usual - kindness, keys=item, times=times)
    goodness = better / (item_count + _ITEM)
    taste = _taste(clicks - item_rate - kindness, user=user, genres=genres, times=times)
    known_user, known_item = user_count > 0, item_count > 0
    return {
        "user_rate": Known(user_rate, known_user, 20),
        "user_kindness": Known(kindness, known_user, 20),
        "user_count": Known(user_count, known_user, 8),
        "item_rate": Known(item_rate, known_item, 20),
        "item_goodness": Known(goodness, known_item, 20),
        "item_count": Known(item_count, known_item, 8),
        "taste": Known(taste, known_user, 16),
    }


def _taste(rest: Tensor, *, user: Tensor, genres: Tensor, times: Tensor) -> Tensor:
    """How much more a person liked this item's genres than the item and the person explain: the mean over its genres."""
    rows, columns = (genres > 0).nonzero(as_tuple=True)
    keys = user[rows] * (int(genres.max()) + 1) + genres[rows, columns]
    more, count = so_far(rest[rows], keys=keys, times=times[rows])
    total = torch.zeros(len(user), dtype=torch.float64).index_add_(0, rows, more / (count + _TASTE))
    return total / (genres > 0).sum(1).clamp(min=1)


def binned(known: Known, *, rows: Tensor) -> tuple[Tensor, int]:
    """Ids ``[N]`` and how many there are, 0 (nothing is known) included: bins that hold the same share of ``rows`` each."""
    marks = torch.linspace(0, 1, known.bins + 1, dtype=torch.float64)[1:-1]
    edges = torch.quantile(known.values[rows], marks).unique()
    ids = torch.bucketize(known.values, edges) + 1
    return torch.where(known.there, ids, 0), len(edges) + 2
