"""What a stream remembers, listed from its snapshot: frames, prompts, thumbnails, and errors in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from support.small_net import SMALL_MEMORY, frame_at
from support.tiny import tiny_weights
from support.videos import make_video

from pipeline.base.errors import UsageError
from pipeline.base.records import EVENTS_SCHEMA, tracks_table
from pipeline.memory.stream_memory import stream_memory, write_thumbnails
from pipeline.prompts.resolving import PromptSet
from pipeline.tracking.files.track import track
from pipeline.tracking.snapshots.live import LiveSnapshot
from pipeline.tracking.snapshots.stream import Snapshot
from pipeline.tracks.store import StreamStore

FRAMES, TRACKED = 24, 22
PROMPTS: dict[str, Any] = {
    "version": 1,
    "objects": [
        {"frame": 2, "id": 1, "category": "square", "polygons": [[4, 2, 18, 2, 18, 16, 4, 16]]},
        {"frame": 5, "id": 7, "polygons": [[27, 8, 39, 8, 39, 20, 27, 20]]},
    ],
}


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A video, and the folder in which it was tracked as `walk`."""
    folder = tmp_path_factory.mktemp("remembered")
    video = make_video(folder / "walk.mkv", [frame_at(i) for i in range(FRAMES)])
    options: dict[str, Any] = {"model": tiny_weights(folder), "threads": 1, "max_frames": TRACKED}
    prompts = PromptSet.from_record(PROMPTS)
    track(str(video), str(folder / "out"), prompts, stream_id="walk", memory=SMALL_MEMORY, **options)
    return video, folder / "out"


def test_frames_have_the_numbers_of_the_video(tracked: tuple[Path, Path]) -> None:
    found = stream_memory(tracked[1])
    assert (found.stream_id, found.live) == ("walk", False)
    assert found.objects == {1: "square", 7: None}
    prompted = {(frame.frame_index, i) for frame in found.frames for i in frame.given}
    assert prompted == {(2, 1), (5, 7)}
    assert all(
        f.frame_index is not None and f.age is not None and f.frame_index + f.age == found.next_frame - 1
        for f in found.frames
    )
    assert all(7 not in f.objects for f in found.frames if f.frame_index is not None and f.frame_index < 5)
    assert {f.kind for f in found.frames} == {"working", "permanent", "long_term"}


def test_the_command_prints_a_table_json_and_thumbnails(
    tracked: tuple[Path, Path], tmp_path: Path, call: Callable[..., tuple[int, str, str]]
) -> None:
    code, out, _ = call("memory", tracked[1])
    assert code == 0
    assert "objects 1 (square), 7" in out
    code, out, err = call("memory", tracked[1], "--json", "--thumbnails", tmp_path / "small")
    assert code == 0
    listed = json.loads(out)
    assert listed["objects"] == [{"id": 1, "category": "square"}, {"id": 7, "category": None}]
    indices = sorted({frame["frame_index"] for frame in listed["frames"]})
    names = sorted(path.name for path in (tmp_path / "small").iterdir())
    assert names == [f"frame-{index:012d}.png" for index in indices]
    assert f"{len(names)} thumbnails written" in err
    shown = cv2.imread(str(tmp_path / "small" / names[0]))
    assert shown is not None
    assert shown.shape == (48, 64, 3)
    # Apart from the mask and what the codec loses.
    pictures = np.stack([frame_at(index) for index in range(FRAMES)]).astype(int)
    difference = np.median(np.abs(pictures - shown[None, :, :, ::-1]), axis=(1, 2, 3))
    assert difference.argmin() == indices[0]


def test_thumbnails_of_another_video_are_refused(tracked: tuple[Path, Path], tmp_path: Path) -> None:
    short = make_video(tmp_path / "short.mkv", [frame_at(i) for i in range(4)])
    with pytest.raises(UsageError, match=r"short.mkv has fewer frames than are remembered"):
        write_thumbnails(stream_memory(tracked[1]), tracked[1], tmp_path / "small", video=str(short))


def test_a_live_stream_has_ages_and_no_frame_numbers(tracked: tuple[Path, Path], tmp_path: Path) -> None:
    source = StreamStore(tracked[1], "walk")
    found = source.load_snapshot(FRAMES, Snapshot.from_bytes)
    assert found is not None
    store = StreamStore(tmp_path, "cam")
    store.prepare()
    store.commit(0, 99, tracks_table([]), EVENTS_SCHEMA.empty_table())
    inner = replace(found[1], next_frame=90)
    store.save_snapshot(90, LiveSnapshot(inner, datetime.now(UTC), 3).to_bytes())
    live = stream_memory(tmp_path)
    assert (live.live, live.next_frame) == (True, 90)
    of_file = stream_memory(tracked[1])
    assert [f.age for f in live.frames] == [f.age for f in of_file.frames]
    assert all(f.frame_index is None for f in live.frames)
    with pytest.raises(UsageError, match="'cam' is a live stream, whose frames are not kept: no thumbnails"):
        write_thumbnails(live, tmp_path, tmp_path / "small")


def test_streams_without_memory_are_named(
    tracked: tuple[Path, Path], tmp_path: Path, call: Callable[..., tuple[int, str, str]]
) -> None:
    with pytest.raises(UsageError, match="is no output folder of xmem"):
        stream_memory(tmp_path)
    with pytest.raises(UsageError, match=r"no tracks of stream 'run'.*it has walk"):
        stream_memory(tracked[1], "run")
    copy = tmp_path / "copy"
    shutil.copytree(tracked[1], copy)
    shutil.rmtree(copy / "state")
    code, _, err = call("memory", copy)
    assert code == 2
    assert "stream 'walk' in" in err
    assert "has no usable snapshot: a run saves one every --snapshot-chunks commits and at its end" in err
