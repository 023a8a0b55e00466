"""Streams with a detector: the same rows after any interruption."""

from __future__ import annotations

import json
import os
import random
import subprocess
from dataclasses import asdict, replace
from fractions import Fraction
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.forked import Forked
from support.interrupted import InterruptedRunError, stop_at
from support.tiny import CAPPED_MEMORY
from support.videos import make_video
from support.written import files

import pipeline.base.plugins as plugins
import pipeline.detect.protocol as detectors
from pipeline.analytics.query import query
from pipeline.base.errors import PromptError, SettingsConflictError, UsageError, XmemError
from pipeline.base.records import Frame
from pipeline.detect.protocol import Detection
from pipeline.prompts.resolving import PromptSet
from pipeline.tracking.files.executor import Executor
from pipeline.tracking.files.stream_tracker import StreamTracker
from pipeline.tracking.files.track import track
from pipeline.tracking.settings import TrackSettings
from pipeline.tracking.snapshots.stream import Snapshot
from pipeline.tracks.store import StreamStore
from pipeline.video.sources import open_source
from xmem_core import MemoryConfig, VideoSegmenter, load_model

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

WORKER = Path(__file__).parents[3] / "support" / "track_worker.py"
KILLS = int(os.environ.get("XMEM_CHAOS", "3"))
FRAMES = 48
PROMPTS: dict[str, Any] = {
    "version": 1,
    "objects": [
        {"frame": 4, "id": 1, "category": "corner", "polygons": [[2, 2, 24, 2, 24, 20, 2, 20]]},
        {"frame": 30, "id": 40, "polygons": [[60, 60, 90, 60, 90, 90, 60, 90]]},
    ],
    "remove": [{"frame": 36, "id": 1}],
}


def picture(index: int) -> np.ndarray:
    """160 x 120: a static texture; one dark object walks through after 1.5 s, another 1.2 s later."""
    rng = np.random.default_rng(3)
    coarse = rng.integers(90, 170, (12, 16, 3), dtype=np.uint8)
    image = np.asarray(cv2.resize(coarse, (160, 120), interpolation=cv2.INTER_CUBIC)).copy()
    for begin, top, colour in ((15, 20, (20, 20, 30)), (27, 70, (30, 20, 120))):
        left = 6 * (index - begin)
        if left > 0:
            image[top : top + 34, max(0, left - 14) : min(160, left)] = colour
    return image


def walk(folder: Path, frames: int, **recipe: Any) -> Path:
    """`picture` as a video at 10 frames per second."""
    pictures = [picture(i) for i in range(frames)]
    return make_video(folder / "walk.mkv", pictures, rate=10, time_base=Fraction(1, 10), **recipe)


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return walk(tmp_path_factory.mktemp("video"), FRAMES, b_frames=2, gop=8)


ARGUMENTS: dict[str, Any] = {
    "stream_id": "cam",
    "threads": 1,
    "dtype": "float32",
    "chunk_frames": 5,
    "snapshot_chunks": 2,
    "detector": "motion",
    "detect_every": 2,
    "out_of_sight_frames": 6,
}


def run(video: Path, out: Path, model: str, **changes: Any) -> Any:
    arguments = {
        **ARGUMENTS,
        "model": model,
        "memory": CAPPED_MEMORY,
        "prompts": PromptSet.from_record(PROMPTS),
    }
    return track(str(video), out, **(arguments | changes))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, video: Path, model: str) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    assert run(video, out, model).frames == FRAMES
    return out


def events(out: Path) -> list[dict[str, Any]]:
    ask = "select frame_index, kind, reason, object_id, detail from events order by all"
    found: list[dict[str, Any]] = query(out, ask).to_pylist()
    return found


