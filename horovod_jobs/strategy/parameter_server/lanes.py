"""What is to be sent, by receiver: the most urgent first, and only so much on its way to each at a time. Pure."""

from __future__ import annotations

import heapq
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Lanes(Generic[Item]):
    """A queue for each receiver, so that a busy one holds up nobody else.

    What is urgent overtakes what waits, so only ``window_bytes`` are on their way in a lane at a time (Peng et al. 2019,
    doi:10.1145/3341301.3359642). Two messages are always let go: with one, its link would be idle between them.

    Args:
        first: lane that goes first in every round of ``count`` messages. Where every sender begins with another one, no receiver gets
            all of them at once.
    """

    def __init__(self, count: int, *, window_bytes: int, largest_bytes: int, first: int = 0) -> None:
        self._limit = max(window_bytes, 2 * largest_bytes)
        self._count = count
        self._order = [(lane + first) % count for lane in range(count)]
        self._waiting: list[list[tuple[int, int, int, Item]]] = [[] for _ in range(count)]
        self._flying = [0] * count
        self._put = 0  # of all: what is equally urgent leaves in this order

    def put(self, lane: int, item: Item, *, nbytes: int, urgency: int) -> None:
        """Queue a message; the lowest ``urgency`` leaves first."""
        self._put += 1
        heapq.heappush(self._waiting[lane], (urgency, self._put, nbytes, item))

    def take(self) -> Item | None:
        """The message that leaves next; None where there is none, or the window is full."""
        best: int | None = None
        for lane in self._order:
            waiting = self._waiting[lane]
            if not waiting or (self._flying[lane] and self._flying[lane] + waiting[0][2] > self._limit):
                continue
            if best is None or waiting[0][0] // self._count < self._waiting[best][0][0] // self._count:
                best = lane
        if best is None:
            return None
        _, _, nbytes, item = heapq.heappop(self._waiting[best])
        self._flying[best] += nbytes
        return item

    def landed(self, lane: int, *, nbytes: int) -> None:
        """A message that was taken has left."""
        self._flying[lane] -= nbytes

    @property
    def empty(self) -> bool:
        """Whether nothing waits."""
        return not any(self._waiting)

    def close(self, lane: int) -> None:
        """Forget what waits for a receiver that has died."""
        self._waiting[lane].clear()
