"""Scheduling of live streams that share one segmenter: promised rates first."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from pipeline.live.pacing import CATCH_UP_SECONDS

_MOST_OWED_SECONDS = 1.0


@dataclass(frozen=True)
class Turn:
    """A stream as seen by the scheduler.

    Args:
        key: identifies the stream.
        fps: promised frames per second; None: no promise.
        seconds: tracking time of one of its frames; 0 if unknown.
    """

    key: Hashable
    fps: float | None = None
    seconds: float = 0.0


class Turns:
    """The order in which streams are asked for a frame, recomputed after each tracked frame.

    Streams with a promised rate come first, ordered by the time at which their next frame is due. They do not
    exceed their rate, because excess frames are dropped at the source. The other streams share the remaining
    time round-robin. They are owed `1 - promised` of the tracking time, so that they progress slowly even if
    promised streams take longer than predicted.

    Args:
        promised: share of the time that all promised rates may take together, in (0, 1].
    """

    def __init__(self, promised: float) -> None:
        self._ratio = max(0.0, 1 - promised) / promised
        self._owed = 0.0  # seconds owed to the streams without a promise
        self._gap = math.inf  # seconds between two frames at the highest promised rate
        self._next = 0.0  # seconds that the first of them will take
        self._due: dict[Hashable, float] = {}  # promised streams: time at which the next frame is due
        self._served: dict[Hashable, int] = {}  # other streams: sequence number of their last turn
        self._count = 0

    def order(self, streams: Sequence[Turn], now: float) -> list[Hashable]:
        """Keys of all the streams, in the order in which to ask them for a frame.

        Args:
            now: seconds, by the same clock as for `tracked`.
        """
        keys = {turn.key for turn in streams}
        for gone in [key for key in (*self._due, *self._served) if key not in keys]:
            self._due.pop(gone, None)
            self._served.pop(gone, None)
        promised = [turn for turn in streams if turn.fps is not None]
        others = [turn for turn in streams if turn.fps is None]
        self._gap = min((1 / turn.fps for turn in promised if turn.fps), default=math.inf)
        promised.sort(key=lambda turn: self._due.get(turn.key, now))
        others.sort(key=lambda turn: self._served.get(turn.key, -1))
        self._next = others[0].seconds if others else 0.0
        owed_first = self._owed > 0 and self._owed >= self._next
        return [t.key for t in ((*others, *promised) if owed_first else (*promised, *others))]

    def joins(self, stream: Turn, batch: Sequence[Turn], *, alone: bool = False) -> bool:
        """Whether a stream may be tracked together with those that come before it in the order.

        No batch takes longer than the time between two frames of the highest promised rate, by what frames
        took so far: a stream gets one frame a batch. Beside promised streams the others join only as far as
        time is owed to them.

        Args:
            alone: none of the promised streams has a frame.
        """
        if not batch:
            return True
        if stream.seconds + sum(turn.seconds for turn in batch) > self._gap:
            return False
        if stream.fps is not None or alone:
            return True
        return 0 < stream.seconds + sum(turn.seconds for turn in batch if turn.fps is None) <= self._owed

    def tracked(self, stream: Turn, seconds: float, now: float) -> None:
        """Record a tracked frame of a stream and its duration in seconds."""
        if stream.fps is None:
            self._count += 1
            self._served[stream.key] = self._count
            self._owed = max(0.0, self._owed - seconds)
            return
        gap = 1 / stream.fps
        self._due[stream.key] = max(self._due.get(stream.key, now), now - max(gap, CATCH_UP_SECONDS)) + gap
        # Capped at one turn: idle streams must not accumulate time.
        self._owed = min(self._owed + self._ratio * seconds, max(_MOST_OWED_SECONDS, self._next))
