"""Stored data of a live stream: record, snapshots, spec and recent results."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.base.errors import (
    AnotherWriterError,
    PromptError,
    SettingsConflictError,
    StoreError,
    UsageError,
    XmemError,
)
from pipeline.base.records import Event, Frame, MaskRecord, events_table, tracks_table
from pipeline.live.camera.ledger import LedgerCounts
from pipeline.live.recent import LiveView
from pipeline.live.record import Books, LiveRecord
from pipeline.live.spec import LivePrompts, LiveSettings, LiveSpec
from pipeline.tracking.snapshots.live import LiveSnapshot
from pipeline.tracking.snapshots.stream import Snapshot
from pipeline.tracks.store import StreamStore

NOON = datetime(2026, 7, 1, 12, tzinfo=UTC)


def rows(*frames: int) -> list[MaskRecord]:
    return [MaskRecord(i, 1, 8, 8, 0, 0.0) for i in frames]


def commit(store: StreamStore, first: int, last: int, events: list[Event]) -> None:
    store.commit(first, last, tracks_table(rows(first, last)), events_table(events))


def test_files_that_the_record_does_not_know_yet_count(tmp_path: Path) -> None:
    store = StreamStore(tmp_path, "cam")
    record = LiveRecord(store, {"source": "x"})
    assert not record.resumed
    record.reserve(frames=64, ids=16)
    commit(
        store, 0, 9, [Event(0, "object_added", "prompt", object_id=1), Event(3, "dropped", "queue full", 2)]
    )
    books = Books(10, LedgerCounts(10, 8, {"queue full": 2}), 2, {1: None}, 0.5)
    record.committed(books, frames=70, facts={"width": 8})
    added = Event(11, "object_added", "detector", object_id=2, detail={"category": "dog"})
    commit(store, 10, 29, [Event(12, "dropped", "queue full", 3), Event(13, "corrupt", "damaged", 4), added])
    commit(store, 30, 31, [Event(30, "object_removed", "requested", object_id=1)])

    again = LiveRecord(StreamStore(tmp_path, "cam"), {"source": "x"})
    assert again.resumed
    assert not again.finished
    assert again.books.frames == 32
    assert again.books.ledger == LedgerCounts(32, 23, {"queue full": 5}, {"damaged": 4})
    assert again.books.rows == 6
    assert again.books.objects == {2: "dog"}
    assert again.books.pts_seconds == 0.5  # neither rows nor events have times
    assert (again.frames_reserved, again.ids_reserved) == (70, 16)


@pytest.mark.parametrize(("row", "event", "newest"), [(None, None, 2), (3, None, 3), (3, 4, 4), (None, 4, 4)])
def test_times_go_on_after_those_of_files_that_the_record_does_not_know_yet(
    tmp_path: Path, row: int | None, event: int | None, newest: int
) -> None:
    """Killed between a file and the record: the next frame's time must be after that of the file's rows."""

    def times(second: int) -> dict[str, Any]:
        return {"pts_seconds": float(second), "wall_time": NOON + timedelta(seconds=second)}

    store = StreamStore(tmp_path, "cam")
    record = LiveRecord(store, {"source": "x"})
    record.reserve(frames=64, ids=16)
    commit(store, 0, 9, [])
    record.committed(Books(10, LedgerCounts(10, 10), 2, {}, **times(2)), frames=70, facts={})
    mine = (
        [] if row is None else [replace(r, **times(s)) for r, s in zip(rows(11, 12), (1, row), strict=True)]
    )
    events = [] if event is None else [Event(13, "dropped", "queue full", **times(event))]
    store.commit(10, 13, tracks_table(mine), events_table(events))

    found = LiveRecord(StreamStore(tmp_path, "cam"), {"source": "x"}).books
    assert found.frames == 14
    assert {"pts_seconds": found.pts_seconds, "wall_time": found.wall_time} == times(newest)


def test_requests_are_durable_and_roll_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = StreamStore(tmp_path, "cam")
    record = LiveRecord(store, {})
    record.reserve(ids=5)
    first = record.ask(lambda free: ({"prompts": {"version": 1, "objects": [{"id": free}]}}, [free]))
    assert first.number == 1
    assert first.object_ids == [5]
    assert record.ids_reserved == 6

    def broken(record: Any) -> None:
        raise StoreError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(store, "write_record", broken)
        with pytest.raises(StoreError):
            record.ask(lambda free: ({"pause": True}, ()))
    assert [r.number for r in record.requests()] == [1]
    assert record.ask(lambda free: ({"pause": True}, ())).number == 2
    again = LiveRecord(StreamStore(tmp_path, "cam"), {})
    assert [dict(r.content) for r in again.requests(1)] == [{"pause": True}]
    again.forget(1)
    again.rest("finished", frames=0, ids=1)
    third = LiveRecord(StreamStore(tmp_path, "cam"), {})
    assert third.finished
    assert [r.number for r in third.requests()] == [2]
    assert third.last_request == 2
    third.close()
    with pytest.raises(XmemError, match="being closed"):
        third.ask(lambda free: ({"pause": True}, ()))


def test_requests_that_wait_are_bounded_in_size(tmp_path: Path) -> None:
    record = LiveRecord(StreamStore(tmp_path, "cam"), {})
    large = {"prompts": {"version": 1, "objects": [{"id": 1, "category": "x" * (5 << 20)}]}}
    for _ in range(3):
        record.ask(lambda free: (large, [1]))
    with pytest.raises(StoreError, match="20 MiB would wait"):
        record.ask(lambda free: (large, [1]))
    assert record.last_request == 3
    record.forget(1)
    assert record.ask(lambda free: (large, [1])).number == 4


def test_foreign_and_damaged_records(tmp_path: Path) -> None:
    store = StreamStore(tmp_path, "cam")
    commit(store, 0, 1, [])
    with pytest.raises(SettingsConflictError, match="not live"):
        LiveRecord(store, {})
    store.write_record({"live": {"books": 3}})
    with pytest.raises(StoreError, match="damaged"):
        LiveRecord(store, {})
    record = LiveRecord(StreamStore(tmp_path, "other"), {})
    record.committed(Books(9, LedgerCounts(9, 9)), frames=9, facts={})
    with pytest.raises(StoreError, match="its record says 9 frames, its files hold 0"):
        LiveRecord(StreamStore(tmp_path, "other"), {})


def test_snapshots_come_back_and_damage_is_seen() -> None:
    inner = Snapshot(7, b"abc", "run", 1.5, (4, 5), ((1, "dog"),), 9, 2, b"finder")
    snapshot = LiveSnapshot(inner, None, 3, True)
    blob = snapshot.to_bytes()
    assert LiveSnapshot.from_bytes(blob) == snapshot
    for bad in (b"", blob[:-1], blob.replace(b'applied\\": 3', b'applied\\": 4'), inner.to_bytes()):
        with pytest.raises(ValueError, match="damaged or foreign"):
            LiveSnapshot.from_bytes(bad)


@pytest.mark.parametrize(
    "values",
    [
        {"fps": 0},
        {"fps": float("nan")},
        {"fps": True},
        {"max_objects": 257},
        {"max_objects": 2.5},
        {"policy": "all"},
        {"size": 8},
        {"size": "48"},
        {"expected_width": 10**9},
        {"unknown": 1},
    ],
)
def test_settings_that_make_no_sense(values: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        LiveSettings.from_dict(values)


def test_specs_keep_secrets_and_check_prompts() -> None:
    spec = LiveSpec("cam", "rtsp://me:secret@host/x")
    assert "secret" not in repr(spec)
    assert spec.shown_url == "rtsp://host/x"
    for bad in ("host/x", "rtsp://a\0b", 5):
        with pytest.raises(UsageError):
            LiveSpec("cam", bad)  # type: ignore[arg-type]
    with pytest.raises(UsageError):
        LiveSpec("../cam", "rtsp://host/x")
    box = {"box": [1, 1, 2, 2]}
    wrong: list[Any] = [[], {"objects": []}, {"objects": [{"frame": 3, **box}]}]
    for prompts in [*wrong, {"objects": [box, {"id": 0, **box}]}]:
        with pytest.raises(PromptError):
            LivePrompts.of(prompts)
    with pytest.raises(PromptError, match="removals"):
        LivePrompts.of({"objects": [box], "remove": [{"frame": 0, "id": 1}]})
    assert [o.object_id for o in LivePrompts.of({"objects": [box, box]}).objects] == [1, 2]


def frame(index: int) -> Frame:
    return Frame(np.zeros((8, 8, 3), np.uint8), index, index / 10)


def test_the_recent_past_is_bounded_and_given_by_whole_frames() -> None:
    view = LiveView(most_records=7)
    for i in range(5):
        view.publish(frame(i), [MaskRecord(i, k, 8, 8, 0, 0.0) for k in (1, 2)])
    assert [r["frame_index"] for r in view.tracks()] == [1, 2, 2, 3, 3, 4, 4]
    assert [r["frame_index"] for r in view.tracks(since=1, limit=3)] == [2, 2]
    assert [r["frame_index"] for r in view.tracks(since=3, limit=1)] == [4]
    assert view.tracks(since=4) == []
    with pytest.raises(UsageError):
        view.tracks(limit=0)


def test_whoever_waits_gets_the_newest_and_is_let_go() -> None:
    view = LiveView()
    got: list[Any] = []
    waiting = threading.Thread(target=lambda: got.append(view.wait(4, 30)))
    waiting.start()
    for i in range(6):
        view.publish(frame(i), [])
    waiting.join(30)
    assert got[0]["seq"] == 5
    waiting = threading.Thread(target=lambda: got.append(view.wait(5, 30)))
    waiting.start()
    time.sleep(0.05)
    view.close()
    waiting.join(30)
    assert got[1] is None
    first = view.jpeg()
    assert view.jpeg() is first


def test_who_writes_last_owns_the_stream(tmp_path: Path) -> None:
    first = LiveRecord(StreamStore(tmp_path, "cam"), {})
    first.reserve(frames=10)
    second = LiveRecord(StreamStore(tmp_path, "cam"), {})
    first.check_ours()  # the second one has only looked so far
    second.reserve(frames=20)
    attempts: list[Callable[[], object]] = [
        first.check_ours,
        lambda: first.reserve(frames=30),
        lambda: first.ask(lambda free: ({"pause": True}, ())),
        lambda: first.committed(Books(), frames=0, facts={}),
        lambda: first.rest("finished", frames=0, ids=1),
    ]
    for attempt in attempts:
        with pytest.raises(AnotherWriterError, match="tracked by another process by now"):
            attempt()
    second.check_ours()
    second.rest("running", frames=12, ids=1)
    assert LiveRecord(StreamStore(tmp_path, "cam"), {}).frames_reserved == 12
    # One of an earlier version names no owner.
    record = dict(StreamStore(tmp_path, "cam").read_record() or {})
    del record["live"]["owner"]
    StreamStore(tmp_path, "cam").write_record(record)
    third = LiveRecord(StreamStore(tmp_path, "cam"), {})
    third.reserve(frames=30)
    third.check_ours()
