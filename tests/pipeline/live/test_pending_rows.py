"""Pending rows: losses by reason, failed frames, files without gaps and with correct totals."""

from __future__ import annotations

import numpy as np

from pipeline.base.records import Event, Frame, MaskRecord
from pipeline.live.camera.ledger import LedgerCounts
from pipeline.live.pending_rows import Unwritten
from pipeline.live.record import Books

IMAGE = np.zeros((8, 8, 3), np.uint8)


def frame(index: int) -> Frame:
    return Frame(IMAGE, index, index / 10)


def track(unwritten: Unwritten, index: int, objects: int = 1) -> None:
    unwritten.covered = index + 1
    unwritten.add_tracked([MaskRecord(index, i, 8, 8, 0, 0.0) for i in range(1, objects + 1)])


def test_without_a_frame_there_is_no_file() -> None:
    unwritten = Unwritten(Books(), 0)
    unwritten.add(Event(0, "gap"))
    assert unwritten.cut() is None
    assert unwritten.worth_a_file


def test_files_follow_one_another_and_count_from_the_beginning() -> None:
    books = Books(10, LedgerCounts(10, 7, {"too old": 2}, {"damaged": 1}), 14)
    unwritten = Unwritten(books, 12)
    unwritten.add(Event(10, "dropped", "restart", 2))
    for index in (12, 13):
        track(unwritten, index, objects=2)
    content = unwritten.cut()
    assert content is not None
    assert (content.first, content.last, content.rows, len(content.records)) == (10, 13, 18, 4)
    assert content.counts == LedgerCounts(14, 9, {"too old": 2, "restart": 2}, {"damaged": 1})
    assert content.counts.settled
    assert (unwritten.waiting_rows, unwritten.worth_a_file, unwritten.cut()) == (0, False, None)
    track(unwritten, 14)
    again = unwritten.cut()
    assert again is not None
    assert (again.first, again.last, again.rows, again.counts.tracked) == (14, 14, 19, 10)
    assert (again.events, unwritten.first) == ([], 15)
    assert len(content.records) == 4  # what was cut does not change


def test_losses_of_a_reason_are_one_event_of_a_file() -> None:
    unwritten = Unwritten(Books(), 0)
    for index in range(3):
        unwritten.happened(frame(index), "dropped", reason="too old")
    unwritten.add(Event(3, "corrupt", "damaged", 4))
    assert not unwritten.worth_a_file
    assert unwritten.corrupt == 4
    unwritten.covered = 7
    content = unwritten.cut()
    assert content is not None
    assert [(e.frame_index, e.kind, e.count) for e in content.events] == [
        (0, "dropped", 3),
        (3, "corrupt", 4),
    ]
    assert content.counts.settled
    unwritten.happened(frame(7), "dropped", reason="too old")
    unwritten.covered = 8
    again = unwritten.cut()
    assert again is not None
    assert [(e.frame_index, e.count) for e in again.events] == [(7, 1)]
    assert again.counts.dropped == {"too old": 4}


def test_events_are_told_with_a_frame_of_the_file() -> None:
    unwritten = Unwritten(Books(5, LedgerCounts(5, 5)), 5)
    unwritten.add(Event(9, "reconnect"))
    unwritten.add(Event(2, "gap"))
    track(unwritten, 5)
    track(unwritten, 6)
    content = unwritten.cut()
    assert content is not None
    assert [(e.frame_index, e.kind) for e in content.events] == [(5, "gap"), (6, "reconnect")]


def test_viewers_are_told_what_happened_once() -> None:
    unwritten = Unwritten(Books(), 0)
    unwritten.add(Event(0, "gap"))
    unwritten.happened(frame(0), "dropped", reason="too old")
    unwritten.begin_frame()
    unwritten.happened(frame(1), "object_added", object_id=2)
    unwritten.take_back()
    unwritten.begin_frame()
    unwritten.happened(frame(2), "object_added", object_id=2)
    assert [(e.frame_index, e.kind) for e in unwritten.take_recent()] == [(0, "gap"), (2, "object_added")]
    assert unwritten.take_recent() == []
    unwritten.covered = 3
    content = unwritten.cut()
    assert content is not None
    assert len(content.events) == 3


def test_what_a_failed_frame_began_did_not_happen() -> None:
    unwritten = Unwritten(Books(), 0)
    unwritten.happened(frame(0), "object_added", object_id=1)
    unwritten.begin_frame()
    unwritten.happened(frame(1), "object_removed", object_id=1)
    unwritten.happened(frame(1), "object_added", object_id=2)
    unwritten.happened(frame(1), "corrected", object_id=3)
    unwritten.take_back()
    unwritten.covered = 2
    content = unwritten.cut()
    assert content is not None
    assert [(e.kind, e.object_id) for e in content.events] == [("object_added", 1), ("object_removed", 1)]
    assert content.events[1].pts_seconds == 0.1
