"""The queue between camera and tracker: bounded, ordered, with an event for every lost frame."""

from __future__ import annotations

import threading
from datetime import UTC, datetime
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from pipeline.base.records import Event
from pipeline.live.camera.clock import Stamp
from pipeline.live.camera.ledger import Ledger
from pipeline.live.camera.queue import LiveQueue, PendingEvents, Waiting

STAMP = Stamp(1.0, datetime(2030, 1, 1, tzinfo=UTC), "arrival")


class Time:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def queue(**more: Any) -> tuple[LiveQueue, Ledger]:
    ledger = Ledger()
    return LiveQueue(ledger, **more), ledger


def put(to: LiveQueue, count: int = 1, size: int = 1, arrival: float = 0.0) -> None:
    for _ in range(count):
        assert to.put("picture", STAMP, size, arrival)


def got(of: LiveQueue) -> Waiting:
    item = of.get(0)
    assert item is not None
    return item


def events(item: Waiting) -> list[tuple[str, str | None, int]]:
    return [(e.kind, e.reason, e.count) for e in item.events.events(item.frame_index, STAMP)]


def test_lost_frames_take_numbers_and_go_out_with_the_next() -> None:
    frames, ledger = queue()
    frames.lost("dropped", "before the first keyframe", 3)
    put(frames)
    frames.lost("corrupt", "decode error", 1)
    frames.lost("corrupt", "decode error", 1)
    frames.note("gap", "stalled", {"seconds": 2.0})
    put(frames)
    first, second = got(frames), got(frames)
    assert (first.frame_index, second.frame_index) == (3, 6)
    assert events(first) == [("dropped", "before the first keyframe", 3)]
    assert events(second) == [("corrupt", "decode error", 2), ("gap", "stalled", 1)]
    assert ledger.counts().received == 7
    assert second.events.events(6, STAMP)[1] == Event(
        6, "gap", "stalled", 1, 1.0, STAMP.wall_time, detail={"seconds": 2.0}
    )


def test_the_latest_push_out_the_oldest_whose_events_stay() -> None:
    frames, ledger = queue(max_frames=2)
    frames.note("gap", "stalled", {"seconds": 1.0})
    put(frames, 5)
    item = got(frames)
    assert item.frame_index == 3
    assert events(item) == [("gap", "stalled", 1), ("dropped", "queue full", 3)]
    assert events(got(frames)) == []
    assert frames.get(0) is None
    ledger.tracked(2)
    assert ledger.counts().settled


def test_bytes_are_a_limit_too_but_one_frame_always_fits() -> None:
    frames, _ = queue(max_frames=100, max_bytes=10)
    put(frames, size=50)
    assert got(frames).frame_index == 0
    put(frames, 3, size=4)
    assert got(frames).frame_index == 2


def test_the_too_old_are_dropped_when_asked_for() -> None:
    time = Time()
    frames, ledger = queue(max_frames=10, max_age_seconds=1.0, now=time)
    put(frames, 3, arrival=0.0)
    put(frames, 1, arrival=1.5)
    time.now = 2.0
    item = got(frames)
    assert item.frame_index == 3
    assert events(item) == [("dropped", "too old", 3)]
    put(frames, 1, arrival=2.0)
    time.now = 9.0
    assert frames.get(0) is None
    assert ledger.counts().dropped == {"too old": 4}
    put(frames, 1, arrival=9.0)
    assert events(got(frames)) == [("dropped", "too old", 1)]


def test_every_waits_for_room() -> None:
    frames, ledger = queue(policy="every", max_frames=2)
    put(frames, 2)
    done = threading.Event()

    def third() -> None:
        put(frames)
        done.set()

    thread = threading.Thread(target=third)
    thread.start()
    assert not done.wait(0.1)
    assert got(frames).frame_index == 0
    assert done.wait(10)
    thread.join()
    assert [got(frames).frame_index, got(frames).frame_index] == [1, 2]
    assert not ledger.counts().dropped


def test_closing_lets_everybody_go_and_drops_the_rest() -> None:
    frames, ledger = queue(policy="every", max_frames=1)
    put(frames)
    results: list[bool] = []
    thread = threading.Thread(target=lambda: results.append(frames.put("picture", STAMP, 1, 0.0)))
    thread.start()
    while ledger.counts().received < 2:
        threading.Event().wait(0.01)
    frames.close()
    thread.join(10)
    assert results == [False]
    assert frames.closed
    assert frames.get() is None
    assert [(e.kind, e.reason, e.count) for e in frames.trailing()] == [("dropped", "closed", 2)]
    assert ledger.counts().settled


def test_a_reader_that_waits_is_woken_by_the_end() -> None:
    frames, _ = queue()
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(frames.get()))
    thread.start()
    frames.end()
    thread.join(10)
    assert results == [None]
    assert frames.closed


def test_after_the_end_what_is_left_can_be_had() -> None:
    frames, _ = queue()
    put(frames, 2)
    frames.end()
    assert not frames.closed
    got(frames), got(frames)
    assert frames.get() is None
    assert frames.closed


def test_pending_events_are_bounded_and_their_counts_exact() -> None:
    pending = PendingEvents()
    for i in range(1000):
        pending.add("gap", "stalled", 1, {"seconds": 0.5, "tries": i})
        pending.add("dropped", "queue full", 2)
    found = pending.events(0, None)
    assert len(found) <= 65
    assert sum(e.count for e in found if e.kind == "gap") == 1000
    assert sum(e.count for e in found if e.kind == "dropped") == 2000
    assert sum(e.detail["seconds"] for e in found if e.detail) == 500.0


@given(
    st.lists(st.sampled_from(["put", "get", "lost", "corrupt", "note"]), max_size=60),
    st.integers(1, 4),
)
def test_whatever_happens_it_adds_up(calls: list[str], max_frames: int) -> None:
    frames, ledger = queue(max_frames=max_frames)
    seen: list[Event] = []
    numbers: list[int] = []
    for call in calls:
        if call == "put":
            put(frames)
        elif call == "get":
            item = frames.get(0)
            if item is not None:
                ledger.tracked()
                numbers.append(item.frame_index)
                seen += item.events.events(item.frame_index, item.stamp)
        elif call == "note":
            frames.note("gap", "stalled")
        else:
            frames.lost("dropped" if call == "lost" else "corrupt", "r", 2)
    frames.close()
    seen += frames.trailing()
    counts = ledger.counts()
    assert counts.settled
    assert counts.received == frames.next_index
    assert numbers == sorted(set(numbers))
    assert sum(e.count for e in seen if e.kind == "dropped") == counts.dropped_total
    assert sum(e.count for e in seen if e.kind == "corrupt") == counts.corrupt_total
    assert sum(e.count for e in seen if e.kind == "gap") == calls.count("note")
    assert [e.frame_index for e in seen] == sorted(e.frame_index for e in seen)
