"""Weighted fair queues of waiting videos, ordered by virtual time.

A queue's clock is the tag of the last video taken out. A video enters with a tag later than the clock by its
last service divided by its weight. Videos of high weight are therefore served more often, and those of low
weight are served eventually, whatever arrives later.
"""

from __future__ import annotations

import itertools
from heapq import heappop, heappush
from typing import Generic, Protocol, TypeVar


class Queued(Protocol):
    """An item that waits in at most one queue; `ticket` is set by the queue, 0 while not waiting."""

    weight: float
    ticket: int


T = TypeVar("T", bound=Queued)

# Shared by all queues, so that a stale entry in one queue never matches a ticket of another.
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
        """Add an item that was served by this amount since it left the queue; 0 puts it to the front."""
        self._insert(item, self._clock + served / item.weight)

    def push_new(self, item: T) -> None:
        """Add an item that was never served: first in, first out within a weight, in turn with others."""
        tag = max(self._clock, self._last.get(item.weight, 0.0)) + 1.0 / item.weight
        self._last[item.weight] = tag
        self._insert(item, tag)

    def first(self) -> T | None:
        """The next item, without removing it."""
        while self._heap:
            _, ticket, item = self._heap[0]
            if item.ticket == ticket:
                return item
            heappop(self._heap)
        return None

    def pop(self) -> T:
        """Remove and return the first item; IndexError if the queue is empty."""
        self.first()
        tag, _, item = heappop(self._heap)
        self._clock = max(self._clock, tag)
        self.discard(item)
        return item

    def discard(self, item: T) -> None:
        """Remove an item from this queue."""
        item.ticket = 0
        self._size -= 1
        if not self._size:
            self._heap.clear()
            self._last.clear()

    def _insert(self, item: T, tag: float) -> None:
        item.ticket = next(_tickets)
        self._size += 1
        heappush(self._heap, (tag, item.ticket, item))
