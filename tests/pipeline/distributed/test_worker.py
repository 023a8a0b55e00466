"""Chunks of several streams in one process: any split and any transfer give the rows of one pass."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.prompted import three_objects
from support.tiny import CAPPED_MEMORY
from support.videos import make_video

from pipeline.base.records import FrameChunk
from pipeline.distributed.messages import ChunkReport, StreamSpec, WorkerSettings
from pipeline.distributed.worker import Worker
from pipeline.prompts.resolving import PromptSet
from pipeline.tracking.files.executor import begun_with
from pipeline.tracking.files.track import track
from pipeline.tracking.memory_plan import device_bytes
from pipeline.tracks.masks import rle_to_mask
from pipeline.tracks.store import StreamStore

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

PROMPTS = three_objects(correct_at=20)
FRAMES = 33
ROWS = 15 + 33 + 24


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("video")
    return make_video(folder / "clip.mkv", FRAMES, width=158, height=122, b_frames=2, gop=8)


@pytest.fixture(scope="module")
def one_pass(tmp_path_factory: pytest.TempPathFactory, video: Path, model: str) -> pa.Table:
    """The rows of a single pass with one chunk."""
    out = tmp_path_factory.mktemp("one-pass")
    track(
        video,
        out,
        PromptSet.from_record(PROMPTS),
        stream_id="cam",
        model=model,
        memory=CAPPED_MEMORY,
        threads=1,
        dtype="float32",
        chunk_frames=1000,
    )
    return rows(out)


def rows(out: Path, stream_id: str = "cam") -> pa.Table:
    files = sorted((out / "tracks" / f"stream_id={stream_id}").glob("*.parquet"))
    return pa.concat_tables([pq.ParquetFile(f).read() for f in files]).combine_chunks()


def masks_of(table: pa.Table) -> list[NDArray[np.bool_]]:
    size = 122, 158
    counts = table["mask_rle"].to_pylist()
    return [np.zeros(size, np.bool_) if rle is None else rle_to_mask(rle, *size) for rle in counts]


def workers(out: Path, model: str, **changes: Any) -> WorkerSettings:
    base: dict[str, Any] = {
        "model": model,
        "memory": CAPPED_MEMORY,
        "threads": 1,
        "dtype": "float32",
        "chunk_frames": 5,
        "snapshot_chunks": 2,
    }
    return WorkerSettings.of(str(out), **base | changes)


def spec(video: Path | str, stream_id: str = "cam", **changes: Any) -> StreamSpec:
    return StreamSpec(stream_id, str(video), **({"prompts": PROMPTS} | changes))


def drive(worker: Worker, stream_id: str, start: int, chunk: int) -> Iterator[ChunkReport]:
    while True:
        report = worker.track(FrameChunk(stream_id, start, start + chunk - 1))
        yield report
        if report.outcome != "tracked":
            return
        start = report.next_frame


def test_the_length_to_track_ends_at_max_frames(video: Path, model: str, tmp_path: Path) -> None:
    for most, expected in ((None, FRAMES), (7, 7), (100, FRAMES)):
        worker = Worker(workers(tmp_path / str(most), model, max_frames=most))
        assert worker.open(spec(video)).frame_count == expected
        worker.close_all()


def test_ellipses_are_counted_and_the_users_columns_kept(video: Path, model: str, tmp_path: Path) -> None:
    boxes = {"version": 1, "objects": [{"frame": f, "id": f + 1, "box": [20, 20, 1, 1]} for f in (0, 6)]}
    options = workers(tmp_path, model, max_frames=10)
    one = spec(video, prompts=boxes, extra={"site": "north"})
    worker = Worker(options)
    assert worker.open(one).ellipses == 0
    reports = list(drive(worker, "cam", 0, 5))
    assert [report.ellipses for report in reports] == [1, 2]
    assert reports[-1].outcome == "finished"
    assert Worker(options).open(one).ellipses == 2  # in a later run too
    record = StreamStore(tmp_path, "cam").read_record() or {}
    assert record["extra"] == {"site": "north"}
    files = {p: p.read_bytes() for p in (tmp_path / "tracks").rglob("*.parquet")}
    assert Worker(options).open(replace(one, extra={"site": "south"})).finished
    assert Worker(options).open(replace(one, extra=None)).finished
    after = StreamStore(tmp_path, "cam").read_record() or {}
    assert after == record | {"extra": {"site": "south"}}
    assert {p: p.read_bytes() for p in (tmp_path / "tracks").rglob("*.parquet")} == files


_MOVES = st.lists(st.sampled_from(["stay", "bytes", "store", "nothing", "other"]), min_size=33, max_size=33)


@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(chunk=st.integers(1, 13), snapshots=st.integers(1, 3), moves=_MOVES)
def test_any_cut_and_any_hand_over_give_the_rows_of_one_pass(
    video: Path, model: str, one_pass: pa.Table, chunk: int, snapshots: int, moves: list[str]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        options = workers(out, model, chunk_frames=chunk, snapshot_chunks=snapshots)
        both = [Worker(options), Worker(options)]
        at, position = 0, both[0].open(spec(video)).next_frame
        for move in moves:
            report = both[at].track(FrameChunk("cam", position, position + chunk - 1))
            if report.outcome == "finished":
                break
            assert (report.outcome, report.failure) == ("tracked", None)
            assert report.next_frame == position + chunk
            position = report.next_frame
            state = None
            if move in ("bytes", "other"):
                state = both[at].release("cam", to_store=False)
                assert state is not None
            elif move == "store":
                assert both[at].release("cam") is None
            elif move == "nothing":
                both[at].close("cam")
            if move == "other":
                at = 1 - at
            status = both[at].open(spec(video), state)
            assert (status.failure, status.next_frame) == (None, position)
        assert report.outcome == "finished"
        assert report.rows == ROWS
        assert rows(out).equals(one_pass)
        for worker in both:
            worker.close_all()


def test_a_repeated_an_early_and_an_unknown_chunk_change_nothing(
    tmp_path: Path, video: Path, model: str, one_pass: pa.Table
) -> None:
    worker = Worker(workers(tmp_path, model))
    assert worker.track(FrameChunk("cam", 0, 4)).outcome == "unknown"
    assert worker.open(spec(video)).next_frame == 0
    early = worker.track(FrameChunk("cam", 5, 9))
    assert (early.outcome, early.next_frame, early.frames) == ("refused", 0, 0)
    assert worker.track(FrameChunk("cam", 0, 4)).outcome == "tracked"
    repeated = worker.track(FrameChunk("cam", 0, 4))
    assert (repeated.outcome, repeated.next_frame, repeated.frames) == ("refused", 5, 0)
    assert [r.outcome for r in drive(worker, "cam", 5, 5)][-1] == "finished"
    assert worker.track(FrameChunk("cam", 30, 34)).outcome == "unknown"  # closed at its end
    assert worker.open(spec(video)).finished
    assert rows(tmp_path).equals(one_pass)


def test_chunks_may_be_several_commits_long_but_end_where_one_does(
    tmp_path: Path, video: Path, model: str, one_pass: pa.Table
) -> None:
    worker = Worker(workers(tmp_path, model))
    worker.open(spec(video))
    report = worker.track(FrameChunk("cam", 0, 14))
    assert (report.outcome, report.next_frame, report.frames) == ("tracked", 15, 15)
    report = worker.track(FrameChunk("cam", 15, 17))
    assert report.outcome == "failed"
    assert report.failure is not None
    assert report.failure.permanent
    assert "5 frames" in report.failure.message
    assert worker.open(spec(video)).next_frame == 15
    assert [r.outcome for r in drive(worker, "cam", 15, 10)] == ["tracked", "finished"]
    assert rows(tmp_path).equals(one_pass)


def test_streams_take_turns_and_a_bad_one_disturbs_nobody(
    tmp_path: Path, video: Path, model: str, one_pass: pa.Table, caplog: pytest.LogCaptureFixture
) -> None:
    broken = tmp_path / "broken.mkv"
    broken.write_bytes(b"\x1a\x45\xdf\xa3 and then nothing of the kind")
    worker = Worker(workers(tmp_path / "out", model))
    assert worker.open(spec(video, "a")).failure is None
    assert worker.open(spec(video, "b")).failure is None
    with caplog.at_level(logging.CRITICAL):
        failed = worker.open(spec(broken, "bad")).failure
        empty = worker.open(spec(video, "none", prompts=None)).failure
        missing = worker.open(spec(tmp_path / "no.mp4", "missing")).failure
    assert failed is not None
    assert (failed.kind, failed.permanent) == ("NotAVideoError", True)
    assert empty is not None
    assert (empty.kind, empty.permanent) == ("PromptError", True)
    assert missing is not None
    assert "no such file" in missing.message
    assert not missing.permanent  # another machine may see it
    assert worker.facts()["streams"] == ["a", "b"]
    for a, b in zip(drive(worker, "a", 0, 5), drive(worker, "b", 0, 5), strict=True):
        assert a.outcome == b.outcome
    assert rows(tmp_path / "out", "a").equals(one_pass)
    assert rows(tmp_path / "out", "b").equals(one_pass)


def test_streams_that_are_tracked_together_have_the_rows_of_one_pass(
    tmp_path: Path, video: Path, model: str, one_pass: pa.Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: one of the streams fails, one has a shorter video, one is behind the others."""
    worker = Worker(workers(tmp_path / "out", model))
    worker._segmenter.batches_streams = True
    short = make_video(tmp_path / "short.mkv", 12, width=158, height=122, gop=8)
    broken = tmp_path / "broken.mkv"
    shutil.copy(video, broken)
    sizes: list[int] = []
    step_each = worker._segmenter.step_each

    def noted(steps: Any) -> Any:
        sizes.append(len(steps))
        return step_each(steps)

    monkeypatch.setattr(worker._segmenter, "step_each", noted)
    names = {"cam": video, "late": video, "short": short, "broken": broken}
    first = {name: worker.open(spec(path, name)).next_frame for name, path in names.items()}
    assert worker.track(FrameChunk("cam", 0, 4)).outcome == "tracked"
    first["cam"] = 5
    memory: Any = None
    ends: dict[str, ChunkReport] = {}
    while left := [name for name in names if name not in ends]:
        chunks = [FrameChunk(name, first[name], first[name] + 4) for name in left]
        if memory is None and first["broken"] == 10:
            memory = worker._streams["broken"].stream.state.memory

            def damaged(*given: Any, **options: Any) -> Any:
                raise RuntimeError("a damaged memory")

            memory.choose = damaged
        for report in worker.track_many(chunks):
            first[report.stream_id] = report.next_frame
            if report.outcome != "tracked":
                ends[report.stream_id] = report
    assert {name: report.outcome for name, report in ends.items()} == {
        "cam": "finished",
        "late": "finished",
        "short": "finished",
        "broken": "failed",
    }
    failure = ends["broken"].failure
    assert failure is not None
    assert "a damaged memory" in failure.message
    assert ends["broken"].next_frame == 10
    assert ends["short"].next_frame == 12
    assert max(sizes) == 4
    for name in ("cam", "late"):
        found = rows(tmp_path / "out", name)
        exact = ["frame_index", "pts_seconds", "object_id", "category", "frame_height", "frame_width"]
        assert found.select(exact).equals(one_pass.select(exact))
        pairs = list(zip(masks_of(found), masks_of(one_pass), strict=True))
        differ = sum(int((one != other).sum()) for one, other in pairs)
        assert differ <= 1e-4 * sum(one.size for one, _ in pairs)  # rounding
    assert worker.track_many([FrameChunk("gone", 0, 4), FrameChunk("cam", 0, 4)])[0].outcome == "unknown"


