"""Videos whose objects are small are seen larger by the network."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.small_net import SMALL_MEMORY, small_model
from support.tiny import CAPPED_MEMORY, TINY
from support.videos import make_video
from support.written import files

from pipeline.analytics.query import query
from pipeline.base.errors import SettingsConflictError, UsageError
from pipeline.prompts.resolving import PromptSet
from pipeline.tracking.files.track import track
from pipeline.tracking.settings import TrackSettings
from pipeline.tracking.small_objects import has_small_object
from xmem_core import ModelConfig, VideoSegmenter, XMem
from xmem_core.weights import save_weights

pytestmark = pytest.mark.usefixtures("one_thread")

FRAMES = 12
SIZE, SMALL_SIZE = 96, 112


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("video")
    return make_video(folder / "clip.mkv", FRAMES, width=158, height=122)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Sees videos at 96 pixels, and at 112 if an object is small."""
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    config = replace(TINY, default_size=SIZE, default_small_size=SMALL_SIZE)
    save_weights(XMem(config).eval(), path)
    return str(path)


def prompts(*sides: int, frame: int = 0) -> PromptSet:
    """Objects with these sides, in pixels of the frame, of 122 pixels; 81 are 64 of the network's input."""
    objects, x = [], 2
    for i, side in enumerate(sides, 1):
        corners = [x, 5, x + side, 5, x + side, 5 + side, x, 5 + side]
        objects.append({"frame": frame, "id": i, "polygons": [corners]})
        x += side + 2
    return PromptSet.from_record({"version": 1, "objects": objects})


def masks(video: Path, out: Path, model: str, given: PromptSet, **changes: Any) -> list[Any]:
    arguments: dict[str, Any] = {"chunk_frames": 5, "snapshot_chunks": 1, "memory": CAPPED_MEMORY}
    track(video, out, prompts=given, model=model, stream_id="cam", threads=1, dtype="float32",
          **(arguments | changes))  # fmt: skip
    rows: list[Any] = query(
        out, "select frame_index, object_id, mask_rle from tracks order by all"
    ).to_pylist()
    assert len(rows) >= FRAMES // 2
    return rows


@pytest.mark.parametrize(
    ("given", "size"),
    [
        (prompts(30), SMALL_SIZE),
        (prompts(100), SIZE),
        (prompts(90, 30), SMALL_SIZE),
        (prompts(30, frame=3), SMALL_SIZE),
        (prompts(100, frame=3), SIZE),
    ],
    ids=["small", "large", "both", "small, late", "large, late"],
)
def test_masks_are_those_of_the_size_that_the_objects_need(
    tmp_path: Path, video: Path, model: str, given: PromptSet, size: int
) -> None:
    found = masks(video, tmp_path / "found", model, given)
    assert found == masks(video, tmp_path / "expected", model, given, size=size)
    other = SIZE + SMALL_SIZE - size
    assert found != masks(video, tmp_path / "other", model, given, size=other)


@pytest.mark.parametrize("direction", ["forward", "both"])
def test_any_cut_and_any_restart_give_the_same_rows(
    tmp_path: Path, video: Path, model: str, direction: str
) -> None:
    given = prompts(30, frame=4)
    once = masks(video, tmp_path / "once", model, given, direction=direction, chunk_frames=50)
    for limit in (2, 6):
        masks_so_far = tmp_path / "cut"
        track(video, masks_so_far, prompts=given, model=model, stream_id="cam", threads=1, dtype="float32",
              memory=CAPPED_MEMORY, chunk_frames=5, snapshot_chunks=1, max_frames=limit,
              direction=direction)  # fmt: skip
    assert masks(video, tmp_path / "cut", model, given, direction=direction) == once
    assert once == masks(video, tmp_path / "as", model, given, direction=direction, size=SMALL_SIZE)


def test_a_stream_that_was_begun_with_one_size_keeps_it(tmp_path: Path, video: Path, model: str) -> None:
    given = prompts(30)
    masks(video, tmp_path / "old", model, given, max_frames=7, small_size=0)
    record = json.loads((tmp_path / "old" / "streams" / "cam.json").read_text())
    assert "small_size" not in record["settings"]  # as earlier versions wrote it
    # Without snapshots it starts over from the first frame.
    for snapshot in files(tmp_path / "old", "state"):
        (tmp_path / "old" / snapshot).unlink()
    found = masks(video, tmp_path / "old", model, given)
    assert found == masks(video, tmp_path / "all", model, given, size=SIZE)


def test_a_size_of_ones_own_is_another_setting(tmp_path: Path, video: Path, model: str) -> None:
    masks(video, tmp_path, model, prompts(30), max_frames=7)
    record = json.loads((tmp_path / "streams" / "cam.json").read_text())
    assert (record["settings"]["size"], record["settings"]["small_size"]) == (SIZE, SMALL_SIZE)
    with pytest.raises(SettingsConflictError, match=r"small_size was 112, now None"):
        masks(video, tmp_path, model, prompts(30), size=SIZE)


@pytest.mark.parametrize(
    ("asked", "used"),
    [
        ({}, 64),
        ({"size": 48}, None),
        ({"size": 48, "small_size": 80}, 80),
        ({"small_size": 0}, None),
        ({"small_size": 40}, None),
        ({"detector": "motion"}, None),
        ({"detector": "motion", "small_size": 80}, None),
    ],
)
def test_which_size_small_objects_have(asked: dict[str, Any], used: int | None) -> None:
    network = small_model()
    network.config = replace(network.config, default_size=48, default_small_size=64)
    segmenter = VideoSegmenter(network, SMALL_MEMORY, size=48)
    settings = TrackSettings.of(**asked).of_segmenter(segmenter, 1)
    assert settings.model.small_size == used
    assert settings.of_segmenter(segmenter, 1) == settings
    again = TrackSettings.from_dict(settings.to_dict())
    assert again == settings
    assert again.of_segmenter(segmenter, 1) == settings


def test_frames_as_they_are_have_no_larger_size() -> None:
    network = small_model()
    network.config = replace(network.config, default_size=48, default_small_size=64)
    settings = TrackSettings.of(size=0).of_segmenter(VideoSegmenter(network, SMALL_MEMORY, size=None), 1)
    assert settings.model.small_size is None


@pytest.mark.parametrize("size", [-1, 5, 10_000])
def test_a_size_out_of_range_is_refused(size: int) -> None:
    with pytest.raises(UsageError, match=f"small_size={size} is not allowed"):
        TrackSettings.of(small_size=size)


def test_an_object_is_small_by_its_longer_side() -> None:
    mask = np.zeros((100, 200), np.bool_)
    mask[10:30, 20:148] = True  # 128 wide
    assert not has_small_object({1: mask}, 0.5)
    assert has_small_object({1: mask}, 0.49)
    assert not has_small_object({1: mask.T}, 0.5)
    dot = np.zeros_like(mask)
    dot[0, 0] = True
    assert has_small_object({1: mask, 2: dot}, 1)
    assert not has_small_object({}, 1)


def test_a_models_size_for_small_objects_is_larger() -> None:
    assert ModelConfig.lite().default_small_size == 512
    with pytest.raises(
        ValueError, match=r"default_small_size=384 is not allowed: more than default_size=384"
    ):
        replace(ModelConfig.lite(), default_small_size=384)
