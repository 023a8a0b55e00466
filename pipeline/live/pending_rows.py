"""Pending rows and events of a live stream since its last committed file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.base.records import Event, Frame, MaskRecord
from pipeline.live.camera.ledger import LedgerCounts
from pipeline.live.record import Books

_LOSSES = ("dropped", "corrupt")
_BEGINNINGS = ("object_added", "corrected")


@dataclass(frozen=True)
class FileContent:
    """A file's worth: all that became of frames `first`..`last`, inclusive.

    Args:
        records: of tracked frames.
        events: by frame, each of one in the file.
        counts: of all frames up to `last`, from the stream's beginning.
        rows: mask records up to `last`, likewise.
    """

    first: int
    last: int
    records: Sequence[MaskRecord]
    events: Sequence[Event]
    counts: LedgerCounts
    rows: int


class Unwritten:
    """What waits to be committed. One thread uses it.

    Losses of one kind and reason become one event per file: an overloaded stream has one per frame.

    Args:
        books: how the stream stands in its committed files.
        covered: the first frame that may still come; those from the books' end to it are known of.

    Attributes:
        first: frame that the next file begins with.
        covered: the frame after the last one that it would hold.
        rows, tracked: mask records and tracked frames, from the stream's beginning.
    """

    def __init__(self, books: Books, covered: int) -> None:
        self.first = books.frames
        self.covered = covered
        self.rows = books.rows
        self.tracked = books.ledger.tracked
        self._counts = {"dropped": dict(books.ledger.dropped), "corrupt": dict(books.ledger.corrupt)}
        self._records: list[MaskRecord] = []
        self._events: list[Event] = []
        self._losses: dict[tuple[str, str], Event] = {}
        self._mark = 0  # events before the frame that is being tracked

    @property
    def waiting_rows(self) -> int:
        """Mask records that the next file would hold."""
        return len(self._records)

    @property
    def worth_a_file(self) -> bool:
        """Whether something waits that somebody may want to read: losses alone can wait longer."""
        return bool(self._records or self._events)

    @property
    def corrupt(self) -> int:
        """Damaged frames, from the stream's beginning."""
        return sum(self._counts["corrupt"].values())

    def add(self, event: Event) -> None:
        """Something happened. Losses are counted with it."""
        if event.kind not in _LOSSES:
            self._events.append(event)
            return
        reason = str(event.reason)
        book = self._counts[event.kind]
        book[reason] = book.get(reason, 0) + event.count
        known = self._losses.get((event.kind, reason))
        if known is not None:
            event = replace(known, count=known.count + event.count)
        self._losses[event.kind, reason] = event

    def happened(self, frame: Frame, kind: str, **values: Any) -> None:
        """Something happened at a frame; `values` are an `Event`'s."""
        self.add(
            Event(frame.frame_index, kind, pts_seconds=frame.pts_seconds, wall_time=frame.wall_time, **values)
        )

    def begin_frame(self) -> None:
        """A frame is about to be tracked: `take_back` goes back to here."""
        self._mark = len(self._events)

    def take_back(self) -> None:
        """The frame failed. What it was to begin did not happen; what it ended is gone all the same."""
        kept = [e for e in self._events[self._mark :] if e.kind not in _BEGINNINGS]
        self._events[self._mark :] = kept

    def add_tracked(self, records: Sequence[MaskRecord]) -> None:
        """A frame was tracked, with these records."""
        self._records.extend(records)
        self.rows += len(records)
        self.tracked += 1

    def cut(self) -> FileContent | None:
        """Everything up to `covered`, which waits here no longer; None if there is no frame in it."""
        first, last = self.first, self.covered - 1
        if last < first:
            return None
        # What happened between two files is told with the frame that is nearest to it.
        events = [
            replace(e, frame_index=min(max(e.frame_index, first), last))
            for e in (*self._events, *self._losses.values())
        ]
        events.sort(key=lambda e: e.frame_index)
        dropped, corrupt = (dict(self._counts[kind]) for kind in _LOSSES)
        counts = LedgerCounts(last + 1, self.tracked, dropped, corrupt)
        content = FileContent(first, last, self._records, events, counts, self.rows)
        self.first, self._records, self._events, self._losses, self._mark = last + 1, [], [], {}, 0
        return content
