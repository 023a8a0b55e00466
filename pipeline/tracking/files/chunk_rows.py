"""ChunkRows: rows and events of the current chunk until it is committed."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from pipeline.base.records import Event, Frame, MaskRecord
from pipeline.tracking.stream_record import StreamSummary


@dataclass(frozen=True)
class ChunkContent:
    """The content of one chunk, frames `first`..`last` (inclusive).

    Args:
        records, events: mask records and events of those frames.
        rows: number of mask records of all frames from 0 to `last`.
    """

    first: int
    last: int
    records: list[MaskRecord]
    events: list[Event]
    rows: int


class ChunkRows:
    """Rows and events that are not committed yet. Frames that are already committed are only counted.

    Args:
        summary: the stream's summary; losses, tracked frames and objects are added to it.
        committed: number of committed frames.
        next_frame: index of the first frame to track.
        rows: number of mask records of the frames before `next_frame`.

    Attributes:
        first: first frame of the next chunk.
        next_frame: the frame being tracked, or the next one.
        rows: number of mask records of all frames before `next_frame`.
    """

    def __init__(self, summary: StreamSummary, committed: int, next_frame: int = 0, rows: int = 0) -> None:
        self.first, self.next_frame, self.rows = committed, next_frame, rows
        self._summary, self._committed = summary, committed
        self._records: list[MaskRecord] = []
        self._events: list[Event] = []
        self._awaited: tuple[Frame, Future[list[MaskRecord]]] | None = None

    def is_new(self, frame: Frame) -> bool:
        """Whether a frame is not committed yet."""
        return frame.frame_index >= self._committed

    def add(self, event: Event) -> None:
        """Add an event at or before `next_frame`."""
        if event.kind == "corrupt":
            self._summary.losses += event.count
        if self.next_frame >= self._committed:
            self._events.append(event)

    def happened(self, frame: Frame, kind: str, **values: Any) -> None:
        """Add an event of a frame; `values` are further fields of `Event`."""
        self.add(
            Event(frame.frame_index, kind, pts_seconds=frame.pts_seconds, wall_time=frame.wall_time, **values)
        )

    def tracked(
        self, frame: Frame, records: list[MaskRecord] | Future[list[MaskRecord]], objects: int
    ) -> None:
        """Add a tracked frame.

        Args:
            records: mask records of its objects; empty if the frame is already committed. Those that are
                still being made are waited for when the next frame is added or the chunk is cut, and raise
                there what making them raised.
            objects: number of its objects.
        """
        self._receive()
        if isinstance(records, Future):
            self._awaited = (frame, records)
        else:
            self._extend(frame, records)
        self._summary.tracked += 1
        self.next_frame = frame.frame_index + 1
        # Counted for repeated frames too: a snapshot may be older than the last commit.
        self.rows += objects

    def cut(self, next_frame: int) -> ChunkContent:
        """Remove and return everything up to frame next_frame - 1."""
        self._receive()
        content = ChunkContent(self.first, next_frame - 1, self._records, self._events, self.rows)
        self.first, self._records, self._events = next_frame, [], []
        return content

    def _receive(self) -> None:
        if self._awaited is not None:
            (frame, records), self._awaited = self._awaited, None
            self._extend(frame, records.result())

    def _extend(self, frame: Frame, records: list[MaskRecord]) -> None:
        self._records.extend(records)
        for record in records:
            seen = self._summary.objects.setdefault(record.object_id, [frame.frame_index, -1, 0])
            if record.area:
                seen[1] = frame.frame_index
                seen[2] += 1
