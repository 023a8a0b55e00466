"""Weighted fair queues of waiting videos, ordered by virtual time.

A queue's clock is the tag of the video that left it last. A video comes in with a tag somewhat after the
clock: the more it has had, or the lower its weight, the later. So a heavy one comes round more often, and a
light one's tag is reached in the end whatever arrives behind it.
"""

from __future__ import annotations

import itertools
from heapq import heappop, heappush
from typing import Generic, Protocol, TypeVar


class Queued(Protocol):
    """What can wait in one queue at a time: `ticket` is the queue's own, 0 while it does not wait."""

    weight: float
    ticket: int


T = TypeVar("T", bound=Queued)

# Of all queues: what an item left behind in one of them must not look like its place in another.
_tickets = itertools.count(1)


class FairQueue(Generic[T]):
    """A priority queue by virtual time."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, T]] = []
        self._size = 0
        self._clock = 0.0
        self._last: dict[float, float] = {}

    def __len__(self) -> int:
        return self._size

    def push(self, item: T, served: float = 0.0) -> None:
        """Let an item wait that has been served so much since it left: nothing puts it to the front."""
        self._insert(item, self._clock + served / item.weight)

    def push_new(self, item: T) -> None:
        """Let an item wait that never had anything: those of equal weight, in turn with other weights."""
        tag = max(self._clock, self._last.get(item.weight, 0.0)) + 1.0 / item.weight
        self._last[item.weight] = tag
        self._insert(item, tag)

    def first(self) -> T | None:
        """The item that `pop` would give; it stays."""
        while self._heap:
            _, ticket, item = self._heap[0]
            if item.ticket == ticket:
                return item
            heappop(self._heap)
        return None

    def pop(self) -> T:
        """The first item. IndexError: nobody waits."""
        self.first()
        tag, _, item = heappop(self._heap)
        self._clock = max(self._clock, tag)
        self.discard(item)
        return item

    def discard(self, item: T) -> None:
        """Take an item out that waits here."""
        item.ticket = 0
        self._size -= 1
        if not self._size:
            self._heap.clear()
            self._last.clear()

    def _insert(self, item: T, tag: float) -> None:
        item.ticket = next(_tickets)
        self._size += 1
        heappush(self._heap, (tag, item.ticket, item))
