"""Failures of a stream: no rows are lost, duplicated or mixed up, none is wrongly marked finished."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.tiny import SHORT_MEMORY
from support.videos import damage_packets, make_video
from support.written import files

from pipeline.analytics.query import query
from pipeline.base.errors import AnotherWriterError, PromptError, SourceError, StoreError, UsageError
from pipeline.base.records import Frame
from pipeline.prompts.resolving import PromptSet
from pipeline.tracking.files.executor import Executor
from pipeline.tracking.files.stream_tracker import StreamTracker
from pipeline.tracking.files.track import track
from pipeline.tracking.segmenters import open_segmenter
from pipeline.tracking.settings import ModelSettings, TrackSettings
from pipeline.tracks.store import StreamStore
from pipeline.video.sources import open_source
from pipeline.video.video_file import VideoFile
from xmem_core import MemoryConfig

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

FRAMES = 23
SQUARE = [[2, 28, 34, 28, 34, 55, 2, 55]]
PROMPTS: dict[str, Any] = {
    "version": 1,
    "objects": [
        {"id": 1, "category": "square", "polygons": SQUARE},
        {"id": 2, "box": [90, 70, 30, 30]},
        {"frame": 9, "id": 3, "polygons": [[60, 10, 90, 10, 90, 40, 60, 40]]},
    ],
    "remove": [{"frame": 15, "id": 2}],
}
OTHERS = {"version": 1, "objects": [{"id": 5, "polygons": [[60, 40, 99, 40, 99, 80]]}]}


class InterruptedRunError(Exception):
    pass


@pytest.fixture(autouse=True)
def _no_thread_stays() -> Iterator[None]:
    before = set(threading.enumerate())  # other modules' tests may have left some
    yield
    assert [t.name for t in threading.enumerate() if t.name.startswith("xmem-") and t not in before] == []


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_video(tmp_path_factory.mktemp("video") / "clip.mp4", FRAMES, gop=8)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, video: Path, model: str) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    assert run(video, out, model).frames == FRAMES
    return out


def run(video: Path, out: Path, model: str, /, stop: int | None = None, **changes: Any) -> Any:
    """`track` with small settings; `stop` interrupts it after this number of tracked frames."""

    def on_frame(stream: StreamTracker) -> None:
        if stream.next_frame == stop:
            raise InterruptedRunError

    arguments: dict[str, Any] = {
        "stream_id": "cam",
        "model": model,
        "threads": 1,
        "chunk_frames": 5,
        "snapshot_chunks": 2,
        "memory": SHORT_MEMORY,
        "prompts": PromptSet.from_record(PROMPTS),
        "on_frame": on_frame,
    }
    if stop is None:
        return track(video, out, **(arguments | changes))
    with pytest.raises(InterruptedRunError):
        track(video, out, **(arguments | changes))
    return None


def tracker(video: Path, out: Path, model: str, prompts: Any = PROMPTS) -> StreamTracker:
    segmenter = open_segmenter(ModelSettings(model), SHORT_MEMORY)
    settings = TrackSettings.of(model=model, chunk_frames=5, snapshot_chunks=2).of_segmenter(
        segmenter, threads=1
    )
    store = StreamStore(out, "cam")
    return StreamTracker(open_source(str(video)), store, segmenter, settings, PromptSet.from_record(prompts))


def snapshots(out: Path) -> list[int]:
    return sorted(int(p.stem) for p in (out / "state" / "cam").iterdir())


def record(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "streams" / "cam.json").read_text())
    return found


# --- snapshots -----------------------------------------------------------------------------------


def test_short_lives_take_snapshots_too(tmp_path: Path, undisturbed: Path, video: Path, model: str) -> None:
    """If killed more often than snapshots are due, it would only repeat frames and make no progress."""
    run(video, tmp_path, model, stop=8)
    run(video, tmp_path, model, stop=12)
    assert snapshots(tmp_path) == [10]
    run(video, tmp_path, model)
    assert files(tmp_path) == files(undisturbed)


def test_repeated_frames_take_the_snapshots_that_were_lost(
    tmp_path: Path, undisturbed: Path, video: Path, model: str
) -> None:
    run(video, tmp_path, model, stop=22)
    for path in (tmp_path / "state" / "cam").iterdir():
        path.unlink()
    run(video, tmp_path, model, stop=13)
    assert snapshots(tmp_path) == [10]
    summary = run(video, tmp_path, model)
    assert (summary.tracked, summary.resumed_at) == (FRAMES - 10, 20)
    assert files(tmp_path) == files(undisturbed)


def test_a_snapshot_of_another_run_is_not_taken(tmp_path: Path, video: Path, model: str) -> None:
    """Rows and record deleted by hand, but not the snapshots, which have other objects."""
    others = PromptSet.from_record(OTHERS)
    run(video, tmp_path / "clean", model, prompts=others)
    run(video, tmp_path / "out", model)
    assert snapshots(tmp_path / "out") == [20, 23]
    for path in [*(tmp_path / "out/tracks/stream_id=cam").iterdir(), tmp_path / "out/streams/cam.json"]:
        path.unlink()
    run(video, tmp_path / "out", model, prompts=others, snapshot_chunks=50, stop=22)
    assert snapshots(tmp_path / "out") == [20, 23]
    run(video, tmp_path / "out", model, prompts=others)
    assert files(tmp_path / "out", "tracks") == files(tmp_path / "clean", "tracks")


def test_a_snapshot_that_cannot_be_written_is_a_failure_after_its_rows(
    tmp_path: Path, undisturbed: Path, video: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise StoreError("no space left")

    monkeypatch.setattr(StreamStore, "save_snapshot", full)
    with pytest.raises(StoreError, match="no space left"):
        run(video, tmp_path, model)
    monkeypatch.undo()
    assert StreamStore(tmp_path, "cam").committed().next_frame == 10
    run(video, tmp_path, model)
    assert files(tmp_path) == files(undisturbed)


def test_damage_before_a_keyframe_is_told_of_after_a_seek_to_it(tmp_path: Path, model: str) -> None:
    """The frame before frame 70 is concealed, which is reported with frame 70; also when resumed there."""
    clean = make_video(tmp_path / "clean.mp4", 90, gop=10)
    broken = damage_packets(clean, tmp_path / "broken.mp4", [69], spared=0.5)
    settings: dict[str, Any] = {
        "prompts": PromptSet.from_record(OTHERS),
        "chunk_frames": 10,
        "snapshot_chunks": 7,
    }
    whole = run(broken, tmp_path / "whole", model, **settings)
    losses = query(tmp_path / "whole", "select frame_index, reason from events where kind = 'corrupt'")
    assert losses.to_pylist() == [{"frame_index": 70, "reason": "damaged picture"}]
    run(broken, tmp_path / "cut", model, stop=75, **settings)
    assert snapshots(tmp_path / "cut") == [70]
    again = run(broken, tmp_path / "cut", model, **settings)
    assert (again.tracked, again.losses) == (whole.frames - 70, whole.losses)
    assert files(tmp_path / "cut", "tracks", "events", "streams") == files(
        tmp_path / "whole", "tracks", "events", "streams"
    )


# --- records -------------------------------------------------------------------------------------


def test_only_boxes_are_kept_as_masks_in_the_record(undisturbed: Path) -> None:
    assert list(record(undisturbed)["resolved_prompts"]) == ["0"]
    assert [i for i, *_ in record(undisturbed)["resolved_prompts"]["0"]["masks"]] == [1, 2]


def test_frames_and_rows_of_the_record_are_the_committed_ones(
    tmp_path: Path, video: Path, model: str
) -> None:
    prompts = PROMPTS | {"objects": [*PROMPTS["objects"], {"frame": 12, "id": 4, "box": [60, 60, 30, 30]}]}
    run(video, tmp_path, model, prompts=PromptSet.from_record(prompts), stop=13)
    rows = query(tmp_path, "select count(*) as n from tracks").to_pylist()[0]["n"]
    assert (record(tmp_path)["frames"], record(tmp_path)["rows"]) == (10, rows)


@pytest.mark.parametrize(
    "first_try",
    [
        {"prompts": PromptSet.from_record({"version": 1, "objects": [{"id": 1, "box": [900, 9, 9, 9]}]})},
        {"prompts": PromptSet.from_record(OTHERS), "stop": 3},
        {"chunk_frames": 7, "memory": MemoryConfig(), "stop": 4},
    ],
)
def test_what_committed_nothing_binds_nobody(
    tmp_path: Path, undisturbed: Path, video: Path, model: str, first_try: dict[str, Any]
) -> None:
    """A corrected mask, after one of the wrong size, does not make another stream."""
    if "stop" in first_try:
        run(video, tmp_path, model, **first_try)
    else:
        with pytest.raises(PromptError):
            run(video, tmp_path, model, **first_try)
    run(video, tmp_path, model)
    assert files(tmp_path, "tracks", "events", "streams") == files(undisturbed, "tracks", "events", "streams")


@pytest.mark.parametrize(
    "content",
    [{"settings": 3}, {"prompts": None}, {"prompts": {"version": 9}}, {"resolved_prompts": {"0": 1}}],
)
def test_a_record_with_nonsense_in_it_is_one_clear_error(
    tmp_path: Path, video: Path, model: str, content: dict[str, Any]
) -> None:
    run(video, tmp_path, model, stop=7)
    (tmp_path / "streams" / "cam.json").write_text(json.dumps(record(tmp_path) | content))
    before = files(tmp_path)
    with pytest.raises((StoreError, UsageError), match=r"^[^\n]*restart[^\n]*$"):
        run(
            video, tmp_path, model, prompts=None if content.get("prompts") else PromptSet.from_record(PROMPTS)
        )
    assert files(tmp_path) == before
    run(video, tmp_path, model, restart=True)


@pytest.mark.parametrize(
    "wrong",
    [
        {"chunk_frames": 0},
        {"size": 3},
        {"device": "tpu9"},
        {"prompts": None},
        {"model": "xmem-huge"},
        {"box_segmenter": "sam9"},
        {"prompts": PromptSet.from_record({"version": 1, "objects": [{"id": 1, "box": [900, 9, 9, 9]}]})},
    ],
)
def test_a_wrong_request_to_start_over_removes_nothing(
    tmp_path: Path, video: Path, model: str, wrong: dict[str, Any]
) -> None:
    run(video, tmp_path, model, max_frames=7)
    before = files(tmp_path, "tracks", "events", "state", "streams")
    with pytest.raises(UsageError):
        run(video, tmp_path, model, restart=True, **wrong)
    assert files(tmp_path, "tracks", "events", "state", "streams") == before


def test_two_runs_with_other_settings_at_once_do_not_mix(tmp_path: Path, video: Path, model: str) -> None:
    """The other run begins and ends before this one has committed anything."""

    def meanwhile(stream: StreamTracker) -> None:
        if stream.next_frame == 3:
            run(video, tmp_path, model, chunk_frames=7)

    with pytest.raises(AnotherWriterError, match="chunk_frames was 7, now 5"):
        run(video, tmp_path, model, on_frame=meanwhile)
    assert (record(tmp_path)["state"], record(tmp_path)["settings"]["chunk_frames"]) == ("finished", 7)
    names = sorted(p.name for p in (tmp_path / "tracks/stream_id=cam").iterdir())
    assert names == [f"frames-{first:012d}.parquet" for first in range(0, FRAMES, 7)]


def test_a_stream_started_over_elsewhere_gets_no_record_of_the_old_run(
    tmp_path: Path, video: Path, model: str
) -> None:
    prompts = PROMPTS | {"objects": [*PROMPTS["objects"], {"frame": 12, "id": 4, "box": [60, 60, 30, 30]}]}

    def meanwhile(stream: StreamTracker) -> None:
        if stream.next_frame == 12:
            run(video, tmp_path, model, prompts=PromptSet.from_record(OTHERS), restart=True)

    with pytest.raises(AnotherWriterError):
        run(video, tmp_path, model, prompts=PromptSet.from_record(prompts), on_frame=meanwhile)
    assert record(tmp_path)["prompts"]["objects"][0]["id"] == 5
    assert query(tmp_path, "select distinct object_id from tracks").to_pylist() == [{"object_id": 5}]


def test_a_chunk_that_is_late_for_the_restart_does_not_stop_the_new_run(
    tmp_path: Path, video: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a slow disk: the old run's second chunk appears after the restart has removed everything."""
    run(video, tmp_path, model, stop=7)
    restart = StreamStore.restart
    late = tmp_path / "tracks" / "stream_id=cam" / "frames-000000000005.parquet"

    def restarting(self: StreamStore) -> None:
        restart(self)
        late.parent.mkdir(parents=True)
        late.write_bytes(b"of the old run, which takes it back soon")

    def meanwhile(stream: StreamTracker) -> None:
        if stream.next_frame == 2:
            late.unlink()

    monkeypatch.setattr(StreamStore, "restart", restarting)
    summary = run(
        video, tmp_path, model, prompts=PromptSet.from_record(OTHERS), restart=True, on_frame=meanwhile
    )
    assert summary.frames == FRAMES
    assert query(tmp_path, "select distinct object_id from tracks").to_pylist() == [{"object_id": 5}]


