"""One stream end to end on a tiny network: rows, events, resuming after any interruption, refusals."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import subprocess
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from support.forked import Forked
from support.interrupted import InterruptedRunError, stop_at
from support.prompted import three_objects
from support.small_net import small_cutie
from support.tiny import CAPPED_MEMORY, tiny_weights
from support.videos import corrupt, damage_packets, make_images, make_video
from support.written import files

from pipeline.analytics.query import query
from pipeline.base.errors import PromptError, SettingsConflictError, SourceError, UsageError
from pipeline.prompts.resolving import PromptSet
from pipeline.storage.opening import open_files
from pipeline.tracking.files.executor import Executor, begun_with
from pipeline.tracking.files.stream_tracker import StreamTracker
from pipeline.tracking.files.track import track
from pipeline.tracking.segmenters import open_segmenter
from pipeline.tracking.settings import ModelSettings, TrackSettings
from pipeline.tracks.copying import replace_stream
from pipeline.tracks.masks import rle_to_mask
from pipeline.tracks.store import StreamStore
from pipeline.video.sources import open_source
from xmem_core import MemoryConfig, ModelConfig, StepResult, VideoSegmenter, XMem, load_model
from xmem_core.fused import has_bfloat16
from xmem_core.weights import save_weights

pytestmark = pytest.mark.usefixtures("one_thread")

WORKER = Path(__file__).parents[3] / "support" / "track_worker.py"
KILLS = int(os.environ.get("XMEM_CHAOS", "4"))
PROMPTS = three_objects(correct_at=21)
FRAMES = 33
# Of the pass that tracks the object of frame 9 back to the beginning.
BACKWARD_FRAMES = 10


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With B-frames and a nonzero start, 159 x 121: odd sizes, not a multiple of 16."""
    folder = tmp_path_factory.mktemp("video")
    return make_video(folder / "clip.mkv", FRAMES, width=158, height=122, b_frames=2, start_pts=10, gop=8)


def run(video: Path | str, out: Path, model: str, **changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "stream_id": "cam",
        "model": model,
        "threads": 1,
        "dtype": "float32",
        "chunk_frames": 5,
        "snapshot_chunks": 2,
        "memory": CAPPED_MEMORY,
        "prompts": PromptSet.from_record(PROMPTS),
    }
    return track(str(video), out, **(arguments | changes))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, video: Path, model: str) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    summary = run(video, out, model)
    assert (summary.state, summary.frames) == ("finished", FRAMES)
    return out


def test_rows_are_those_of_a_bare_loop_over_the_segmenter(undisturbed: Path, video: Path, model: str) -> None:
    from pipeline.prompts.box_segmenters import load_box_segmenter
    from pipeline.prompts.resolving import resolve
    from xmem_core import Prompt

    prompts = PromptSet.from_record(PROMPTS)
    network = load_model(model)
    segmenter = VideoSegmenter(network, CAPPED_MEMORY, size=network.config.default_size)
    state = segmenter.new_state()
    expected = {}
    with open_source(str(video)) as source:
        for frame in source.frames():
            if frame.frame_index == 15:
                state.remove_objects([2])
            given = prompts.at(frame.frame_index)
            prompt = Prompt(resolve(given, frame, load_box_segmenter()).masks) if given else None
            result = segmenter.step(state, frame.image, prompt)
            labels = result.label_map.numpy()
            for object_id in result.object_ids:
                expected[frame.frame_index, object_id] = (frame.pts_seconds, labels == object_id)
    rows = query(undisturbed, "select * from tracks order by frame_index, object_id").to_pylist()
    assert [(r["frame_index"], r["object_id"]) for r in rows] == sorted(expected)
    for row in rows:
        pts, mask = expected[row["frame_index"], row["object_id"]]
        assert row["pts_seconds"] == pts
        assert (row["frame_height"], row["frame_width"], row["area"]) == (122, 158, mask.sum())
        if mask.any():
            assert np.array_equal(rle_to_mask(row["mask_rle"], 122, 158), mask)
            assert 0 < row["score"] <= 1
        else:
            assert (row["mask_rle"], row["bbox_x"], row["score"]) == (None, None, 0)
    categories = {(r["object_id"], r["category"]) for r in rows}
    assert categories == {(1, "square"), (2, None), (70000, "late")}