def test_on_a_cpu_chunks_asked_for_together_are_tracked_one_after_another(
    tmp_path: Path, video: Path, model: str, one_pass: pa.Table
) -> None:
    worker = Worker(workers(tmp_path / "out", model, chunk_frames=40))
    assert not worker._segmenter.batches_streams
    names = ["cam", "other"]
    for name in names:
        worker.open(spec(video, name))
    reports = worker.track_many([FrameChunk(name, 0, 39) for name in names])
    assert [report.outcome for report in reports] == ["finished", "finished"]
    assert [report.stream_id for report in reports] == names
    for name in names:
        assert rows(tmp_path / "out", name).equals(one_pass)


def test_a_video_that_changed_under_its_rows_fails_and_keeps_them(
    tmp_path: Path, video: Path, model: str
) -> None:
    copy = tmp_path / "copy.mkv"
    copy.write_bytes(video.read_bytes())
    worker = Worker(workers(tmp_path / "out", model))
    worker.open(spec(copy))
    worker.track(FrameChunk("cam", 0, 4))
    worker.track(FrameChunk("cam", 5, 9))
    worker.close("cam")
    data = bytearray(copy.read_bytes())
    data[len(data) // 2] ^= 255
    copy.write_bytes(data)
    failure = worker.open(spec(copy)).failure
    assert failure is not None
    assert (failure.kind, failure.permanent) == ("SettingsConflictError", True)
    assert "has changed" in failure.message
    assert StreamStore(tmp_path / "out", "cam").committed().next_frame == 10


def test_a_second_writer_stops_and_the_first_goes_on(
    tmp_path: Path, video: Path, model: str, one_pass: pa.Table
) -> None:
    first, second = (Worker(workers(tmp_path, model, threads=1)) for _ in range(2))
    assert first.open(spec(video)).next_frame == 0
    other = {**PROMPTS, "objects": PROMPTS["objects"][:1]}
    assert second.open(spec(video, prompts=other)).failure is None  # nothing is committed: it binds nobody
    reports = list(drive(second, "cam", 0, 5))
    assert reports[-1].outcome == "finished"
    failure = list(drive(first, "cam", 0, 5))[-1].failure
    assert failure is not None
    assert (failure.kind, failure.permanent) == ("AnotherWriterError", True)
    assert rows(tmp_path)["object_id"].unique().to_pylist() == [1]


def test_two_writers_of_the_same_stream_write_every_row_once(
    tmp_path: Path, video: Path, model: str, one_pass: pa.Table
) -> None:
    both = [Worker(workers(tmp_path, model)) for _ in range(2)]
    for worker in both:
        assert worker.open(spec(video)).next_frame == 0
    for a, b in zip(drive(both[0], "cam", 0, 5), drive(both[1], "cam", 0, 5), strict=True):
        assert a.outcome == b.outcome
    assert rows(tmp_path).equals(one_pass)


def test_a_state_of_another_stream_is_not_believed(
    tmp_path: Path, video: Path, model: str, one_pass: pa.Table, caplog: pytest.LogCaptureFixture
) -> None:
    worker = Worker(workers(tmp_path, model))
    other = {**PROMPTS, "objects": PROMPTS["objects"][:1]}
    worker.open(spec(video, "other", prompts=other))
    worker.track(FrameChunk("other", 0, 4))
    worker.open(spec(video))
    worker.track(FrameChunk("cam", 0, 4))
    worker.close("cam")
    foreign = worker.release("other", to_store=False)
    assert foreign is not None
    with caplog.at_level(logging.WARNING):
        assert worker.open(spec(video), foreign).next_frame == 5
    assert "handed over is not usable" in caplog.text
    assert [r.outcome for r in drive(worker, "cam", 5, 5)][-1] == "finished"
    assert rows(tmp_path).equals(one_pass)


@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b[:-9] + b"123456789"]
)
def test_a_damaged_state_is_not_believed(
    tmp_path: Path, video: Path, model: str, one_pass: pa.Table, damage: Callable[[bytes], bytes]
) -> None:
    worker = Worker(workers(tmp_path, model))
    worker.open(spec(video))
    worker.track(FrameChunk("cam", 0, 9))
    blob = worker.release("cam", to_store=False)
    assert blob is not None
    assert worker.open(spec(video), damage(blob)).next_frame == 10
    assert [r.outcome for r in drive(worker, "cam", 10, 5)][-1] == "finished"
    assert rows(tmp_path).equals(one_pass)


