"""Common behaviour of files and cameras: events of objects, calls of sinks, commits of ranges.

The same pictures, prompts and detections go through a `StreamTracker` and through a `LiveTracker`.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pytest
import torch
from support.live_scripted import ScriptedFeed
from support.small_net import SMALL_MEMORY, frame_at, small_model, square
from support.threads import torch_threads
from support.written import files

import pipeline.base.plugins as plugins
import pipeline.detect.protocol as detectors
from pipeline.analytics.query import query
from pipeline.base.errors import AnotherWriterError
from pipeline.base.records import Frame
from pipeline.detect.protocol import Detection
from pipeline.live.record import LiveRecord
from pipeline.live.spec import LiveSettings, LiveSpec
from pipeline.live.tracker import LiveTracker
from pipeline.prompts.resolving import PromptSet
from pipeline.tracking.files.stream_tracker import StreamTracker
from pipeline.tracking.settings import TrackSettings
from pipeline.tracking.stream_record import StreamRecord
from pipeline.tracks.masks import mask_to_rle
from pipeline.tracks.sinks import Sinks
from pipeline.tracks.store import StreamStore
from pipeline.video.sources import open_source
from xmem_core import VideoSegmenter

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.usefixtures("plugin")]

HEIGHT, WIDTH = 48, 64
CORRECTED, LARGER, REMOVED, FRAMES = 3, 5, 6, 8
ROTATE = 1000.0


class OneThing:
    """A detector with one detection on the first frame only."""

    def detect(self, frame: Frame) -> list[Detection]:
        seen = frame.frame_index == 0
        return [Detection(box=(40, 28, 12, 12), category="cat", score=0.75)] if seen else []

    def to_bytes(self) -> bytes:
        return b""

    def from_bytes(self, blob: bytes) -> None:
        if blob:
            raise ValueError("there is nothing to remember")


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"{__name__}:OneThing"
    registered = EntryPoints([EntryPoint("one-thing", name, detectors.ENTRY_POINT_GROUP)])
    monkeypatch.setattr(plugins, "entry_points", lambda group: registered.select(group=group))


@pytest.fixture(scope="module")
def segmenter() -> VideoSegmenter:
    return VideoSegmenter(small_model(), SMALL_MEMORY)


def picture(index: int) -> np.ndarray:
    return frame_at(index) if index < LARGER else frame_at(index, 60, 80)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for i in range(FRAMES):
        cv2.imwrite(str(folder / f"{i:03d}.png"), picture(i)[:, :, ::-1])
    return folder


def dog(frame: int, **more: Any) -> dict[str, Any]:
    mask = square(HEIGHT, WIDTH, 8, 4, 14)
    rle = {"size": [HEIGHT, WIDTH], "counts": mask_to_rle(mask)}
    return {"id": 1, "rle": rle, **({"frame": frame} if frame else {}), **more}


class Journal:
    """The order of calls, as (what, first frame); and a sink that keeps the rows it gets."""

    def __init__(self) -> None:
        self.done: list[tuple[str, int | None]] = []
        self.calls: list[tuple[int, int, list[Any], list[Any]]] = []

    def commit(self, stream_id: str, first: int, last: int, tracks: pa.Table, events: pa.Table) -> None:
        self.done.append(("sink", first))
        self.calls.append((first, last, tracks.to_pylist(), events.to_pylist()))

    @property
    def sinks(self) -> Sinks:
        return Sinks({"journal": self})

    def watch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def noted(owner: Any, name: str, word: str) -> None:
            inner = getattr(owner, name)

            def wrapped(this: Any, *arguments: Any, **more: Any) -> Any:
                self.done.append((word, arguments[0] if arguments else None))
                return inner(this, *arguments, **more)

            monkeypatch.setattr(owner, name, wrapped)

        noted(StreamRecord, "check_ours", "owner")
        noted(LiveRecord, "check_ours", "owner")
        noted(StreamStore, "commit", "commit")
        noted(StreamStore, "save_snapshot", "snapshot")


def file_tracker(images: Path, out: Path, segmenter: VideoSegmenter, sinks: Sinks | None) -> StreamTracker:
    settings = TrackSettings.of(
        detector="one-thing",
        detect_confirmations=1,
        detect_every=1,
        give_up_looks=100,
        chunk_frames=4,
        snapshot_chunks=1,
    ).of_segmenter(segmenter, threads=1)
    prompts = {
        "version": 1,
        "objects": [dog(0, category="dog"), dog(CORRECTED)],
        "remove": [{"frame": REMOVED, "id": 1}],
    }
    return StreamTracker(
        open_source(str(images)),
        StreamStore(out, "cam"),
        segmenter,
        settings,
        PromptSet.from_record(prompts),
        sinks=sinks,
    )


def step_all(stream: StreamTracker | LiveTracker, segmenter: VideoSegmenter) -> None:
    while (step := stream.next_input()) is not None:
        stream.accept(segmenter.step(step.state, step.image, step.prompt))


class Camera:
    """A live stream with a simulated clock."""

    def __init__(
        self,
        out: Path,
        segmenter: VideoSegmenter,
        sinks: Sinks | None,
        threads: int = 1,
        policy: str = "every",
        **more: Any,
    ) -> None:
        values: dict[str, Any] = {"detector": "one-thing", "prompts": {"objects": [dog(0, category="dog")]}}
        chosen = LiveSettings.from_dict(
            {
                "detect_confirmations": 1,
                "detect_every": 1,
                "give_up_looks": 100,
                "policy": policy,
                "rotate_seconds": ROTATE,
                "snapshot_seconds": ROTATE,
            }
        )
        spec = LiveSpec("cam", "fake://cam", settings=chosen, **(values | more))
        self.segmenter, self.clock = segmenter, 0.0
        self.tracker = LiveTracker(
            spec,
            StreamStore(out, "cam"),
            segmenter,
            TrackSettings().of_segmenter(segmenter, threads),
            lambda spec, ledger: ScriptedFeed(spec, ledger, picture),
            sinks=sinks,
            now=lambda: self.clock,
        )

    def show(self, frames: int) -> None:
        """Let the camera show frames up to this number."""
        self.tracker.source.allowed = frames  # type: ignore[attr-defined]
        step_all(self.tracker, self.segmenter)

    def rotate(self) -> None:
        """Let a file and a snapshot become due; returns once they are written."""
        self.clock += 2 * ROTATE
        self.tracker.tick()
        self.written()

    def written(self) -> None:
        self.tracker._committing.drain()


def track_file(images: Path, out: Path, segmenter: VideoSegmenter, journal: Journal) -> None:
    with file_tracker(images, out, segmenter, journal.sinks) as stream:
        step_all(stream, segmenter)


def track_camera(
    images: Path, out: Path, segmenter: VideoSegmenter, journal: Journal, threads: int = 1
) -> None:
    camera = Camera(out, segmenter, journal.sinks, threads)
    camera.show(CORRECTED)
    camera.tracker.request({"prompts": {"objects": [dog(0)]}})
    camera.show(4)
    camera.rotate()
    camera.show(REMOVED)
    camera.tracker.request({"remove": [1]})
    camera.show(FRAMES)
    camera.tracker.close("finished")


TRACK: dict[str, Callable[[Path, Path, VideoSegmenter, Journal], None]] = {
    "file": track_file,
    "camera": track_camera,
}
KINDS = sorted(TRACK)


def told(events: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [
        (e["frame_index"], e["kind"], e["reason"], e["object_id"], e["detail"] and json.loads(e["detail"]))
        for e in events
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_events_say_who_came_was_corrected_and_went(
    kind: str, tmp_path: Path, images: Path, segmenter: VideoSegmenter
) -> None:
    TRACK[kind](images, tmp_path, segmenter, Journal())
    events = query(tmp_path, "select * from events order by frame_index, object_id").to_pylist()
    assert told(events) == [
        (0, "object_added", "prompt", 1, {"category": "dog"}),
        (0, "object_added", "detector", 2, {"score": 0.75, "category": "cat"}),
        (CORRECTED, "corrected", "prompt", 1, None),
        (LARGER, "resized", None, None, {"from": [HEIGHT, WIDTH], "to": [60, 80]}),
        (REMOVED, "object_removed", "requested", 1, None),
    ]
    rows = query(tmp_path, "select frame_index, object_id, category from tracks order by all").to_pylist()
    assert [tuple(row.values()) for row in rows] == [
        (i, k, c) for i in range(FRAMES) for k, c in ((1, "dog"), (2, "cat")) if k == 2 or i < REMOVED
    ]


def test_snapshots_follow_requests_soon_and_detections_later(
    tmp_path: Path, segmenter: VideoSegmenter
) -> None:
    """A detector changes objects every few frames; a snapshot of many objects takes long."""

    def newest() -> int | None:
        found = StreamStore(tmp_path, "cam").load_snapshot(2**60, lambda blob: blob)
        return None if found is None else found[0]

    camera, snapshots = Camera(tmp_path, segmenter, None, prompts=None), []
    for frames, clock, removed in [
        (1, 2, []),
        (2, 9, []),
        (3, 11, []),
        (4, 30, [1]),
        (5, 30.5, []),
        (6, 31.5, []),
    ]:
        if removed:
            camera.tracker.request({"remove": removed})
        camera.clock = clock
        camera.show(frames)
        camera.written()
        snapshots.append(newest())
    camera.tracker.close()
    assert snapshots == [None, None, 3, 4, 4, 4]


def test_a_frame_encoded_while_the_detector_looks_gives_the_same_rows(
    tmp_path: Path, images: Path, segmenter: VideoSegmenter, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, calls = VideoSegmenter.encode, []

    def noted(self: VideoSegmenter, *arguments: Any) -> Any:
        calls.append((threading.current_thread().name, torch.get_num_threads()))
        return encode(self, *arguments)

    monkeypatch.setattr(VideoSegmenter, "encode", noted)
    with torch_threads(1):  # a step's, of the stream's two
        track_camera(images, tmp_path / "aside", segmenter, Journal(), threads=2)
        # The first frame is encoded in its step: until then there are no objects.
        assert calls == [("xmem-encode_0", 1)] * (FRAMES - 1)
        assert "xmem-encode_0" not in {thread.name for thread in threading.enumerate()}
        monkeypatch.setattr("pipeline.live.tracker.looks_ahead", lambda *_: False)
        track_camera(images, tmp_path / "alone", segmenter, Journal(), threads=2)
    assert len(calls) == FRAMES - 1
    rows = files(tmp_path / "alone")
    assert len(rows) == 4  # rows and events of two commits
    assert files(tmp_path / "aside") == rows


def test_the_next_frame_is_encoded_while_one_is_tracked_and_counted_once_whatever_comes_between(
    tmp_path: Path, segmenter: VideoSegmenter, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, order = VideoSegmenter.encode, []

    def noted(self: VideoSegmenter, *arguments: Any) -> Any:
        order.append("encode")
        return encode(self, *arguments)

    monkeypatch.setattr(VideoSegmenter, "encode", noted)
    with torch_threads(1):
        camera = Camera(tmp_path, segmenter, None, threads=2)
        tracker, ledger = camera.tracker, camera.tracker.source.ledger

        def tracked() -> int:
            step = tracker.next_input()
            assert step is not None
            order.append("step")
            tracker.accept(segmenter.step(step.state, step.image, step.prompt))
            return ledger.counts().tracked

        tracker.source.allowed = 6  # type: ignore[attr-defined]
        assert [tracked() for _ in range(3)] == [1, 2, 3]
        # The first frame has no objects yet. The third was read before the second was tracked.
        assert order.count("step") == 3
        assert order.count("encode") >= 2
        assert ledger.counts().in_flight == 1
        camera.rotate()  # while frame 3 is held: the file ends before it
        assert tracker.record.books.frames == 3
        tracker.request({"pause": True})
        assert tracker.next_input() is None
        assert ledger.counts().dropped == {"paused": 3}
        tracker.request({"pause": False})
        tracker.source.allowed = 9  # type: ignore[attr-defined]
        assert [tracked(), tracked()] == [4, 5]
        tracker.close()
    counts = ledger.counts()
    assert (counts.received, counts.tracked, counts.dropped) == (9, 5, {"paused": 3, "closed": 1})
    assert counts.settled
    books = query(tmp_path, "select distinct frame_index from tracks order by 1").to_pylist()
    assert [row["frame_index"] for row in books] == [0, 1, 2, 6, 7]


def test_a_frame_read_ahead_that_gets_too_old_is_dropped(tmp_path: Path, segmenter: VideoSegmenter) -> None:
    with torch_threads(1):
        camera = Camera(tmp_path, segmenter, None, threads=2, policy="latest")
        tracker, ledger = camera.tracker, camera.tracker.source.ledger
        for allowed, late in ((1, 0.0), (3, 0.0), (4, 5.0)):
            tracker.source.allowed = allowed  # type: ignore[attr-defined]
            camera.clock += late
            step = tracker.next_input()
            assert step is not None
            tracker.accept(segmenter.step(step.state, step.image, step.prompt))
        tracker.close()
    assert ledger.counts().settled
    assert (ledger.counts().tracked, ledger.counts().dropped) == (3, {"too old": 1})
    events = query(tmp_path, "select frame_index from events where kind = 'dropped'").to_pylist()
    assert [event["frame_index"] for event in events] == [2]


@pytest.mark.parametrize("kind", KINDS)
def test_sinks_get_each_range_once_as_it_is_committed(
    kind: str, tmp_path: Path, images: Path, segmenter: VideoSegmenter
) -> None:
    journal = Journal()
    TRACK[kind](images, tmp_path, segmenter, journal)
    assert [(first, last) for first, last, *_ in journal.calls] == [(0, 3), (4, 7)]
    rows = [row for _, _, tracks, _ in journal.calls for row in tracks]
    events = [event for _, _, _, happened in journal.calls for event in happened]
    stored = query(tmp_path, "select * exclude (stream_id) from tracks order by frame_index, object_id")
    assert rows == stored.to_pylist()
    columns = "select * exclude (stream_id) from events order by frame_index, object_id"
    assert (
        sorted(events, key=lambda e: (e["frame_index"], e["object_id"] or 99))
        == query(tmp_path, columns).to_pylist()
    )


def test_a_file_asks_once_whether_it_is_the_owner_and_a_camera_each_time(
    tmp_path: Path, images: Path, segmenter: VideoSegmenter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any sink. A second run of a file has the same rows; a second run of a camera has others."""
    done = {}
    for kind in KINDS:
        journal = Journal()
        with monkeypatch.context() as patched:
            journal.watch(patched)
            TRACK[kind](images, tmp_path / kind, segmenter, journal)
        done[kind] = [entry for entry in journal.done if entry[0] != "snapshot"]
    owner = ("owner", None)
    assert done["file"] == [
        owner, ("sink", 0), ("commit", 0), ("sink", 4), ("commit", 4), owner,
    ]  # fmt: skip
    for first in (0, 4):  # a camera's record is checked with each write besides
        at = done["camera"].index(("sink", first))
        assert done["camera"][at - 1 : at + 2] == [owner, ("sink", first), ("commit", first)]


