"""Output folders and snapshots of an earlier version can be read, queried and resumed."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from golden.before_rooms import make
from support.written import files

from pipeline.analytics.query import query
from pipeline.live.hub.hub import HubSettings, LiveHub
from pipeline.prompts.resolving import PromptSet
from pipeline.tracking.files.stream_tracker import StreamSummary
from pipeline.tracking.files.track import track
from pipeline.tracking.settings import TrackSettings
from pipeline.tracks.masks import rle_to_mask
from xmem_core import MemoryConfig, VideoSegmenter
from xmem_core.weights import save_weights

pytestmark = pytest.mark.usefixtures("one_thread")

OLD = make.FOLDER
ROWS = "select * from tracks order by frame_index, object_id"
EVENTS = "select frame_index, kind, reason, object_id, count from events order by all"
PATIENCE = 60.0


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "old.safetensors"
    save_weights(make.model(), path)
    return path


def run(out: Path, weights: Path, prompts: PromptSet | None) -> StreamSummary:
    given: dict[str, Any] = make.FILE_MEMORY
    memory = MemoryConfig(**given)
    return track(make.VIDEO, out, prompts, memory=memory, **make.arguments(weights))


def masks(table: pa.Table) -> dict[tuple[int, int], np.ndarray]:
    return {
        (row["frame_index"], row["object_id"]): rle_to_mask(
            row["mask_rle"], row["frame_height"], row["frame_width"]
        )
        for row in table.to_pylist()
        if row["mask_rle"] is not None
    }


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory, weights: Path) -> tuple[Path, StreamSummary]:
    out = tmp_path_factory.mktemp("resumed")
    shutil.copytree(OLD / "cut", out, dirs_exist_ok=True)
    return out, run(out, weights, None)


def test_an_old_output_folder_is_queried() -> None:
    count = query(OLD / "cut", "select count(*) as n, max(frame_index) as last from tracks").to_pylist()
    assert count == [{"n": 41, "last": 31}]
    added = query(
        OLD / "cut", "select frame_index, object_id, reason from events order by frame_index"
    ).to_pylist()
    assert [tuple(row.values()) for row in added] == [
        (16, 10, "detector"), (21, 1, "prompt"), (22, 11, "detector"), (28, 12, "detector"),
    ]  # fmt: skip


def test_an_interrupted_stream_goes_on_from_its_old_snapshot(resumed: tuple[Path, StreamSummary]) -> None:
    out, summary = resumed
    # 16 frames were tracked: the snapshot of frame 24 was accepted, with its detector's state.
    assert (summary.state, summary.resumed_at, summary.frames, summary.tracked) == ("finished", 32, 40, 16)
    before = files(OLD / "cut")
    after = files(out)
    assert {name: after[name] for name in before} == before
    assert set(after) == set(files(OLD / "whole"))


def test_the_resumed_rows_are_those_of_the_old_version(
    tmp_path: Path, resumed: tuple[Path, StreamSummary], weights: Path
) -> None:
    out, _ = resumed
    new, old = query(out, ROWS), query(OLD / "whole", ROWS)
    assert new.schema == old.schema
    assert query(out, EVENTS).to_pylist() == query(OLD / "whole", EVENTS).to_pylist()
    same = ["frame_index", "pts_seconds", "object_id", "category", "frame_height", "frame_width"]
    assert new.select(same).equals(old.select(same))
    # Another CPU's last bits may move an edge by a few pixels, not a mask to another place.
    ours, theirs = masks(new), masks(old)
    differing = sum(int((ours[k] != theirs[k]).sum()) for k in ours.keys() & theirs.keys())
    assert differing <= 0.02 * sum(int(m.sum()) for m in theirs.values())
    assert len(ours.keys() ^ theirs.keys()) <= 2
    # Where this machine computes the first frames as before, the resumed rows are equal in every bit.
    run(tmp_path, weights, PromptSet.from_record(make.PROMPTS))
    first = "select * from tracks where frame_index < 24 order by frame_index, object_id"
    if query(tmp_path, first).equals(query(OLD / "whole", first)):
        assert new.equals(old)


def test_an_old_live_stream_goes_on(tmp_path: Path) -> None:
    shutil.copytree(OLD / "live", tmp_path, dirs_exist_ok=True)
    before = files(OLD / "live")
    given: dict[str, Any] = make.MEMORY
    memory = MemoryConfig(**given)
    settings = HubSettings(str(tmp_path), tracking=TrackSettings(memory=memory), calibrate=False)
    segmenter = VideoSegmenter(make.model(), memory, size=48)
    with LiveHub(settings, segmenter=segmenter, open_feed=make.walk_feed) as hub:
        end = time.monotonic() + PATIENCE
        while {o["id"] for o in hub.status("cam")["objects"]} < {1, 17}:
            assert time.monotonic() < end, hub.status("cam")
            time.sleep(0.02)
        hub.remove("cam", PATIENCE)
    after = files(tmp_path)
    assert {name: after[name] for name in before} == before
    happened = query(tmp_path, "select * from events where frame_index >= 17 order by all").to_pylist()
    assert [e["kind"] for e in happened if e["kind"] == "restart"] == ["restart"]
    # Object 17 was asked for before; whatever the detector finds now has a number of its own.
    added = [(e["object_id"], e["reason"]) for e in happened if e["kind"] == "object_added"]
    assert added[0] == (17, "prompt")
    assert all(object_id > 17 and reason == "detector" for object_id, reason in added[1:])
    ids = query(tmp_path, "select distinct object_id as id from tracks where frame_index >= 17").to_pylist()
    assert {row["id"] for row in ids} >= {1, 17}