def test_a_state_that_is_ahead_of_the_rows_is_not_believed(
    tmp_path: Path, video: Path, model: str, one_pass: pa.Table
) -> None:
    ahead, behind = (Worker(workers(tmp_path / name, model)) for name in ("ahead", "behind"))
    ahead.open(spec(video))
    ahead.track(FrameChunk("cam", 0, 9))
    blob = ahead.release("cam", to_store=False)
    assert behind.open(spec(video), blob).next_frame == 0
    assert [r.outcome for r in drive(behind, "cam", 0, 5)][-1] == "finished"
    assert rows(tmp_path / "behind").equals(one_pass)


def test_what_fails_while_tracking_is_told_and_can_be_opened_again(
    tmp_path: Path, video: Path, model: str, one_pass: pa.Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = Worker(workers(tmp_path, model))
    worker.open(spec(video))
    worker.track(FrameChunk("cam", 0, 4))
    step_many = worker._segmenter.step_many
    monkeypatch.setattr(
        worker._segmenter, "step_many", lambda inputs: (_ for _ in ()).throw(RuntimeError("kernel\nfault"))
    )
    report = worker.track(FrameChunk("cam", 5, 9))
    assert report.outcome == "failed"
    assert report.failure is not None
    assert report.failure.message == "RuntimeError: kernel"
    assert not report.failure.permanent
    monkeypatch.setattr(worker._segmenter, "step_many", step_many)
    assert worker.open(spec(video)).next_frame == 5
    assert [r.outcome for r in drive(worker, "cam", 5, 5)][-1] == "finished"
    assert rows(tmp_path).equals(one_pass)


def test_restart_starts_over_once(tmp_path: Path, video: Path, model: str, one_pass: pa.Table) -> None:
    worker = Worker(workers(tmp_path, model))
    worker.open(spec(video))
    worker.track(FrameChunk("cam", 0, 9))
    worker.release("cam")
    assert worker.open(spec(video, restart=True)).next_frame == 0
    worker.track(FrameChunk("cam", 0, 4))
    assert worker.open(spec(video, restart=True)).next_frame == 5  # it is open: not over again
    assert [r.outcome for r in drive(worker, "cam", 5, 5)][-1] == "finished"
    assert rows(tmp_path).equals(one_pass)


def test_threads_are_those_the_stream_was_begun_with(tmp_path: Path, video: Path, model: str) -> None:
    before = Worker(workers(tmp_path, model, threads=1))
    before.open(spec(video))
    before.track(FrameChunk("cam", 0, 4))
    before.close("cam")
    after = Worker(workers(tmp_path, model, threads=4))
    assert after.open(spec(video)).failure is None
    torch.set_num_threads(2)
    assert after.track(FrameChunk("cam", 5, 9)).outcome == "tracked"
    assert torch.get_num_threads() == 1
    assert after.open(spec(video, "new")).failure is None
    assert after.track(FrameChunk("new", 0, 4)).outcome == "tracked"
    assert torch.get_num_threads() == 2  # the other two encode the frames ahead
    torch.set_num_threads(1)


def test_a_state_is_predicted_for_as_many_objects_as_live_at_once(
    tmp_path: Path, video: Path, model: str
) -> None:
    worker = Worker(workers(tmp_path, model))
    status = worker.open(spec(video))
    # Ids 1 and 2, then 70000 with them, then 2 is gone.
    assert (status.objects, status.height, status.width) == (3, 122, 158)
    assert 0 < status.state_bytes < device_bytes(torch.device("cpu"))
    assert status.workspace_bytes > 0


def test_nothing_of_an_error_or_a_spec_shows_credentials() -> None:
    secret = StreamSpec("a", "https://me:hush@host/v.mp4", prompts_uri="https://me:hush@host/p.json")
    options = WorkerSettings.of(
        "out", storage_options={"secret": "hush"}, out_storage_options={"key": "hush"}
    )
    assert "hush" not in repr(secret) + repr(options)


def test_a_stream_from_another_kind_of_cpu_keeps_its_precision(
    tmp_path: Path, video: Path, model: str, one_pass: pa.Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Begun in float32 on a machine without bfloat16, resumed on one with it, beside a new stream."""
    options = workers(tmp_path, model, dtype="auto")
    monkeypatch.setattr("pipeline.tracking.segmenters.has_bfloat16", lambda: False)
    first = Worker(options)
    first.open(spec(video))
    first.track(FrameChunk("cam", 0, 9))
    first.release("cam")
    monkeypatch.setattr("pipeline.tracking.segmenters.has_bfloat16", lambda: True)
    second = Worker(options)
    assert second.open(spec(video)).next_frame == 10
    second.open(spec(video, "new"))
    for stream_id, start in (("cam", 10), ("new", 0)):
        assert [r.outcome for r in drive(second, stream_id, start, 10)][-1] == "finished"
    assert rows(tmp_path).equals(one_pass)
    assert [begun_with(StreamStore(tmp_path, i)).dtype for i in ("cam", "new")] == ["float32", "bfloat16"]


@pytest.mark.parametrize("direction", ["both", "backward"])
def test_both_passes_go_from_worker_to_worker_after_every_chunk(
    tmp_path: Path, video: Path, model: str, direction: str
) -> None:
    prompts = {**PROMPTS, "objects": PROMPTS["objects"][2:]}  # first prompts on frames 9 and 20
    track(
        video,
        tmp_path / "alone",
        PromptSet.from_record(prompts),
        stream_id="cam",
        model=model,
        memory=CAPPED_MEMORY,
        threads=1,
        dtype="float32",
        chunk_frames=1000,
        direction=direction,
    )
    chosen = workers(tmp_path, model, direction=direction)
    pair = Worker(chosen), Worker(chosen)
    state, tracked, firsts = None, 0, []
    for turn in range(100):
        worker = pair[turn % 2]
        status = worker.open(spec(video, prompts=prompts), state)
        assert status.failure is None
        assert status.offset == 25
        assert status.frame_count == 25 + (FRAMES if direction == "both" else 21)
        firsts.append(status.next_frame)
        report = worker.track(FrameChunk("cam", status.next_frame, status.next_frame // 5 * 5 + 4))
        tracked += report.frames
        if report.outcome == "finished":
            break
        assert report.outcome == "tracked", report
        assert report.next_frame > status.next_frame
        state = worker.release("cam", to_store=turn % 3 == 0)
    assert firsts == [0, 5, 10, 15, 20, *range(25, report.next_frame, 5)]
    assert report.next_frame == status.frame_count
    assert tracked == 21 + report.next_frame - 25
    assert rows(tmp_path).equals(rows(tmp_path / "alone"))
    assert not (tmp_path / "backward").exists()
