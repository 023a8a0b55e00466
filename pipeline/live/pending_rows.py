"""Pending rows and events of a live stream since its last committed file."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.base.records import Event, Frame, MaskRecord
from pipeline.live.camera.ledger import LedgerCounts
from pipeline.live.record import Books
from pipeline.zones.engine import Removal
from pipeline.zones.events import removal_of

_LOSSES = ("dropped", "corrupt")
_MOST_RECENT = 200  # events that viewers have not been shown yet
_BEGINNINGS = ("object_added", "corrected")


@dataclass(frozen=True)
class FileContent:
    """The content of one file, frames `first`..`last` (inclusive).

    Args:
        records: mask records of the tracked frames.
        events: events of these frames, sorted by frame.
        counts: ledger counts of all frames from the stream's beginning to `last`.
        rows: number of mask records from the stream's beginning to `last`.
    """

    first: int
    last: int
    records: Sequence[MaskRecord]
    events: Sequence[Event]
    counts: LedgerCounts
    rows: int


class Unwritten:
    """Rows and events that are not committed yet. To be used by one thread.

    Losses of one kind and reason are merged into one event per file, since an overloaded stream has one per
    frame.

    Args:
        books: the stream's progress in its committed files.
        covered: the first frame that may still arrive; all frames before it are accounted for.

    Attributes:
        first: first frame of the next file.
        covered: the frame after the last one of the next file.
        rows, tracked: number of mask records and tracked frames from the stream's beginning.
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
        self._removals: list[Removal] = []
        self._recent: deque[Event] = deque(maxlen=_MOST_RECENT)
        self._mark = 0  # number of events before the frame being tracked

    @property
    def waiting_rows(self) -> int:
        """Number of mask records in the next file."""
        return len(self._records)

    @property
    def worth_a_file(self) -> bool:
        """Whether there is more than losses to commit; losses alone may wait longer."""
        return bool(self._records or self._events)

    @property
    def corrupt(self) -> int:
        """Number of damaged frames from the stream's beginning."""
        return sum(self._counts["corrupt"].values())

    def add(self, event: Event) -> None:
        """Add an event; losses are also counted."""
        if event.kind not in _LOSSES:
            self._events.append(event)
            self._recent.append(event)
            if (removal := removal_of(event)) is not None:
                self._removals.append(removal)
            return
        reason = str(event.reason)
        book = self._counts[event.kind]
        book[reason] = book.get(reason, 0) + event.count
        known = self._losses.get((event.kind, reason))
        if known is not None:
            event = replace(known, count=known.count + event.count)
        self._losses[event.kind, reason] = event

    def happened(self, frame: Frame, kind: str, **values: Any) -> None:
        """Add an event of a frame; `values` are further fields of `Event`."""
        self.add(
            Event(frame.frame_index, kind, pts_seconds=frame.pts_seconds, wall_time=frame.wall_time, **values)
        )

    def take_removals(self) -> list[Removal]:
        """Remove and return the removals of objects since the last call, for the zones."""
        taken, self._removals = self._removals, []
        return taken

    def take_recent(self) -> list[Event]:
        """Remove and return the newest events since the last call, without losses, for those who watch."""
        taken = list(self._recent)
        self._recent.clear()
        return taken

    def begin_frame(self) -> None:
        """Mark the beginning of a frame, to which `take_back` returns."""
        self._mark = len(self._events)

    def take_back(self) -> None:
        """Undo the events of a failed frame: its additions did not happen, its removals stay."""
        kept = [e for e in self._events[self._mark :] if e.kind not in _BEGINNINGS]
        self._events[self._mark :] = kept
        self._recent = deque((e for e in self._recent if e.kind not in _BEGINNINGS), maxlen=_MOST_RECENT)

    def add_tracked(self, records: Sequence[MaskRecord]) -> None:
        """Add the records of a tracked frame."""
        self._records.extend(records)
        self.rows += len(records)
        self.tracked += 1

    def cut(self) -> FileContent | None:
        """Remove and return everything up to `covered`; None if it contains no frame."""
        first, last = self.first, self.covered - 1
        if last < first:
            return None
        # Events between two files are assigned to the nearest frame.
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