def test_events_tell_what_happened_to_objects(undisturbed: Path) -> None:
    rows = query(
        undisturbed, "select frame_index, kind, object_id, reason from events order by all"
    ).to_pylist()
    assert [tuple(r.values()) for r in rows] == [
        (0, "object_added", 1, "prompt"),
        (0, "object_added", 2, "prompt"),
        (9, "object_added", 70000, "prompt"),
        (15, "object_removed", 2, "requested"),
        (21, "corrected", 1, "prompt"),
    ]


def test_chunks_follow_each_other_without_gap(undisturbed: Path) -> None:
    names = sorted(p.name for p in (undisturbed / "tracks" / "stream_id=cam").iterdir())
    assert names == [f"frames-{first:012d}.parquet" for first in range(0, FRAMES, 5)]
    record = json.loads((undisturbed / "streams" / "cam.json").read_text())
    rows = sum(pq.read_metadata(p).num_rows for p in (undisturbed / "tracks").rglob("*.parquet"))
    assert (record["state"], record["frames"], record["rows"]) == ("finished", FRAMES, rows)


@pytest.mark.slow
@pytest.mark.parametrize("stop_after", [1, 4, 5, 6, 10, 11, 16, 22, 30, FRAMES])
def test_interrupted_anywhere_it_ends_with_the_same_bytes(
    tmp_path: Path, undisturbed: Path, video: Path, model: str, stop_after: int
) -> None:
    with pytest.raises(InterruptedRunError):
        run(video, tmp_path, model, on_frame=stop_at(stop_after))
    summary = run(video, tmp_path, model)
    assert files(tmp_path, "tracks", "events") == files(undisturbed, "tracks", "events")
    assert files(tmp_path, "streams") == files(undisturbed, "streams")
    committed = (stop_after - 1) // 5 * 5
    assert summary.resumed_at == (committed or None)
    # The snapshot saves work: no more than what lies between two snapshots is repeated.
    assert summary.tracked <= FRAMES - committed + 10


