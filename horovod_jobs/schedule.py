"""Which stages run at the same time, and on which ranks. Pure: every rank comes to the same plan from the same job."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Item:
    """A stage as the schedule sees it. ``keys``: what it makes; two stages with a key in common do not run side by side."""

    name: str
    needs: frozenset[str] = frozenset()
    alone: bool = False  # it wants the whole world
    keys: frozenset[str] = frozenset()


def turns(items: Sequence[Item], *, ranks: int, at_once: int) -> list[list[str]]:
    """Stages in the order of their turns; those of one turn run side by side, at most ``at_once`` and one a rank.

    A turn begins with the first stage in the graph's order whose needs are made, so with ``at_once=1`` the order is the graph's.
    """
    left = list(items)
    names = {item.name for item in items}
    made: set[str] = set()
    planned = []
    while left:
        ready = [item for item in left if (item.needs & names) <= made]
        chosen = ready[:1]
        if not chosen[0].alone:
            for item in ready[1:]:
                taken = frozenset().union(*(one.keys for one in chosen))
                if len(chosen) < min(at_once, ranks) and not item.alone and not (item.keys & taken):
                    chosen.append(item)
        planned.append([item.name for item in chosen])
        made.update(planned[-1])
        left = [item for item in left if item.name not in made]
    return planned


def shares(ranks: int, parts: int) -> list[range]:
    """``ranks`` cut into ``parts`` contiguous ranges whose lengths differ by at most one, the longer ones first.

    Launchers number the ranks host by host, so that a part spans few hosts.
    """
    small, longer = divmod(ranks, parts)
    starts = [part * small + min(part, longer) for part in range(parts + 1)]
    return [range(starts[part], starts[part + 1]) for part in range(parts)]


def shown(ranks: range) -> str:
    """The ranks in words."""
    if len(ranks) == 1:
        return f"rank {ranks.start}"
    return f"ranks {ranks.start} {'and' if len(ranks) == 2 else 'to'} {ranks.stop - 1}"
