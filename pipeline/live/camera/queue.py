"""Bounded queue between a camera and its tracker; every dropped frame is counted.

Frames, including lost ones, are numbered here. Events (losses, gaps, reconnects) are kept in order and
attached to the next delivered frame, so that every event belongs to a frame.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline.base.records import Event
from pipeline.live.camera.clock import Stamp
from pipeline.live.camera.ledger import QUEUE_FULL, TOO_OLD, Ledger

QueuePolicy = Literal["latest", "every"]

_COUNTED = ("dropped", "corrupt")
_MOST_PENDING = 64


@dataclass
class _Pending:
    kind: str
    reason: str | None
    count: int
    detail: dict[str, Any]


class PendingEvents:
    """Events that wait for the next delivered frame. Their number is bounded; their counts stay exact.

    Drops and corruption are summed by reason. Of other kinds, the first 64 events are kept separately; later
    ones are merged into the last event of the same kind and reason, with their seconds summed.
    """

    def __init__(self) -> None:
        self._events: list[_Pending] = []

    def add(
        self, kind: str, reason: str | None, count: int = 1, detail: Mapping[str, Any] | None = None
    ) -> None:
        """Add an event."""
        self._add(_Pending(kind, reason, count, dict(detail or {})))

    def put_before(self, earlier: PendingEvents) -> None:
        """Take over what another one holds, as having happened before."""
        later, self._events = self._events, []
        for event in (*earlier._events, *later):
            self._add(event)

    def events(self, frame_index: int, stamp: Stamp | None) -> tuple[Event, ...]:
        """As events at a frame."""
        pts = None if stamp is None else stamp.pts_seconds
        wall = None if stamp is None else stamp.wall_time
        return tuple(
            Event(frame_index, e.kind, e.reason, e.count, pts, wall, detail=e.detail or None)
            for e in self._events
        )

    def __len__(self) -> int:
        return len(self._events)

    def _add(self, event: _Pending) -> None:
        same = [e for e in self._events if (e.kind, e.reason) == (event.kind, event.reason)]
        if not same or (event.kind not in _COUNTED and len(self._events) < _MOST_PENDING):
            self._events.append(_Pending(event.kind, event.reason, event.count, dict(event.detail)))
            return
        into = same[-1]
        into.count += event.count
        seconds = [d.get("seconds") for d in (into.detail, event.detail)]
        into.detail |= event.detail
        if all(isinstance(value, int | float) for value in seconds):
            into.detail["seconds"] = round(sum(seconds), 3)  # type: ignore[arg-type]


@dataclass
class Waiting:
    """A frame in the queue: not yet an array of pixels, since it may never be looked at.

    Args:
        picture: the decoder's frame.
        arrival: arrival time on the monotonic clock, in seconds.
        events: events just before the frame.
    """

    frame_index: int
    picture: Any
    stamp: Stamp
    size_bytes: int
    arrival: float
    events: PendingEvents = field(default_factory=PendingEvents)


class LiveQueue:
    """Hands frames from one thread to another.

    Args:
        policy: what to do when the queue is full: "latest" drops the oldest frame, "every" makes the source
            wait.
        max_frames, max_bytes: capacity; a single frame always fits.
        max_age_seconds: with "latest", frames that have waited longer are dropped when the next one is taken.
        now: the monotonic clock.
    """

    def __init__(
        self,
        ledger: Ledger,
        policy: QueuePolicy = "latest",
        *,
        max_frames: int = 2,
        max_bytes: int = 256 << 20,
        max_age_seconds: float | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ledger = ledger
        self._policy = policy
        self._max_frames = max_frames
        self._max_bytes = max_bytes
        self._max_age = max_age_seconds
        self._now = now
        self._changed = threading.Condition()
        self._frames: deque[Waiting] = deque()
        self._bytes = 0
        self._pending = PendingEvents()
        self._next = 0
        self._closed = False
        self._ended = False

    @property
    def next_index(self) -> int:
        """The number of the next received frame, which is the number of frames received so far."""
        return self._next

    @property
    def oldest_index(self) -> int:
        """The number of the frame that would be delivered next."""
        with self._changed:
            return self._frames[0].frame_index if self._frames else self._next

    @property
    def closed(self) -> bool:
        """Whether nothing more comes out."""
        with self._changed:
            return self._closed or (self._ended and not self._frames)

    def put(self, picture: Any, stamp: Stamp, size_bytes: int, arrival: float) -> bool:
        """Add a frame.

        With "every" this waits for room. Returns False if the queue was closed meanwhile.
        """
        with self._changed:
            self._ledger.received()
            item = Waiting(self._next, picture, stamp, size_bytes, arrival)
            self._next += 1
            while self._policy == "every" and self._full(size_bytes) and not self._closed:
                self._changed.wait()
            if self._closed:
                self._drop(item, "closed")
                return False
            item.events, self._pending = self._pending, item.events
            self._frames.append(item)
            self._bytes += size_bytes
            while self._policy == "latest" and len(self._frames) > 1 and self._full(0):
                self._drop_oldest(QUEUE_FULL)
            self._changed.notify_all()
            return True

    def lost(self, kind: Literal["dropped", "corrupt"], reason: str, count: int) -> None:
        """Count frames that were received but gave no picture; they take frame numbers, too."""
        if count <= 0:
            return
        with self._changed:
            self._ledger.received(count)
            self._next += count
            (self._ledger.dropped if kind == "dropped" else self._ledger.corrupt)(reason, count)
            self._pending.add(kind, reason, count)

    def note(
        self, kind: str, reason: str | None, detail: Mapping[str, Any] | None = None, count: int = 1
    ) -> None:
        """Add an event before the next frame."""
        with self._changed:
            self._pending.add(kind, reason, count, detail)

    def get(self, timeout: float | None = None) -> Waiting | None:
        """Return the next frame; None on timeout or if the queue is closed (see `closed`)."""
        with self._changed:
            deadline = None if timeout is None else self._now() + timeout
            while True:
                while self._policy == "latest" and self._frames and self._stale(self._frames[0]):
                    self._drop_oldest(TOO_OLD)
                if self._frames:
                    break
                left = None if deadline is None else deadline - self._now()
                if self._closed or self._ended or (left is not None and left <= 0):
                    return None
                self._changed.wait(left)
            item = self._frames.popleft()
            self._bytes -= item.size_bytes
            self._changed.notify_all()
            return item

    def end(self) -> None:
        """Accept no more frames; those in the queue can still be taken."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def close(self) -> tuple[Event, ...]:
        """Close both ends and return the events that no frame carried."""
        with self._changed:
            self._closed = True
            while self._frames:
                self._drop_oldest("closed")
            self._changed.notify_all()
            return self._pending.events(self._next, None)

    def trailing(self) -> tuple[Event, ...]:
        """Return the events that no frame has carried so far, with the number of the next frame."""
        with self._changed:
            return self._pending.events(self._next, None)

    def _full(self, more: int) -> bool:
        if more:  # if another frame of `more` bytes were added
            return bool(self._frames) and (
                len(self._frames) >= self._max_frames or self._bytes + more > self._max_bytes
            )
        return len(self._frames) > self._max_frames or self._bytes > self._max_bytes

    def _stale(self, item: Waiting) -> bool:
        return self._max_age is not None and self._now() - item.arrival > self._max_age

    def _drop_oldest(self, reason: str) -> None:
        item = self._frames.popleft()
        self._bytes -= item.size_bytes
        self._drop(item, reason)

    def _drop(self, item: Waiting, reason: str) -> None:
        """Attach a dropped frame's events, and its loss, to the next delivered frame."""
        self._ledger.dropped(reason)
        item.events.add("dropped", reason)
        after = self._frames[0].events if self._frames else self._pending
        after.put_before(item.events)