def test_without_or_with_damaged_snapshots_it_starts_over_and_rows_stay(
    tmp_path: Path, undisturbed: Path, video: Path, model: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(InterruptedRunError):
        run(video, tmp_path, model, on_frame=stop_at(24))
    for snapshot in (tmp_path / "state").rglob("*.safetensors"):
        data = bytearray(snapshot.read_bytes())
        data[-100] ^= 255
        snapshot.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        summary = run(video, tmp_path, model)
    assert "snapshot" in caplog.text
    assert summary.tracked == FRAMES
    assert files(tmp_path, "tracks", "events") == files(undisturbed, "tracks", "events")


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_any_cut_into_chunks_gives_the_same_rows(
    tmp_path: Path, undisturbed: Path, video: Path, model: str, chunk: int
) -> None:
    run(video, tmp_path, model, chunk_frames=chunk)
    for view in ("tracks", "events"):
        ask = (
            f"select * from {view} order by frame_index, object_id, kind"
            if view == "events"
            else ("select * from tracks order by frame_index, object_id")
        )
        assert query(tmp_path, ask).equals(query(undisturbed, ask))


@pytest.fixture(scope="module")
def cutie(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("cutie") / "cutie.safetensors"
    save_weights(small_cutie(), path)
    return str(path)


@pytest.fixture(scope="module")
def undisturbed_cutie(tmp_path_factory: pytest.TempPathFactory, video: Path, cutie: str) -> Path:
    out = tmp_path_factory.mktemp("undisturbed-cutie")
    assert run(video, out, cutie, size=48).state == "finished"
    return out


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_any_cut_into_chunks_gives_the_same_rows_with_cutie(
    tmp_path: Path, undisturbed_cutie: Path, video: Path, cutie: str, chunk: int
) -> None:
    run(video, tmp_path, cutie, size=48, chunk_frames=chunk)
    rows = "select * from tracks order by frame_index, object_id"
    assert query(tmp_path, rows).equals(query(undisturbed_cutie, rows))


@pytest.mark.parametrize("stop_after", [6, 22])
def test_interrupted_with_cutie_it_ends_with_the_same_bytes(
    tmp_path: Path, undisturbed_cutie: Path, video: Path, cutie: str, stop_after: int
) -> None:
    with pytest.raises(InterruptedRunError):
        run(video, tmp_path, cutie, size=48, on_frame=stop_at(stop_after))
    summary = run(video, tmp_path, cutie, size=48)
    assert summary.resumed_at == (stop_after - 1) // 5 * 5
    assert files(tmp_path, "tracks", "events") == files(undisturbed_cutie, "tracks", "events")


def test_a_setting_that_the_model_does_not_have_is_refused_in_one_line(
    tmp_path: Path, video: Path, cutie: str
) -> None:
    with pytest.raises(UsageError, match=r"cutie\.safetensors: search_window=96 is not allowed: Cutie's"):
        run(video, tmp_path, cutie, memory=replace(CAPPED_MEMORY, search_window=96))


def test_a_finished_stream_is_left_alone(tmp_path: Path, video: Path, model: str) -> None:
    run(video, tmp_path, model, max_frames=12)
    before = {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in tmp_path.rglob("*") if p.is_file()}
    summary = run(video, tmp_path, model, max_frames=12)
    assert (summary.state, summary.frames, summary.tracked) == ("finished", 12, 0)
    assert {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in tmp_path.rglob("*") if p.is_file()} == before


def test_rows_that_vanished_are_tracked_again(
    tmp_path: Path, undisturbed: Path, video: Path, model: str
) -> None:
    run(video, tmp_path, model)
    for first in (25, 30):
        (tmp_path / f"tracks/stream_id=cam/frames-{first:012d}.parquet").unlink()
    run(video, tmp_path, model)
    assert files(tmp_path, "tracks", "events") == files(undisturbed, "tracks", "events")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"size": 32}, "size was 48, now 32"),
        ({"memory": MemoryConfig()}, "memory.mem_every was 2, now 5"),
        ({"chunk_frames": 6}, "chunk_frames was 5, now 6"),
        ({"threads": 2}, "threads was 1, now 2"),
        ({"prompts": PromptSet.from_record(PROMPTS | {"remove": []})}, "prompts are others"),
    ],
)
def test_other_settings_are_refused_and_named(
    tmp_path: Path, video: Path, model: str, changes: dict[str, Any], said: str
) -> None:
    run(video, tmp_path, model, max_frames=12)
    before = files(tmp_path, "tracks", "events", "state", "streams")
    with pytest.raises(SettingsConflictError, match="tracked with other settings") as caught:
        run(video, tmp_path, model, **({"max_frames": 12} | changes))
    assert said in str(caught.value)
    assert files(tmp_path, "tracks", "events", "state", "streams") == before


@pytest.mark.parametrize("limits", [(12, 13, 25, None), (10, 1000), (1, FRAMES, None), (4, 15, 20)])
def test_with_a_larger_max_frames_it_goes_on_where_it_was(
    tmp_path: Path, undisturbed: Path, video: Path, model: str, limits: tuple[int | None, ...]
) -> None:
    done = 0
    for limit in limits:
        summary = run(video, tmp_path, model, max_frames=limit)
        until = min(FRAMES, limit or FRAMES)
        assert (summary.state, summary.frames, summary.tracked) == ("finished", until, until - done)
        done = until
        for view, order in (("tracks", "frame_index, object_id"), ("events", "frame_index, object_id, kind")):
            ask = f"select * from {view} where frame_index < {until} order by {order}"
            assert query(tmp_path, ask).equals(query(undisturbed, ask))
        record = StreamStore(tmp_path, "cam").read_record()
        assert record is not None
        assert (record["state"], record["frames"]) == ("finished", until)
        assert record["rows"] == query(tmp_path, "select * from tracks").num_rows == summary.rows
    before = files(tmp_path, "tracks", "events", "state", "streams")
    for limit in (done - 1, 1, done):  # as many, or fewer: nothing to do
        again = run(video, tmp_path, model, max_frames=limit)
        assert (again.state, again.frames, again.rows, again.tracked) == ("finished", done, summary.rows, 0)
    assert files(tmp_path, "tracks", "events", "state", "streams") == before