def test_what_walks_in_becomes_an_object_beside_those_of_prompts(undisturbed: Path) -> None:
    found = [e for e in events(undisturbed) if e["reason"] == "detector"]
    assert found
    # The prompts use ids up to 40, though 40 itself comes later.
    assert [e["object_id"] for e in found] == list(range(41, 41 + len(found)))
    assert 16 < found[0]["frame_index"] < 30
    assert found[0]["frame_index"] % 2 == 0
    assert 0 < json.loads(found[0]["detail"])["score"] <= 1
    first = found[0]["frame_index"]
    row = query(
        undisturbed, f"select * from tracks where object_id = 41 and frame_index = {first}"
    ).to_pylist()[0]
    # The mask is the detector's: where the first thing walks, and about as large.
    assert 15 <= row["bbox_y"] <= 25
    assert 300 < row["area"] < 700
    by_prompt = [(e["frame_index"], e["object_id"]) for e in events(undisturbed) if e["reason"] == "prompt"]
    assert by_prompt == [(4, 1), (30, 40)]


def test_things_that_walk_through_come_and_go(tmp_path: Path) -> None:
    """With the bundled network, whose masks are meaningful."""
    run(walk(tmp_path, 72), tmp_path / "out", "xmem-lite", prompts=None, memory=MemoryConfig())
    happened = events(tmp_path / "out")
    assert [(e["kind"], e["object_id"]) for e in happened] == [
        ("object_added", 1),
        ("object_added", 2),
        ("object_removed", 1),
        ("object_removed", 2),
    ]
    assert {e["reason"] for e in happened[2:]} == {"out_of_sight"}
    # Both are found within a second of being wholly inside, and given up soon after they have left.
    for event, earliest, latest in zip(happened, (17, 29, 48, 60), (28, 40, 66, 72), strict=True):
        assert earliest < event["frame_index"] < latest
    # A thing keeps to its own way, 50 pixels from the other's. What is left of one at the edge, and
    # what the network makes of the second before that has a label of its own, is the network's affair.
    ask = (
        "select avg((abs(centroid_y - median) < 15)::int) as kept from (select *, median(centroid_y) over "
        "(partition by object_id) as median from tracks where area > 300 and score > 0.7) "
        "group by object_id"
    )
    kept = [row["kept"] for row in query(tmp_path / "out", ask).to_pylist()]
    assert len(kept) == 2
    assert min(kept) > 0.8


def test_every_living_object_has_a_row_on_every_frame(undisturbed: Path) -> None:
    lives: dict[int, list[int]] = {}
    for event in events(undisturbed):
        if event["kind"] == "object_added":
            lives[event["object_id"]] = [event["frame_index"], FRAMES]
        elif event["kind"] == "object_removed":
            lives[event["object_id"]][1] = event["frame_index"]
    rows = query(undisturbed, "select object_id, frame_index from tracks order by all").to_pylist()
    expected = sorted((i, f) for i, (first, end) in lives.items() for f in range(first, end))
    assert [(r["object_id"], r["frame_index"]) for r in rows] == expected


@pytest.mark.parametrize("stop_after", [3, 12, 20, 21, 25, 26, 33, 40, 46])
def test_interrupted_anywhere_it_ends_with_the_same_bytes(
    tmp_path: Path, undisturbed: Path, video: Path, model: str, stop_after: int
) -> None:
    with pytest.raises(InterruptedRunError):
        run(video, tmp_path, model, on_frame=stop_at(stop_after))
    summary = run(video, tmp_path, model)
    assert files(tmp_path, "tracks", "events", "streams") == files(undisturbed, "tracks", "events", "streams")
    # From a snapshot, not from the start.
    assert summary.tracked <= FRAMES - (stop_after - 1) // 5 * 5 + 10