def test_removing_what_is_not_tracked_is_a_warning(tmp_path: Path, video: Path, model: str) -> None:
    prompts = PromptSet.from_record(OTHERS | {"remove": [{"frame": 2, "id": 9}]})
    summary = run(video, tmp_path, model, prompts=prompts, max_frames=4)
    assert summary.warnings == ["frame 2: no object 9 is tracked that could be removed"]


# --- failures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [0, 10, 20])
def test_a_commit_that_fails_is_never_passed_over(
    tmp_path: Path, undisturbed: Path, video: Path, model: str, monkeypatch: pytest.MonkeyPatch, first: int
) -> None:
    """20 is the last chunk: the run has tracked everything by then."""
    commit = StreamStore.commit

    def failing(self: StreamStore, begin: int, *rest: Any) -> bool:
        if begin == first:
            raise StoreError("no space left")
        return commit(self, begin, *rest)

    monkeypatch.setattr(StreamStore, "commit", failing)
    stream = tracker(video, tmp_path, model)
    executor = Executor(stream._segmenter)
    with pytest.raises(StoreError, match="no space left"):
        executor.run(stream)
    with pytest.raises(StoreError, match="no space left"):
        executor.run(stream)
    stream.close()
    assert record(tmp_path)["state"] == "running"
    monkeypatch.undo()
    run(video, tmp_path, model)
    assert files(tmp_path) == files(undisturbed)


