"""Backward and both-way tracking: rows of both passes, once each, whatever is interrupted."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.forked import Forked
from support.interrupted import InterruptedRunError
from support.tiny import CAPPED_MEMORY
from support.videos import make_video, shapes, truncate
from support.written import files

from pipeline.analytics.query import query
from pipeline.base.errors import SettingsConflictError, UsageError
from pipeline.prompts.box_segmenters import load_box_segmenter
from pipeline.prompts.resolving import PromptSet, resolve
from pipeline.tracking.files.backward import BackwardPlan
from pipeline.tracking.files.stream_tracker import StreamTracker
from pipeline.tracking.files.track import track
from pipeline.tracking.settings import TrackSettings
from pipeline.tracks.masks import rle_to_mask
from pipeline.video.sources import open_source
from xmem_core import Prompt, VideoSegmenter, load_model

pytestmark = pytest.mark.usefixtures("one_thread")

WORKER = Path(__file__).parents[3] / "support" / "track_worker.py"
FRAMES = 23
SQUARE = [[2, 28, 34, 28, 34, 55, 2, 55]]
PROMPTS: dict[str, Any] = {
    "version": 1,
    "objects": [
        {"frame": 0, "id": 1, "category": "square", "polygons": SQUARE},
        {"frame": 9, "id": 3, "category": "late", "polygons": [[60, 10, 90, 10, 90, 40, 60, 40]]},
        {"frame": 17, "id": 2, "category": "box", "box": [90, 70, 30, 30]},
        {"frame": 17, "id": 1, "polygons": [[85, 65, 100, 65, 100, 80, 85, 80]]},
        {"frame": 20, "id": 3, "polygons": [[60, 12, 90, 12, 90, 42, 60, 42]]},
    ],
    "remove": [{"frame": 4, "id": 3}, {"frame": 13, "id": 3}],
}
ROWS = "select * from tracks order by frame_index, object_id"


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("video")
    return make_video(folder / "clip.mkv", FRAMES, width=158, height=122, b_frames=2, start_pts=10, gop=8)


def run(video: Path | str, out: Path, model: str, direction: str = "both", **changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "stream_id": "cam",
        "model": model,
        "threads": 1,
        "dtype": "float32",
        "chunk_frames": 5,
        "snapshot_chunks": 2,
        "memory": CAPPED_MEMORY,
        "prompts": PromptSet.from_record(PROMPTS),
        "direction": direction,
    }
    return track(str(video), out, **(arguments | changes))


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, video: Path, model: str) -> Path:
    out = tmp_path_factory.mktemp("both")
    summary = run(video, out, model)
    assert (summary.state, summary.frames, summary.tracked) == ("finished", FRAMES, FRAMES + 18)
    return out


@pytest.fixture(scope="module")
def backward(tmp_path_factory: pytest.TempPathFactory, video: Path, model: str) -> Path:
    out = tmp_path_factory.mktemp("backward")
    summary = run(video, out, model, "backward")
    assert (summary.state, summary.frames) == ("finished", 18)
    return out


def frames_of(out: Path, object_id: int) -> list[int]:
    rows = query(out, f"select frame_index from tracks where object_id = {object_id} order by 1")
    return [int(f) for f in rows["frame_index"].to_pylist()]


def test_each_object_has_one_row_on_each_frame(both: Path, backward: Path) -> None:
    everywhere = list(range(FRAMES))
    assert frames_of(both, 1) == frames_of(both, 2) == everywhere
    # A removal before its first prompt ends it backward, one after it forward, until the next prompt.
    assert frames_of(both, 3) == [*range(5, 13), *range(20, FRAMES)]
    assert [frames_of(backward, i) for i in (1, 2, 3)] == [[0], [*range(18)], [*range(5, 10)]]


def test_backward_rows_are_those_of_a_bare_loop_from_the_end(
    both: Path, backward: Path, video: Path, model: str
) -> None:
    network = load_model(model)
    segmenter = VideoSegmenter(network, CAPPED_MEMORY, size=network.config.default_size)
    state, prompts = segmenter.new_state(), PromptSet.from_record(PROMPTS)
    with open_source(str(video)) as source:
        frames = list(source.frames())
    expected = {}
    for frame in reversed(frames[:18]):
        number = frame.frame_index
        if number == 4:
            state.remove_objects([3])
        first = {17: [2], 9: [3], 0: []}.get(number, [])
        masks = resolve(prompts.at(number), frame, load_box_segmenter()).masks if first else {}
        result = segmenter.step(state, frame.image, Prompt({i: masks[i] for i in first}) if first else None)
        labels = result.label_map.numpy()
        for object_id in result.object_ids:
            expected[number, object_id] = (frame.pts_seconds, labels == object_id)
    firsts = {2: 17, 3: 9}
    for out, at_prompt in ((both, False), (backward, True)):
        found = {
            (r["frame_index"], r["object_id"]): (r["pts_seconds"], rle_to_mask(r["mask_rle"], 122, 158))
            for r in query(out, ROWS).to_pylist()
            if r["area"] and r["frame_index"] < firsts.get(r["object_id"], -1) + at_prompt
        }
        there = {
            key: value
            for key, value in expected.items()
            if value[1].any() and key[0] < firsts[key[1]] + at_prompt
        }
        assert set(found) == set(there)
        assert len(found) > 4
        for key, (pts, mask) in there.items():
            assert found[key][0] == pts
            assert np.array_equal(found[key][1], mask), key


def test_forward_rows_do_not_depend_on_the_direction(
    tmp_path: Path, both: Path, video: Path, model: str
) -> None:
    run(video, tmp_path, model, "forward")
    forward = query(tmp_path, ROWS).to_pylist()
    merged = query(both, ROWS).to_pylist()
    keys = {(r["frame_index"], r["object_id"]) for r in forward}
    assert [r for r in merged if (r["frame_index"], r["object_id"]) in keys] == forward
    assert len(merged) > len(forward)


def test_events_and_record(both: Path, backward: Path) -> None:
    ask = "select frame_index, kind, object_id, reason from events order by all"
    assert [tuple(r.values()) for r in query(both, ask).to_pylist()] == [
        (0, "object_added", 1, "prompt"),
        (9, "object_added", 3, "prompt"),
        (13, "object_removed", 3, "requested"),
        (17, "corrected", 1, "prompt"),
        (17, "object_added", 2, "prompt"),
        (20, "object_added", 3, "prompt"),
    ]
    assert [tuple(r.values()) for r in query(backward, ask).to_pylist()] == [
        (0, "object_added", 1, "prompt"),
        (9, "object_added", 3, "prompt"),
        (17, "object_added", 2, "prompt"),
    ]
    for out, direction in ((both, "both"), (backward, "backward")):
        record = json.loads((out / "streams/cam.json").read_text())
        assert record["settings"]["direction"] == direction
        assert record["rows"] == query(out, "select count(*) as n from tracks").to_pylist()[0]["n"]
        assert list(record["resolved_prompts"]) == ["17"]
        assert sorted(p.name for p in out.iterdir()) == [".tmp", "events", "state", "streams", "tracks"]


@pytest.mark.parametrize("direction", ["both", "backward"])
@pytest.mark.parametrize(
    "stop_after", [7, 18, 26, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 17, 20, 35))]
)
def test_interrupted_anywhere_it_ends_with_the_same_bytes(
    tmp_path: Path,
    request: pytest.FixtureRequest,
    video: Path,
    model: str,
    direction: str,
    stop_after: int,
) -> None:
    undisturbed = request.getfixturevalue(direction)

    def stop(stream: StreamTracker) -> None:
        if stream.summary.tracked == stop_after:
            raise InterruptedRunError

    with pytest.raises(InterruptedRunError):
        run(video, tmp_path, model, direction, on_frame=stop)
    summary = run(video, tmp_path, model, direction)
    assert files(tmp_path, "tracks", "events", "streams") == files(undisturbed, "tracks", "events", "streams")
    assert not (tmp_path / "backward").exists()
    whole = FRAMES + 18 if direction == "both" else 36
    assert summary.tracked <= whole - stop_after + 15


def test_killed_at_any_time_it_ends_with_the_same_bytes(
    tmp_path: Path, both: Path, video: Path, model: str
) -> None:
    arguments = {
        "video": str(video),
        "out": str(tmp_path),
        "prompts": PROMPTS,
        "memory": {k: v for k, v in CAPPED_MEMORY.to_dict().items() if v is not None},
        "stream_id": "cam",
        "model": model,
        "threads": 1,
        "dtype": "float32",
        "chunk_frames": 5,
        "snapshot_chunks": 2,
        "direction": "both",
    }
    moments = random.Random(7)
    for _ in range(2):
        with Forked(WORKER, [json.dumps(arguments)]) as worker:
            assert worker.stdout.readline() == "go\n"
            time.sleep(moments.uniform(0.1, 0.7))
            worker.kill()
    run(video, tmp_path, model)
    assert files(tmp_path, "tracks", "events", "streams") == files(both, "tracks", "events", "streams")


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_any_cut_into_chunks_gives_the_same_rows(
    tmp_path: Path, both: Path, video: Path, model: str, chunk: int
) -> None:
    run(video, tmp_path, model, chunk_frames=chunk)
    assert query(tmp_path, ROWS).equals(query(both, ROWS))


def test_with_a_larger_max_frames_rows_are_those_of_a_single_run(
    tmp_path: Path, both: Path, video: Path, model: str
) -> None:
    for limit in (6, 12, None):
        summary = run(video, tmp_path, model, max_frames=limit)
        assert summary.frames == (limit or FRAMES)
        # What a longer run needs of the backward pass stays until it is merged.
        assert (tmp_path / "backward").exists() == (limit is not None)
        ask = f"select * from tracks where frame_index < {summary.frames} order by frame_index, object_id"
        assert query(tmp_path, ROWS).equals(query(both, ask))
        assert summary.rows == query(tmp_path, "select * from tracks").num_rows
    assert summary.tracked == FRAMES - 12


def test_a_finished_stream_is_left_alone_and_restart_removes_everything(
    tmp_path: Path, video: Path, model: str
) -> None:
    run(video, tmp_path, model, max_frames=6)
    before = files(tmp_path, "tracks", "events", "state", "streams", "backward")
    assert any(name.startswith("backward/cam/") for name in before)
    assert run(video, tmp_path, model, max_frames=6).tracked == 0
    assert files(tmp_path, "tracks", "events", "state", "streams", "backward") == before
    with pytest.raises(SettingsConflictError, match="direction was 'both', now 'forward'"):
        run(video, tmp_path, model, "forward", max_frames=6)
    run(video, tmp_path, model, "forward", max_frames=6, restart=True)
    assert not (tmp_path / "backward").exists()


def test_what_was_left_by_a_kill_after_the_end_is_removed(tmp_path: Path, video: Path, model: str) -> None:
    run(video, tmp_path, model)
    left = tmp_path / "backward/cam/0123/streams/cam.json"
    left.parent.mkdir(parents=True)
    left.write_text("{}")
    run(video, tmp_path, model)
    assert not (tmp_path / "backward").exists()


def test_prompts_after_the_end_have_no_rows(tmp_path: Path, video: Path, model: str) -> None:
    late = {"frame": FRAMES + 30, "id": 9, "polygons": SQUARE}
    prompts = PromptSet.from_record({**PROMPTS, "objects": [PROMPTS["objects"][2], late]})
    prompts = PromptSet(prompts.objects)
    summary = run(video, tmp_path, model, prompts=prompts)
    assert frames_of(tmp_path, 2) == list(range(FRAMES))
    assert frames_of(tmp_path, 9) == []
    said = f"the video ended at frame {FRAMES}, before the prompts at frames [{FRAMES + 30}]"
    assert [w for w in summary.warnings if "ellipse" not in w] == [said]
    alone = PromptSet.from_record({"version": 1, "objects": [late]})
    summary = run(video, tmp_path / "none", model, prompts=alone)
    assert (summary.state, summary.frames, summary.rows) == ("finished", FRAMES, 0)


def test_a_video_whose_end_is_missing(tmp_path: Path, model: str) -> None:
    whole = make_video(tmp_path / "whole.avi", FRAMES, width=158, height=122, gop=8)
    cut = truncate(whole, tmp_path / "cut.avi", 0.6)
    prompts = PromptSet.from_record({"version": 1, "objects": [{"frame": 7, "id": 1, "polygons": SQUARE}]})
    summary = run(cut, tmp_path / "out", model, prompts=prompts)
    assert 8 < summary.frames < FRAMES
    assert frames_of(tmp_path / "out", 1) == list(range(summary.frames))


def test_the_mask_of_an_object_prompted_late_is_right_at_the_beginning(tmp_path: Path) -> None:
    """With the carried model: the moving square of `videos.scene`, pointed at on its last frame."""
    video = make_video(tmp_path / "clip.mkv", 16, width=160, height=120)
    x, y = shapes(15, 160, 120)["square"]
    side = 120 // 5
    polygon = [x, y, x + side, y, x + side, y + side, x, y + side]
    prompts = PromptSet.from_record(
        {"version": 1, "objects": [{"frame": 15, "id": 1, "polygons": [polygon]}]}
    )
    track(video, tmp_path / "out", prompts, stream_id="cam", direction="backward", threads=1, dtype="float32")
    (row,) = query(tmp_path / "out", "select * from tracks where frame_index = 0").to_pylist()
    x, y = shapes(0, 160, 120)["square"]
    truth = np.zeros((120, 160), np.bool_)
    truth[y : y + side, x : x + side] = True
    mask = rle_to_mask(row["mask_rle"], 120, 160)
    assert (mask & truth).sum() / (mask | truth).sum() > 0.8


def test_a_detector_goes_forward_only() -> None:
    with pytest.raises(UsageError, match=r"direction='backward' is not allowed with a detector"):
        TrackSettings.of(direction="backward", detector="motion")
    assert TrackSettings.of(direction="both", detector="motion").direction == "both"
    with pytest.raises(UsageError, match=r"direction='up' is not allowed: choose one of forward, backward"):
        TrackSettings.of(direction="up")


def test_a_plan_counts_from_the_latest_first_prompt() -> None:
    prompts = PromptSet.from_record(PROMPTS)
    plan = BackwardPlan.of(prompts, "both")
    assert plan is not None
    assert (plan.last, plan.frames, plan.rows_until) == (17, 18, 17)
    assert {f: [e.object_id for e in given] for f, given in plan.prompts.objects.items()} == {0: [2], 8: [3]}
    assert dict(plan.prompts.removals) == {13: (3,)}
    only_first = PromptSet({0: prompts.at(0)})
    assert BackwardPlan.of(only_first, "both") is None
    assert BackwardPlan.of(prompts, "forward") is None
    whole = BackwardPlan.of(only_first, "backward")
    assert whole is not None
    assert (whole.last, whole.rows_until) == (0, 1)