def test_handed_from_process_to_process_it_ends_with_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, undisturbed: Path, video: Path, model: str
) -> None:
    network = load_model(model)
    segmenter = VideoSegmenter(network, CAPPED_MEMORY, size=network.config.default_size)
    chosen = TrackSettings.of(
        model=model, chunk_frames=5, snapshot_chunks=2, detector="motion", detect_every=2,
        out_of_sight_frames=6,
    ).of_segmenter(segmenter, threads=1)  # fmt: skip
    executor = Executor(segmenter, 1)
    prompts = PromptSet.from_record(PROMPTS)

    @settings(max_examples=6, suppress_health_check=[HealthCheck.too_slow])
    @given(
        hand_over=st.sets(st.integers(1, FRAMES // 5), max_size=6),
        drop=st.sets(st.integers(1, FRAMES // 5), max_size=2),
    )
    def check(hand_over: set[int], drop: set[int]) -> None:
        out = tmp_path_factory.mktemp("cut")

        def opened(state: bytes | None) -> StreamTracker:
            store = StreamStore(out, "cam")
            return StreamTracker(open_source(str(video)), store, segmenter, chosen, prompts, snapshot=state)

        stream = opened(None)
        due = hand_over | drop
        while executor.advance([stream]):
            chunk, rest = divmod(stream.next_frame, 5)
            if rest or chunk not in due or stream.position != stream.next_frame:
                continue
            due.remove(chunk)
            if not stream.settle():
                break
            # Handed over as bytes; or all that was not committed is lost.
            state = stream.export() if chunk in hand_over else None
            stream.close()
            stream = opened(state)
        stream.close()
        assert files(out, "tracks", "events") == files(undisturbed, "tracks", "events")

    check()


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_any_cut_into_chunks_gives_the_same_rows(
    tmp_path: Path, undisturbed: Path, video: Path, model: str, chunk: int
) -> None:
    run(video, tmp_path, model, chunk_frames=chunk)
    assert events(tmp_path) == events(undisturbed)
    ask = "select * from tracks order by frame_index, object_id"
    assert query(tmp_path, ask).equals(query(undisturbed, ask))


def test_without_prompts_and_going_on_without_any(tmp_path: Path, video: Path, model: str) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(video, whole, model, prompts=None)
    with pytest.raises(InterruptedRunError):
        run(video, cut, model, prompts=None, on_frame=stop_at(32))
    run(video, cut, model, prompts=None)
    assert files(cut, "tracks", "events") == files(whole, "tracks", "events")
    assert min(e["object_id"] for e in events(whole)) == 1
    assert {e["reason"] for e in events(whole)} <= {"detector", "out_of_sight"}


def test_snapshots_of_a_detector_that_are_damaged_are_passed_over(
    tmp_path: Path, undisturbed: Path, video: Path, model: str
) -> None:
    with pytest.raises(InterruptedRunError):
        run(video, tmp_path, model, on_frame=stop_at(44))
    stored = sorted((tmp_path / "state").rglob("*.safetensors"))
    snapshot = Snapshot.from_bytes(stored[-1].read_bytes())
    assert snapshot.finder is not None
    for finder in (None, snapshot.finder[:-9], b"?"):
        stored[-1].write_bytes(replace(snapshot, finder=finder).to_bytes())
        run(video, tmp_path, model, max_frames=None)
        assert files(tmp_path, "tracks", "events") == files(undisturbed, "tracks", "events")
        for last in sorted((tmp_path / "tracks").rglob("*.parquet"))[-1:]:
            last.unlink()


@pytest.mark.chaos
def test_killed_at_any_moment_it_ends_with_the_same_bytes(
    tmp_path: Path, undisturbed: Path, video: Path, model: str
) -> None:
    arguments = {**ARGUMENTS, "video": str(video), "prompts": PROMPTS, "model": model}
    arguments["memory"] = asdict(CAPPED_MEMORY)
    rng, kills, rounds = random.Random(7), 0, 0
    while kills < KILLS:
        out, code = tmp_path / str(rounds), None
        rounds += 1
        while code is None:
            with Forked(WORKER, [json.dumps({**arguments, "out": str(out)})]) as process:
                assert process.stdout.readline() == "go\n"
                try:
                    code = process.wait(timeout=rng.uniform(0.05, 1.2) if kills < KILLS else 300)
                except subprocess.TimeoutExpired:
                    process.kill()
                    kills += 1
        assert code == 0
        assert files(out, "tracks", "events") == files(undisturbed, "tracks", "events")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"detector": None}, "detector was 'motion', now None"),
        ({"detect_every": 3}, "detect_every was 2, now 3"),
        ({"max_objects": 2}, "max_objects was 8, now 2"),
        ({"out_of_sight_frames": 7}, "out_of_sight_frames was 6, now 7"),
    ],
)
def test_other_settings_are_refused_and_named(
    tmp_path: Path, video: Path, model: str, changes: dict[str, Any], said: str
) -> None:
    run(video, tmp_path, model, max_frames=6)
    with pytest.raises(SettingsConflictError, match=said):
        run(video, tmp_path, model, **({"max_frames": 6} | changes))


