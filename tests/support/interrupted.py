"""Interrupts a run by an exception from a callback."""

from __future__ import annotations

from collections.abc import Callable

from pipeline.tracking.files.stream_tracker import StreamTracker


class InterruptedRunError(Exception):
    """Raised by `stop_at`."""


def stop_at(frame: int) -> Callable[[StreamTracker], None]:
    """Callback for `track(on_frame=...)` that raises when `frame` is the next frame."""

    def stop(stream: StreamTracker) -> None:
        if stream.next_frame == frame:
            raise InterruptedRunError

    return stop
