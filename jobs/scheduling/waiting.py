"""Videos waiting for a worker: new, started, suspect and delayed ones."""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heappop, heappush

from jobs.scheduling.fair_queue import FairQueue
from jobs.scheduling.placement import Video

# Begun videos admitted per new one, while more begun videos wait than there are places.
_CROWDED = 3


class Waiting:
    """The queues of waiting videos, and the choice of the next one."""

    def __init__(self) -> None:
        self.fresh: FairQueue[Video] = FairQueue()
        self.begun: FairQueue[Video] = FairQueue()
        self.suspects: FairQueue[Video] = FairQueue()
        self._put_off: list[tuple[float, int, Video]] = []
        self._last = 0
        self._begun_in_a_row = 0

    def __len__(self) -> int:
        """Number of videos ready for a place, without suspects and delayed ones."""
        return len(self.fresh) + len(self.begun)

    def add(self, video: Video) -> None:
        """Add a new video."""
        video.queue = self.fresh
        self.fresh.push_new(video)

    def put(self, video: Video) -> None:
        """Add a video that was on a worker or reserved for one."""
        video.put_off = 0
        unsuspected = self.fresh if video.best is None else self.begun
        video.queue = self.suspects if video.suspect else unsuspected
        video.queue.push(video, video.had)
        video.had = 0

    def put_off(self, video: Video, until: float) -> None:
        """Delay a video until the given time at least."""
        self._last += 1
        video.put_off = self._last
        heappush(self._put_off, (until, video.put_off, video))

    def wake(self, now: float) -> None:
        """Move delayed videos whose time has come to the queues."""
        while self._put_off and self._put_off[0][0] <= now:
            _, number, video = heappop(self._put_off)
            if video.put_off == number:
                self.put(video)

    @property
    def wakeup(self) -> float | None:
        """Time of the next delayed video; None if there is none."""
        return self._put_off[0][0] if self._put_off else None

    def remove(self, video: Video) -> None:
        """Remove a video from whichever queue it waits in, if any."""
        video.put_off = 0
        if video.queue is not None:
            video.queue.discard(video)
            video.queue = None

    def take(self, first: Video) -> None:
        """Remove the first video of a queue after it was placed."""
        queue = first.queue
        assert queue is not None
        queue.pop()
        first.queue = None
        if queue is not self.suspects:
            self._begun_in_a_row = self._begun_in_a_row + 1 if queue is self.begun else 0

    def next(self, places: int) -> Iterator[Video]:
        """Yield the next candidates: the first new or begun video, then the other kind's first.

        Args:
            places: total number of places. If more begun videos wait than there are places, they get more
                than every second one, since each new video soon adds to them.
        """
        begun_next = self._begun_in_a_row < (_CROWDED if len(self.begun) > places else 1)
        for queue in (self.begun, self.fresh) if begun_next else (self.fresh, self.begun):
            video = queue.first()
            if video is not None:
                yield video
