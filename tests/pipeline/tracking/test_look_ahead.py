"""Frames encoded ahead: with two threads rows are those of a loop that encodes each frame in its own step."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.interrupted import InterruptedRunError, stop_at
from support.prompted import three_objects
from support.small_net import small_model
from support.threads import torch_threads
from support.tiny import CAPPED_MEMORY
from support.videos import make_video
from support.written import files

from pipeline.prompts.resolving import PromptSet
from pipeline.tracking import look_ahead, objects
from pipeline.tracking.files.executor import Executor
from pipeline.tracking.files.track import track
from pipeline.tracking.memory_plan import predict_ahead_bytes
from pipeline.tracks.masks import tracked_records
from pipeline.video.sources import open_source
from xmem_core import VideoSegmenter

FRAMES = 33


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    with torch_threads(2):
        yield


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_video(tmp_path_factory.mktemp("video") / "clip.mkv", FRAMES, width=158, height=122, gop=8)


def run(video: Path, out: Path, model: str, **changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "stream_id": "cam",
        "model": model,
        "threads": 2,
        "dtype": "float32",
        "chunk_frames": 5,
        "snapshot_chunks": 2,
        "memory": CAPPED_MEMORY,
        "prompts": PromptSet.from_record(three_objects(correct_at=21)),
    }
    return track(str(video), out, **(arguments | changes))


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Thread and number of torch's threads of each call of `encode`."""
    calls: list[tuple[str, int]] = []
    encode = VideoSegmenter.encode

    def noted(self: VideoSegmenter, *arguments: Any) -> Any:
        calls.append((threading.current_thread().name, torch.get_num_threads()))
        return encode(self, *arguments)

    monkeypatch.setattr(VideoSegmenter, "encode", noted)
    return calls


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, video: Path, model: str) -> dict[str, bytes]:
    """Files of a run without look-ahead, with as many threads."""
    out = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch, torch_threads(2):
        patch.setattr("pipeline.tracking.files.stream_tracker.looks_ahead", lambda *_: False)
        run(video, out, model)
    found = files(out)
    assert len(found) == 2 * 7  # rows and events of each chunk
    return found


def test_rows_are_those_of_a_run_without_it(
    tmp_path: Path, video: Path, model: str, alone: dict[str, bytes], encoded: list[tuple[str, int]]
) -> None:
    summary = run(video, tmp_path / "out", model)
    assert (summary.state, summary.frames) == ("finished", FRAMES)
    assert files(tmp_path / "out") == alone
    # The first ones as well: that objects begin there is known before their masks are made.
    assert len(encoded) == FRAMES
    assert set(encoded) == {("xmem-encode", 1)}


@pytest.mark.parametrize(("threads", "each"), [(1, 1), (2, 1), (3, 2), (4, 2)])
def test_steps_and_the_encoder_share_the_threads(
    tmp_path: Path, video: Path, model: str, encoded: list[tuple[str, int]], threads: int, each: int
) -> None:
    counts: set[int] = set()

    def note(_: object) -> None:
        counts.add(torch.get_num_threads())

    run(video, tmp_path / "out", model, threads=threads, max_frames=8, on_frame=note)
    assert counts == {each}
    assert {count for _, count in encoded} == ({each} if threads > 1 else set())


def test_interrupted_it_ends_with_the_same_bytes_and_no_thread_stays(
    tmp_path: Path, video: Path, model: str, alone: dict[str, bytes]
) -> None:
    before = set(threading.enumerate())
    with pytest.raises(InterruptedRunError):
        run(video, tmp_path / "out", model, on_frame=stop_at(16))
    started = set(threading.enumerate()) - before
    assert not [t.name for t in started if t.name.startswith(("xmem-encode", "xmem-decode", "xmem-rows"))]
    run(video, tmp_path / "out", model)
    assert files(tmp_path / "out") == alone


