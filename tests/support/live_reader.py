"""Reads a live source as a tracker would, and checks that all frames are accounted for."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from pipeline.base.records import Event, Frame
from pipeline.live.camera.options import LiveOptions
from pipeline.live.camera.source import LiveSource

PATIENCE = 40.0  # timeout in seconds of waits in tests; not a performance bound


def options(**changes: Any) -> LiveOptions:
    """Live options with short timeouts."""
    values: dict[str, Any] = {
        "open_seconds": 5.0,
        "stall_seconds": 1.0,
        "gap_seconds": 0.7,
        "first_backoff_seconds": 0.1,
        "most_backoff_seconds": 0.4,
        "queue_frames": 64,
    }
    return LiveOptions(**(values | changes))


class Reader:
    """Takes frames from a source and counts frames and losses as a tracker does."""

    def __init__(self, source: LiveSource) -> None:
        self.source = source
        self.frames: list[Frame] = []
        self.events: list[Event] = []

    def take(self, count: int) -> list[Frame]:
        taken = []
        for _ in range(count):
            frame = self.source.read(PATIENCE)
            assert frame is not None, self.source.status()
            self.source.ledger.tracked()
            self.events += frame.losses
            taken.append(frame)
        self.frames += taken
        return taken

    def until(self, kind: str, reason: str | None = None, limit: int = 3000) -> Frame:
        """Read up to the first frame with an event of this kind."""
        for _ in range(limit):
            (frame,) = self.take(1)
            if any(e.kind == kind and reason in (None, e.reason) for e in frame.losses):
                return frame
        raise AssertionError(f"no {kind} {reason} within {limit} frames: {self.events}")

    def of(self, kind: str) -> list[Event]:
        return [event for event in self.events if event.kind == kind]

    def finish(self) -> None:
        """Close the source and check the invariants of live streams."""
        self.source.close()
        self.events += self.source.trailing_losses
        counts = self.source.ledger.counts()
        assert counts.settled, counts
        assert counts.tracked == len(self.frames)
        for kind, book in (("dropped", counts.dropped), ("corrupt", counts.corrupt)):
            summed: dict[str, int] = {}
            for event in self.of(kind):
                summed[str(event.reason)] = summed.get(str(event.reason), 0) + event.count
            assert summed == dict(book)
        numbers = [frame.frame_index for frame in self.frames]
        assert all(b > a for a, b in pairwise(numbers))
        assert counts.received > numbers[-1]
        times = [frame.pts_seconds for frame in self.frames]
        assert all(b > a for a, b in pairwise(times) if a is not None and b is not None)
        walls = [frame.wall_time for frame in self.frames]
        assert all(b >= a for a, b in pairwise(walls) if a is not None and b is not None)
        assert all(frame.image.any() for frame in self.frames), "a black frame was made up"