@contextmanager
def stale(
    kind: str, images: Path, out: Path, segmenter: VideoSegmenter, sinks: Sinks
) -> Iterator[Callable[[], None]]:
    """A stream with four tracked frames, none of them committed; returns the call that commits them."""
    if kind == "file":
        with file_tracker(images, out, segmenter, sinks) as stream:
            while stream.next_frame < 4:
                step = stream.next_input()
                assert step is not None
                stream.accept(segmenter.step(step.state, step.image, step.prompt))
            yield lambda: step_all(stream, segmenter)
    else:
        camera = Camera(out, segmenter, sinks)
        camera.show(4)
        yield camera.rotate
        with pytest.raises(AnotherWriterError):
            camera.tracker.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_writer_whose_stream_is_started_over_reaches_no_sink(
    kind: str, tmp_path: Path, images: Path, segmenter: VideoSegmenter
) -> None:
    journal = Journal()
    with stale(kind, images, tmp_path, segmenter, journal.sinks) as commit:
        StreamStore(tmp_path, "cam").restart()
        with pytest.raises(AnotherWriterError, match="started over"):
            commit()
    assert journal.calls == []
    assert not list(tmp_path.rglob("*.parquet"))


def test_of_two_processes_that_follow_a_camera_the_later_one_owns_it(
    tmp_path: Path, segmenter: VideoSegmenter
) -> None:
    """The first run was thought dead: its rows reach neither sink nor store, and the second one continues."""
    first, second = Journal(), Journal()
    asleep = Camera(tmp_path, segmenter, first.sinks)
    asleep.show(4)
    asleep.rotate()
    asleep.show(6)
    awake = Camera(tmp_path, segmenter, second.sinks)
    with pytest.raises(AnotherWriterError, match="is tracked by another process by now"):
        asleep.rotate()
    with pytest.raises(AnotherWriterError):
        asleep.tracker.close()
    begin = awake.tracker.next_frame
    awake.show(begin + 3)
    awake.tracker.close("finished")
    assert [(start, last) for start, last, *_ in first.calls] == [(0, 3)]
    assert [(start, last) for start, last, *_ in second.calls] == [(4, begin + 2)]
    record = StreamStore(tmp_path, "cam").read_record()
    assert record is not None
    assert (record["state"], record["frames"]) == ("finished", begin + 3)
