"""ChunkRows: rows and events of the current chunk until it is committed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.base.records import Event, Frame, MaskRecord
from pipeline.tracking.stream_record import StreamSummary


@dataclass(frozen=True)
class ChunkContent:
    """A chunk's worth: frames `first`..`last`, inclusive.

    Args:
        records, events: of those frames.
        rows: mask records of all frames up to `last`, from the stream's beginning.
    """

    first: int
    last: int
    records: list[MaskRecord]
    events: list[Event]
    rows: int


class ChunkRows:
    """What waits to be committed. Frames that have rows already are counted, and kept no second time.

    Args:
        summary: of the stream; losses, tracked frames and objects are added to it.
        committed: frames below this have rows.
        next_frame: the frame that is tracked first.
        rows: mask records of the frames before it.

    Attributes:
        first: frame that the next chunk begins with.
        next_frame: the frame that is tracked next, or just now.
        rows: mask records of all frames before `next_frame`.
    """

    def __init__(self, summary: StreamSummary, committed: int, next_frame: int = 0, rows: int = 0) -> None:
        self.first, self.next_frame, self.rows = committed, next_frame, rows
        self._summary, self._committed = summary, committed
        self._records: list[MaskRecord] = []
        self._events: list[Event] = []

    def is_new(self, frame: Frame) -> bool:
        """Whether a frame has no rows yet."""
        return frame.frame_index >= self._committed

    def add(self, event: Event) -> None:
        """Something happened before or on `next_frame`."""
        if event.kind == "corrupt":
            self._summary.losses += event.count
        if self.next_frame >= self._committed:
            self._events.append(event)

    def happened(self, frame: Frame, kind: str, **values: Any) -> None:
        """Something happened at a frame; `values` are an `Event`'s."""
        self.add(
            Event(frame.frame_index, kind, pts_seconds=frame.pts_seconds, wall_time=frame.wall_time, **values)
        )

    def tracked(self, frame: Frame, records: list[MaskRecord], objects: int) -> None:
        """A frame was tracked.

        Args:
            records: of its objects; none if it has rows already.
            objects: how many it has.
        """
        self._records.extend(records)
        for record in records:
            seen = self._summary.objects.setdefault(record.object_id, [frame.frame_index, -1, 0])
            if record.area:
                seen[1] = frame.frame_index
                seen[2] += 1
        self._summary.tracked += 1
        self.next_frame = frame.frame_index + 1
        # Counted for repeated frames too: a snapshot may be older than the last commit.
        self.rows += objects

    def cut(self, next_frame: int) -> ChunkContent:
        """Everything up to frame next_frame - 1, which waits here no longer."""
        content = ChunkContent(self.first, next_frame - 1, self._records, self._events, self.rows)
        self.first, self._records, self._events = next_frame, [], []
        return content