@pytest.mark.parametrize("direction", ["forward", "both"])
def test_what_is_committed_in_the_middle_of_a_chunk_is_not_tracked_again(
    tmp_path: Path, video: Path, model: str, direction: str
) -> None:
    def cut_at(*frames: int) -> Any:
        def on_frame(stream: StreamTracker) -> None:
            if stream.summary.tracked in frames:
                stream.commit_here()
                stream.commit_here()  # nothing is left to commit
                raise InterruptedRunError

        return on_frame

    whole = tmp_path / "whole"
    run(video, whole, model, direction=direction)
    tracked = 0
    for more in (7, 4):  # the backward pass, if there is one, is cut first
        with pytest.raises(InterruptedRunError):
            run(video, tmp_path / "cut", model, direction=direction, on_frame=cut_at(more))
        tracked += more
    summary = run(video, tmp_path / "cut", model, direction=direction)
    passes = FRAMES if direction == "forward" else FRAMES + BACKWARD_FRAMES
    assert summary.tracked == passes - tracked
    for view, order in (("tracks", "frame_index, object_id"), ("events", "frame_index, object_id, kind")):
        ask = f"select * from {view} order by {order}"
        assert query(tmp_path / "cut", ask).equals(query(whole, ask))
    target = open_files(str(tmp_path / "joined"))
    replace_stream(open_files(str(tmp_path / "cut")), target, "cam", chunk_frames=5)
    assert files(tmp_path / "joined") == files(whole)


def test_stopped_beyond_a_smaller_max_frames_there_is_nothing_to_do_and_it_still_goes_on(
    tmp_path: Path, undisturbed: Path, video: Path, model: str
) -> None:
    with pytest.raises(InterruptedRunError):
        run(video, tmp_path, model, on_frame=stop_at(18))
    before = files(tmp_path, "tracks", "events", "state", "streams")
    summary = run(video, tmp_path, model, max_frames=7)
    assert (summary.frames, summary.tracked) == (15, 0)
    assert summary.rows == query(tmp_path, "select * from tracks").num_rows
    assert summary.warnings == ["15 frames have rows, more than max_frames=7: nothing to do"]
    assert files(tmp_path, "tracks", "events", "state", "streams") == before
    run(video, tmp_path, model)
    assert files(tmp_path, "tracks", "events") == files(undisturbed, "tracks", "events")


def test_a_stream_that_failed_says_so_and_may_go_on(
    tmp_path: Path, undisturbed: Path, video: Path, model: str
) -> None:
    with pytest.raises(InterruptedRunError):
        run(video, tmp_path, model, on_frame=stop_at(18))
    ask = "select state, cause, next_frame from streams"
    assert query(tmp_path, ask).to_pylist() == [{"state": "running", "cause": None, "next_frame": 15}]
    with pytest.raises(SettingsConflictError):  # says nothing of the stream
        run(video, tmp_path, model, chunk_frames=7)
    assert query(tmp_path, ask).to_pylist()[0]["state"] == "running"
    hidden = video.rename(video.with_suffix(".hidden"))
    with pytest.raises(SourceError) as caught:
        run(video, tmp_path, model)
    hidden.rename(video)
    (row,) = query(tmp_path, ask).to_pylist()
    assert (row["state"], row["cause"], row["next_frame"]) == ("failed", str(caught.value), 15)
    with pytest.raises(InterruptedRunError):
        run(video, tmp_path, model, on_frame=stop_at(22))
    assert query(tmp_path, ask).to_pylist() == [{"state": "running", "cause": None, "next_frame": 20}]
    run(video, tmp_path, model)
    assert files(tmp_path, "tracks", "events", "streams") == files(undisturbed, "tracks", "events", "streams")