@pytest.mark.parametrize(
    ("threads", "most", "thread"),
    [(2, objects._MOST_ASIDE, "xmem-rows_0"), (1, objects._MOST_ASIDE, "MainThread"), (2, 0, "MainThread")],
)
def test_rows_are_made_while_the_next_frame_is_tracked(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    video: Path,
    model: str,
    alone: dict[str, bytes],
    threads: int,
    most: int,
    thread: str,
) -> None:
    made: list[tuple[str, int]] = []

    def noted(*arguments: Any) -> Any:
        made.append((threading.current_thread().name, torch.get_num_threads()))
        return tracked_records(*arguments)

    monkeypatch.setattr(objects, "tracked_records", noted)
    monkeypatch.setattr(objects, "_MOST_ASIDE", most)
    latest: list[int] = []
    run(
        video,
        tmp_path / "out",
        model,
        threads=threads,
        on_frame=lambda stream: latest.append(len(stream.latest)),
    )
    assert set(made) == {(thread, 1)}
    assert len(made) == FRAMES - latest.count(0)
    assert max(latest) == 3
    assert files(tmp_path / "out") == alone


def test_a_frame_whose_rows_fail_is_tracked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, video: Path, model: str, alone: dict[str, bytes]
) -> None:
    def fail(result: Any, label_map: Any, frame: Any, *rest: Any) -> Any:
        if frame.frame_index == 14:  # the last one of its chunk
            raise RuntimeError("out of memory")
        return tracked_records(result, label_map, frame, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(objects, "tracked_records", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            run(video, tmp_path / "out", model)
    assert len(files(tmp_path / "out", "tracks")) == 2
    run(video, tmp_path / "out", model)
    assert files(tmp_path / "out") == alone


def test_a_frame_that_cannot_be_encoded_ahead_fails_in_its_own_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, video: Path, model: str, alone: dict[str, bytes]
) -> None:
    prepare, failing = VideoSegmenter._prepare, [True]

    def fail(self: VideoSegmenter, frame: Any, size: Any) -> Any:
        if failing[0] and np.array_equal(frame, marked[0]):
            raise RuntimeError("out of memory")
        return prepare(self, frame, size)

    with open_source(str(video)) as source:
        marked = [f.image for f in source.frames() if f.frame_index == 15]
    monkeypatch.setattr(VideoSegmenter, "_prepare", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(video, tmp_path / "out", model)
    # The chunk before it ended with frame 14, and is committed.
    assert len(files(tmp_path / "out", "tracks")) == 3
    failing[0] = False
    run(video, tmp_path / "out", model)
    assert files(tmp_path / "out") == alone


@pytest.mark.parametrize(
    ("device", "threads", "ahead"), [("cpu", 1, False), ("cpu", 2, True), ("cuda", 4, False)]
)
def test_it_is_used_on_a_cpu_with_several_threads(device: str, threads: int, ahead: bool) -> None:
    segmenter = VideoSegmenter(small_model())
    segmenter.device = torch.device(device)
    assert look_ahead.looks_ahead(segmenter, threads) is ahead


@pytest.mark.parametrize(("threads", "helped"), [(1, False), (2, True)])
def test_a_thread_helps_with_the_steps_where_several_may_be_used(threads: int, helped: bool) -> None:
    segmenter = VideoSegmenter(small_model())
    Executor(segmenter, threads)
    assert (segmenter.aside is not None) is helped
    if segmenter.aside is not None:
        assert segmenter.aside.submit(torch.get_num_threads).result() == torch.get_num_threads() == 1


@pytest.mark.parametrize(("height", "width", "size"), [(96, 128, None), (240, 320, 64)])
def test_its_memory_is_predicted(height: int, width: int, size: int | None) -> None:
    segmenter = VideoSegmenter(small_model(), size=size)
    frame = np.zeros((height, width, 3), np.uint8)
    segmenter.encode(frame)  # lays the weights out for this size
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        held = [segmenter.encode(frame) for _ in range(look_ahead.AHEAD + 1)]
    assert profiler.profiler is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    frames = len(held) * frame.nbytes  # not torch's
    predicted = predict_ahead_bytes(segmenter.config, height, width, size)
    assert peak <= predicted <= 1.5 * (peak + frames) + 500_000
