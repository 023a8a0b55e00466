"""Outcome and amount of work per video, kept compact for batches of a million videos."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from jobs.scheduling.actions import VideoResult, VideoState
from jobs.scheduling.placement import Video
from pipeline.distributed.messages import ChunkReport


class Ledger:
    """Results by stream id, in the order in which videos ended, and sums over all videos."""

    def __init__(self) -> None:
        # Plain tuples, which the garbage collector stops tracking.
        self._results: dict[str, tuple[Any, ...]] = {}
        self.counts = dict.fromkeys(("finished", "failed", "quarantined", "cancelled", "pending"), 0)
        self.frames = self.chunks = self.rows = 0
        self._lengths = self._measured = 0

    def __len__(self) -> int:
        return len(self._results)

    def __contains__(self, stream_id: str) -> bool:
        return stream_id in self._results

    def __iter__(self) -> Iterator[VideoResult]:
        return (VideoResult(*values) for values in self._results.values())

    def get(self, stream_id: str) -> VideoResult | None:
        """The result of a video; None if it has not ended."""
        values = self._results.get(stream_id)
        return None if values is None else VideoResult(*values)

    def end(self, video: Video, state: VideoState) -> None:
        """Record the end of a video."""
        self.counts[state] += 1
        stream_id = video.spec.stream_id
        self._results[stream_id] = (
            stream_id,
            state,
            max(0, video.position - video.offset),
            video.rows,
            video.losses,
            video.tries,
            video.seconds,
            None if state == "finished" else video.cause,
            video.ellipses,
            not video.orphaned,
        )

    @property
    def mean_frames(self) -> float:
        """Mean length of the videos whose length is known; 0 if none is."""
        return self._lengths / self._measured if self._measured else 0.0

    def count_length(self, video: Video, frame_count: int | None) -> None:
        """Record the length of an opened video, if known."""
        if video.frame_count is None and frame_count is not None:
            self._lengths += frame_count
            self._measured += 1
        video.frame_count = frame_count if frame_count is not None else video.frame_count

    def count(self, video: Video, report: ChunkReport) -> None:
        """Record a reported chunk, whatever its outcome."""
        self.chunks += 1
        self.frames += report.frames
        video.ellipses = max(video.ellipses, report.ellipses)
        video.seconds += report.seconds

    def count_rows(self, video: Video, rows: int, losses: int) -> None:
        """Record a stream's current number of rows."""
        self.rows += rows - video.rows
        video.rows, video.losses = rows, losses