def test_a_source_that_fails_has_not_come_to_its_end(
    tmp_path: Path, undisturbed: Path, video: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = VideoFile.frames

    def failing(self: VideoFile, *given: Any, **named: Any) -> Iterator[Frame]:
        for frame in frames(self, *given, **named):
            if frame.frame_index == 12:
                raise SourceError("the network is gone")
            yield frame

    monkeypatch.setattr(VideoFile, "frames", failing)
    stream = tracker(video, tmp_path, model)
    executor = Executor(stream._segmenter)
    for _ in range(2):
        with pytest.raises(SourceError, match="the network is gone"):
            executor.run(stream)
    stream.close()
    assert (record(tmp_path)["state"], stream.summary.frames) == ("running", 10)
    monkeypatch.undo()
    run(video, tmp_path, model)
    assert files(tmp_path) == files(undisturbed)


def test_a_video_that_ends_before_its_rows_do_is_not_finished(
    tmp_path: Path, video: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(video, tmp_path, model, stop=22)
    frames = VideoFile.frames

    def shorter(self: VideoFile, *given: Any, **named: Any) -> Iterator[Frame]:
        return (f for f in frames(self, *given, **named) if f.frame_index < 12)

    for path in (tmp_path / "state" / "cam").iterdir():
        path.unlink()
    monkeypatch.setattr(VideoFile, "frames", shorter)
    with pytest.raises(SourceError, match="ends at frame 12, but 20 frames"):
        run(video, tmp_path, model)
    assert record(tmp_path)["state"] == "failed"


def test_streams_lose_nothing_by_one_that_fails(
    tmp_path: Path, undisturbed: Path, video: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One stream fails at its input, another at its result; no frame is lost."""
    late = {"frame": 12, "id": 9, "box": [900, 9, 9, 9]}
    good, no_input, no_result = (
        tracker(video, tmp_path / name, model, prompts)
        for name, prompts in (
            ("good", PROMPTS),
            ("no_input", PROMPTS | {"objects": [*PROMPTS["objects"], late]}),
            ("no_result", PROMPTS),
        )
    )

    def failing(frame: Frame, result: Any) -> None:
        raise MemoryError("no room for the mask")

    executor = Executor(good._segmenter)
    # Both orders: the failing one is asked before the good one, and after it.
    streams = [no_result, good, no_input]
    while good.next_frame < 7:
        executor.advance(streams)
    monkeypatch.setattr(no_result, "_take", failing)
    with pytest.raises(MemoryError):
        executor.advance(streams)
    with pytest.raises(MemoryError):
        executor.advance(streams)
    while good.next_frame < 12:
        executor.advance([good, no_input])
    with pytest.raises(PromptError):
        executor.advance([good, no_input])
    with pytest.raises(PromptError):
        executor.advance([good, no_input])
    while executor.advance([good]):
        pass
    for stream in (good, no_input, no_result):
        stream.close()
    assert files(tmp_path / "good") == files(undisturbed)


def test_an_input_stays_the_same_until_it_is_accepted(tmp_path: Path, video: Path, model: str) -> None:
    with tracker(video, tmp_path, model) as stream:
        step = stream.next_input()
        assert stream.next_input() is step
        assert step is not None
        stream.accept(stream._segmenter.step(step.state, step.image, step.prompt))
        assert stream.next_input() is not step
    # Closed is not finished.
    with pytest.raises(RuntimeError, match="the stream is closed"):
        stream.next_input()
    assert record(tmp_path)["state"] == "running"


@pytest.mark.parametrize("stop", [1, 6, FRAMES])
def test_an_interrupt_from_the_keyboard_leaves_no_threads(
    tmp_path: Path, undisturbed: Path, video: Path, model: str, stop: int
) -> None:
    def interrupt(stream: StreamTracker) -> None:
        if stream.next_frame == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(video, tmp_path, model, on_frame=interrupt)
    run(video, tmp_path, model)
    assert files(tmp_path) == files(undisturbed)