def test_a_video_that_fails_while_it_is_tracked_says_so(
    tmp_path: Path, video: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = three_objects(correct_at=21)
    prompts["objects"].append({"id": 9, "frame": 7, "box": [500, 500, 30, 30]})  # outside the picture
    with pytest.raises(PromptError) as caught:
        run(video, tmp_path, model, prompts=PromptSet.from_record(prompts))
    (row,) = query(tmp_path, "select state, cause, next_frame from streams").to_pylist()
    assert row == {"state": "failed", "cause": str(caught.value), "next_frame": 5}
    record = StreamStore(tmp_path, "cam").read_record()
    assert record is not None
    assert record["format_version"] == 1
    assert record["cause"]["kind"] == "PromptError"


def test_another_model_or_video_is_refused(tmp_path: Path, video: Path, model: str) -> None:
    run(video, tmp_path / "out", model, max_frames=6)
    other = make_video(tmp_path / "other.mkv", 8, width=158, height=122)
    with pytest.raises(SettingsConflictError, match="source was"):
        run(other, tmp_path / "out", model, max_frames=6)
    with pytest.raises(SettingsConflictError, match="model_fingerprint was"):
        run(video, tmp_path / "out", tiny_weights(tmp_path, seed=1), max_frames=6)


def test_restart_starts_over_with_other_settings(
    tmp_path: Path, undisturbed: Path, video: Path, model: str
) -> None:
    run(video, tmp_path, model, chunk_frames=3, max_frames=20)
    run(video, tmp_path, model, restart=True)
    assert files(tmp_path, "tracks", "events") == files(undisturbed, "tracks", "events")


def test_going_on_needs_no_prompts_and_keeps_the_threads(
    tmp_path: Path, undisturbed: Path, video: Path, model: str
) -> None:
    with pytest.raises(InterruptedRunError):
        run(video, tmp_path, model, on_frame=stop_at(18))
    run(video, tmp_path, model, prompts=None, threads=None)
    assert files(tmp_path, "tracks", "events") == files(undisturbed, "tracks", "events")


def test_going_on_with_auto_keeps_the_precision(
    tmp_path: Path, undisturbed: Path, video: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Begun on a CPU without bfloat16, gone on with on one that has it.
    monkeypatch.setattr("pipeline.tracking.segmenters.has_bfloat16", lambda: False)
    with pytest.raises(InterruptedRunError):
        run(video, tmp_path, model, on_frame=stop_at(18), dtype="auto")
    monkeypatch.setattr("pipeline.tracking.segmenters.has_bfloat16", lambda: True)
    run(video, tmp_path, model, dtype="auto")
    assert files(tmp_path, "tracks", "events") == files(undisturbed, "tracks", "events")
    assert begun_with(StreamStore(tmp_path, "cam")).dtype == "float32"


def test_auto_takes_bfloat16_where_the_cpu_has_it(
    tmp_path: Path, video: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.tracking.segmenters.has_bfloat16", lambda: True)
    run(video, tmp_path, model, dtype="auto", max_frames=3)
    assert begun_with(StreamStore(tmp_path, "cam")).dtype == "bfloat16"
    assert open_segmenter(ModelSettings(model, dtype="float32")).dtype == torch.float32
    published = ModelConfig(value_widths=(8, 8, 16), value_blocks=(1, 1, 1), decoder_dims=(16, 8, 8))
    save_weights(XMem(published), tmp_path / "resnet.safetensors")
    assert open_segmenter(ModelSettings(str(tmp_path / "resnet.safetensors"))).dtype == torch.float32
    monkeypatch.setattr("pipeline.tracking.segmenters.has_bfloat16", lambda: False)
    assert open_segmenter(ModelSettings(model)).dtype == torch.float32


def test_bfloat16_is_for_cpus_with_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    slower = {"avx2": True, "avx512_bf16": True, "amx_bf16": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: slower, raising=False)
    assert not has_bfloat16()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {**slower, "amx_bf16": True}, raising=False)
    assert has_bfloat16()


def test_a_torch_that_cannot_tell_about_its_cpu_has_no_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert not has_bfloat16()


def test_nothing_to_track_is_said(tmp_path: Path, video: Path, model: str) -> None:
    with pytest.raises(PromptError, match="nothing to track"):
        run(video, tmp_path, model, prompts=None)
    assert not (tmp_path / "tracks").exists()


def test_a_prompt_beyond_the_end_is_warned_of(tmp_path: Path, video: Path, model: str) -> None:
    record = PROMPTS | {"objects": [*PROMPTS["objects"], {"frame": 500, "id": 3, "box": [1, 1, 9, 9]}]}
    summary = run(video, tmp_path, model, prompts=PromptSet.from_record(record))
    assert summary.state == "finished"
    assert [w for w in summary.warnings if "before the prompts at frames [500]" in w]


def test_a_bad_prompt_in_the_middle_leaves_what_is_committed(
    tmp_path: Path, undisturbed: Path, video: Path, model: str
) -> None:
    entry = {"frame": 12, "id": 5, "rle": {"size": [10, 10], "counts": [3, 4, 93]}}
    record = PROMPTS | {"objects": [*PROMPTS["objects"], entry]}
    with pytest.raises(PromptError, match="10x10, the frame 158x122"):
        run(video, tmp_path, model, prompts=PromptSet.from_record(record))
    assert StreamStore(tmp_path, "cam").committed().next_frame == 10
    assert query(tmp_path, "select max(frame_index) as last from tracks").to_pylist() == [{"last": 9}]


def test_frames_before_the_first_prompt_have_files_without_rows(
    tmp_path: Path, video: Path, model: str
) -> None:
    record = {"version": 1, "objects": [{"frame": 12, "id": 4, "box": [40, 40, 50, 50]}]}
    run(video, tmp_path, model, prompts=PromptSet.from_record(record), max_frames=20)
    counts = [pq.read_metadata(p).num_rows for p in sorted((tmp_path / "tracks").rglob("*.parquet"))]
    assert counts == [0, 0, 3, 5]


def test_damaged_video_tracks_what_decodes_with_one_event_per_loss(tmp_path: Path, model: str) -> None:
    clean = make_video(tmp_path / "clean.mp4", 40, gop=10, b_frames=0)
    broken = damage_packets(clean, tmp_path / "broken.mp4", [12, 13, 31])
    prompts = PromptSet.from_record(
        {"version": 1, "objects": [{"id": 1, "polygons": [[2, 28, 34, 28, 34, 55]]}]}
    )
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    summary = run(broken, whole, model, prompts=prompts)
    losses = query(whole, "select frame_index, count from events where kind = 'corrupt'").to_pylist()
    assert losses
    assert summary.losses == sum(r["count"] for r in losses)
    tracked = query(whole, "select count(distinct frame_index) as n from tracks").to_pylist()[0]["n"]
    assert tracked == summary.frames >= 25

    with pytest.raises(InterruptedRunError):
        run(broken, cut, model, prompts=prompts, on_frame=stop_at(23))
    run(broken, cut, model, prompts=prompts)
    assert files(cut, "tracks", "events") == files(whole, "tracks", "events")


def test_hopelessly_corrupt_video_is_one_clear_error(tmp_path: Path, model: str) -> None:
    clean = make_video(tmp_path / "clean.mp4", 20)
    broken = corrupt(clean, tmp_path / "broken.mp4", count=400, between=(0.0, 1.0))
    with pytest.raises(SourceError, match=r"^[^\n]*broken\.mp4[^\n]*$"):
        run(broken, tmp_path / "out", model)


def test_a_folder_of_images_whose_size_changes(tmp_path: Path, model: str) -> None:
    make_images(tmp_path / "images", 6)
    import cv2

    for i in (6, 7, 8):
        small = cv2.resize(np.asarray(cv2.imread(str(tmp_path / "images/frame2.jpg"))), (81, 67))
        cv2.imwrite(str(tmp_path / f"images/frame{i}.jpg"), small)
    summary = run(
        tmp_path / "images",
        tmp_path / "out",
        model,
        prompts=PromptSet.from_record({"version": 1, "objects": [{"id": 1, "box": [20, 20, 60, 60]}]}),
    )
    assert summary.frames == 9
    sizes = query(
        tmp_path / "out", "select frame_width, frame_height, pts_seconds from tracks order by frame_index"
    ).to_pylist()
    assert [tuple(r.values()) for r in sizes] == [(160, 120, None)] * 6 + [(81, 67, None)] * 3
    events = query(tmp_path / "out", "select frame_index, detail from events where kind = 'resized'")
    assert events.to_pylist() == [{"frame_index": 6, "detail": '{"from": [120, 160], "to": [67, 81]}'}]


def test_a_failed_commit_surfaces_and_a_later_run_goes_on(
    tmp_path: Path, undisturbed: Path, video: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = StreamStore.commit

    def failing(self: StreamStore, first: int, last: int, *tables: Any) -> bool:
        if first == 10:
            raise OSError(28, "No space left on device")
        return commit(self, first, last, *tables)

    monkeypatch.setattr(StreamStore, "commit", failing)
    with pytest.raises(OSError, match="No space left"):
        run(video, tmp_path, model)
    monkeypatch.undo()
    run(video, tmp_path, model)
    assert files(tmp_path, "tracks", "events") == files(undisturbed, "tracks", "events")


def test_a_second_writer_stops_or_writes_the_same(
    tmp_path: Path, undisturbed: Path, video: Path, model: str
) -> None:
    """Two simultaneous runs of a stream: both may finish, with exactly the same rows."""
    with _start(video, tmp_path, model) as one, _start(video, tmp_path, model) as two:
        codes = [one.wait(timeout=300), two.wait(timeout=300)]
    assert 0 in codes
    assert files(tmp_path, "tracks") == files(undisturbed, "tracks")


@pytest.mark.slow
def test_many_streams_on_one_executor_do_not_touch_each_other(
    tmp_path: Path, undisturbed: Path, video: Path, model: str
) -> None:
    network = load_model(model)
    segmenter = VideoSegmenter(network, CAPPED_MEMORY, size=network.config.default_size)
    settings = TrackSettings.of(model=model, chunk_frames=5, snapshot_chunks=2).of_segmenter(
        segmenter, threads=1
    )
    streams = [
        StreamTracker(
            open_source(str(video)),
            StreamStore(tmp_path / str(i), "cam"),
            segmenter,
            settings,
            PromptSet.from_record(PROMPTS),
        )
        for i in range(3)
    ]
    executor = Executor(segmenter, 1)
    # They start one after another, so that they stand at different frames.
    running: list[StreamTracker] = []
    for stream in streams:
        running = executor.advance([*running, stream])
    while running:
        running = executor.advance(running)
    for i, stream in enumerate(streams):
        stream.close()
        assert files(tmp_path / str(i), "tracks") == files(undisturbed, "tracks")


def test_accept_needs_a_frame(tmp_path: Path, video: Path, model: str) -> None:
    network = load_model(model)
    segmenter = VideoSegmenter(network, CAPPED_MEMORY, size=48)
    settings = TrackSettings.of(model=model).of_segmenter(segmenter, threads=1)
    source = open_source(str(video))
    store = StreamStore(tmp_path, "cam")
    stream = StreamTracker(source, store, segmenter, settings, PromptSet.from_record(PROMPTS))
    with stream, pytest.raises(RuntimeError, match="without a frame"):
        stream.accept(StepResult((), (2, 2), torch.ones(1, 2, 2)))


@pytest.mark.parametrize(
    "wrong", [{"threads": 0}, {"chunk_frames": 0}, {"max_frames": 0}, {"dtype": "int8"}, {"size": 8}]
)
def test_settings_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(wrong))}="):
        TrackSettings.of(**wrong)


def _start(video: Path, out: Path, model: str, **changes: Any) -> Forked:
    arguments = {
        "video": str(video),
        "out": str(out),
        "prompts": PROMPTS,
        "stream_id": "cam",
        "model": model,
        "threads": 1,
        "dtype": "float32",
        "chunk_frames": 5,
        "snapshot_chunks": 2,
        "memory": asdict(CAPPED_MEMORY),
        **changes,
    }
    return Forked(WORKER, [json.dumps(arguments)])


@pytest.mark.chaos
def test_killed_at_any_moment_it_ends_with_the_same_bytes(
    tmp_path: Path, undisturbed: Path, video: Path, model: str
) -> None:
    """SIGKILL at seeded moments, repeatedly, until a run completes."""
    rng = random.Random(5)
    kills, rounds = 0, 0
    while kills < KILLS:
        out = tmp_path / str(rounds)
        rounds += 1
        while True:
            process = _start(video, out, model)
            assert process.stdout.readline() == "go\n"
            try:
                code = process.wait(timeout=rng.uniform(0.02, 0.8) if kills < KILLS else 300)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                kills += 1
                continue
            finally:
                process.stdout.close()
            assert code == 0
            break
        assert files(out, "tracks", "events") == files(undisturbed, "tracks", "events")
    logging.getLogger(__name__).info("%d kills over %d runs at %s", kills, rounds, time.ctime())


@pytest.mark.chaos
def test_killed_while_starting_over_it_ends_with_the_same_bytes(
    tmp_path: Path, undisturbed: Path, video: Path, model: str
) -> None:
    """An interrupted restart is completed by the next run, even without --restart."""
    rng = random.Random(11)
    run(video, tmp_path, model)
    for _ in range(KILLS):
        with _start(video, tmp_path, model, restart=True) as process:
            assert process.stdout.readline() == "go\n"
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=rng.uniform(0.02, 0.35))
            process.kill()
        run(video, tmp_path, model)
        assert files(tmp_path, "tracks", "events") == files(undisturbed, "tracks", "events")
        assert sorted(p.name for p in (tmp_path / "tracks").iterdir()) == ["stream_id=cam"]