def test_streams_begun_before_there_were_detectors_go_on(tmp_path: Path, video: Path, model: str) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(video, whole, model, detector=None)
    with pytest.raises(InterruptedRunError):
        run(video, cut, model, detector=None, on_frame=stop_at(23))
    path = cut / "streams" / "cam.json"
    record = json.loads(path.read_text())
    for name in ("detector", "detect_every", "detect_confirmations", "max_objects", "out_of_sight_frames"):
        del record["settings"][name]
    path.write_text(json.dumps(record))
    summary = run(video, cut, model, detector=None, detect_every=9, max_objects=3)
    assert summary.resumed_at == 20
    assert summary.tracked < FRAMES
    assert files(cut, "tracks", "events") == files(whole, "tracks", "events")


def test_neither_prompts_nor_detector(tmp_path: Path, video: Path, model: str) -> None:
    with pytest.raises(PromptError, match=r"nothing to track: .*a detector"):
        run(video, tmp_path, model, detector=None, prompts=None)


def test_an_unknown_detector_is_said_before_anything_is_removed(
    tmp_path: Path, video: Path, model: str
) -> None:
    run(video, tmp_path, model, max_frames=6)
    before = files(tmp_path, "tracks", "events", "streams")
    with pytest.raises(UsageError, match="no detector 'emotion'; available: motion, people, file:PATH"):
        run(video, tmp_path, model, detector="emotion", restart=True)
    assert files(tmp_path, "tracks", "events", "streams") == before


class OneBox:
    """A plugin: a box on every frame, until it fails."""

    breaks_at = 1000

    def detect(self, frame: Frame) -> list[Detection]:
        if frame.frame_index >= self.breaks_at:
            raise RuntimeError("camera model lost")
        return [Detection(box=(70, 40, 30, 30), category="box", score=0.75)]

    def to_bytes(self) -> bytes:
        return b""

    def from_bytes(self, blob: bytes) -> None:
        if blob:
            raise ValueError("there is nothing to remember")


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    registered = EntryPoints(
        [EntryPoint("one-box", "test_stream_tracker_detector:OneBox", detectors.ENTRY_POINT_GROUP)]
    )
    monkeypatch.setattr(plugins, "entry_points", lambda group: registered.select(group=group))


@pytest.mark.usefixtures("plugin")
def test_a_plugins_boxes_become_objects_with_its_category(tmp_path: Path, video: Path, model: str) -> None:
    run(video, tmp_path, model, detector="one-box", prompts=None, max_frames=12, max_objects=1)
    (event,) = [e for e in events(tmp_path) if e["kind"] == "object_added"]
    assert (event["frame_index"], event["object_id"]) == (2, 1)
    assert event["detail"] == '{"category": "box", "score": 0.75}'
    rows = query(tmp_path, "select distinct object_id, category from tracks").to_pylist()
    assert rows == [{"object_id": 1, "category": "box"}]


@pytest.mark.usefixtures("plugin")
def test_a_detector_that_breaks_stops_the_stream_and_what_is_committed_stays(
    tmp_path: Path, video: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OneBox, "breaks_at", 13)
    with pytest.raises(XmemError, match="OneBox failed on frame 14: RuntimeError: camera model lost"):
        run(video, tmp_path, model, detector="one-box", prompts=None)
    assert StreamStore(tmp_path, "cam").committed().next_frame == 10
    monkeypatch.setattr(OneBox, "breaks_at", 1000)
    assert run(video, tmp_path, model, detector="one-box", prompts=None).resumed_at == 10


def test_admission_counts_what_may_be_found(tmp_path: Path, video: Path, model: str) -> None:
    network = load_model(model)
    segmenter = VideoSegmenter(network, CAPPED_MEMORY, size=48)
    counts = []
    for name in (None, "motion"):
        chosen = TrackSettings.of(model=model, detector=name, max_objects=5).of_segmenter(
            segmenter, threads=1
        )
        store = StreamStore(tmp_path / str(name), "cam")
        with StreamTracker(
            open_source(str(video)), store, segmenter, chosen, PromptSet.from_record(PROMPTS)
        ) as stream:
            counts.append(stream.most_objects)
    assert counts == [2, 7]
