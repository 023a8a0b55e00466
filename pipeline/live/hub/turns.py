"""Scheduling of live streams that share one segmenter: promised rates first."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from pipeline.live.pacing import CATCH_UP_SECONDS

_MOST_OWED_SECONDS = 1.0


@dataclass(frozen=True)
class Turn:
    """What the choice needs to know of a stream.

    Args:
        key: of the stream.
        fps: promised frames per second; None: no promise.
        seconds: that one of its frames takes; 0 as long as that is unknown.
    """

    key: Hashable
    fps: float | None = None
    seconds: float = 0.0


class Turns:
    """The order in which streams are asked for a frame, anew after each frame that is tracked.

    Streams with a promised rate come first, the one whose next frame is due earliest in front. They take no
    more than their rate, because frames above it are dropped where they are read. The other streams share in
    turn what time is left. They are owed `1 - promised` of the time that tracking takes, so that they go on,
    slowly, even where promised streams take longer than was predicted.

    Args:
        promised: share of the time that promised rates may take together, above 0 and up to 1.
    """

    def __init__(self, promised: float) -> None:
        self._ratio = max(0.0, 1 - promised) / promised
        self._owed = 0.0  # seconds, to the streams without a promise
        self._next = 0.0  # seconds that the first of them will take
        self._due: dict[Hashable, float] = {}  # of promised streams: when the next frame is
        self._served: dict[Hashable, int] = {}  # of the others: when in the order they had their last frame
        self._count = 0

    def order(self, streams: Sequence[Turn], now: float) -> list[Hashable]:
        """Keys of all the streams, the first one to be asked in front.

        Args:
            now: seconds, by the clock that `tracked` is told the time of.
        """
        keys = {turn.key for turn in streams}
        for gone in [key for key in (*self._due, *self._served) if key not in keys]:
            self._due.pop(gone, None)
            self._served.pop(gone, None)
        promised = [turn for turn in streams if turn.fps is not None]
        others = [turn for turn in streams if turn.fps is None]
        promised.sort(key=lambda turn: self._due.get(turn.key, now))
        others.sort(key=lambda turn: self._served.get(turn.key, -1))
        self._next = others[0].seconds if others else 0.0
        owed_first = self._owed > 0 and self._owed >= self._next
        return [t.key for t in ((*others, *promised) if owed_first else (*promised, *others))]

    def tracked(self, stream: Turn, seconds: float, now: float) -> None:
        """A frame of a stream was tracked, which took so many seconds."""
        if stream.fps is None:
            self._count += 1
            self._served[stream.key] = self._count
            self._owed = max(0.0, self._owed - seconds)
            return
        gap = 1 / stream.fps
        self._due[stream.key] = max(self._due.get(stream.key, now), now - max(gap, CATCH_UP_SECONDS)) + gap
        # Enough for one turn: streams that have no frames just now do not save up.
        self._owed = min(self._owed + self._ratio * seconds, max(_MOST_OWED_SECONDS, self._next))
