"""A run that ends in the middle, as if what was called had raised."""

from __future__ import annotations

from collections.abc import Callable

from pipeline.tracking.stream_tracker import StreamTracker


class InterruptedRunError(Exception):
    """What `stop_at` raises."""


def stop_at(frame: int) -> Callable[[StreamTracker], None]:
    """For `track(on_frame=...)`: raises once `frame` is the next one."""

    def stop(stream: StreamTracker) -> None:
        if stream.next_frame == frame:
            raise InterruptedRunError

    return stop
