"""Layouts: which data set a folder is, which clips a split names, and what of them is scored."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from support.labelled import Replay, square, write_clip

from jobs.evaluation.data_sets import DataSet, find_data_set, read_truth, scored_objects
from jobs.evaluation.davis import run
from pipeline.base.errors import UsageError

ONE = [square(10, 5 + i) for i in range(4)]


def both(i: int) -> np.ndarray:
    labels: np.ndarray = square(2, 3 + i, value=1) + square(20, 30 + i, value=2)
    return labels


def names(data: DataSet) -> list[str]:
    return [clip.name for clip in data.clips]


def plan(data: DataSet, number: int = 0) -> dict[str, list[int]]:
    clip = data.clips[number]
    return {n: sorted(ids) for n, ids in scored_objects(clip, data, read_truth(clip, data)).items()}


def write_meta(part: Path, videos: dict[str, dict[str, list[str]]]) -> None:
    objects = {
        clip: {"objects": {i: {"category": "dog", "frames": frames} for i, frames in ids.items()}}
        for clip, ids in videos.items()
    }
    (part / "meta.json").write_text(json.dumps({"videos": objects}))


def write_list(root: Path, name: str, *clips: str) -> None:
    path = root / "ImageSets" / f"{name}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(clips) + "\n")


# --- which one it is -----------------------------------------------------------------------------------


def test_davis_lists_and_resolutions(tmp_path: Path) -> None:
    for name in ("cows", "dog", "test"):
        write_clip(tmp_path, name, ONE)
        write_clip(tmp_path, name, ONE, layer="Full-Resolution")
    write_list(tmp_path, "2017/val", "dog", "cows")
    write_list(tmp_path, "2016/val", "cows")
    write_list(tmp_path, "2017/test-dev", "test")
    data = find_data_set(tmp_path)
    assert (data.name, names(data), data.skips_last, data.merged) == (
        "DAVIS 2017",
        ["dog", "cows"],
        True,
        False,
    )
    assert data.clips[0].frames[0].parent == tmp_path / "JPEGImages/480p/dog"
    full = find_data_set(tmp_path, split="test-dev", resolution="Full-Resolution")
    assert (full.name, names(full)) == ("DAVIS 2017", ["test"])
    assert full.clips[0].frames[0].parent.parent.name == "Full-Resolution"
    first = full.clips[0].annotations["00000"]
    assert isinstance(first, Path)
    assert first.parent.parent.name == "Full-Resolution"
    old = find_data_set(tmp_path, split="2016/val")
    assert (old.name, names(old), old.merged) == ("DAVIS 2016", ["cows"], True)
    own = tmp_path / "mine.txt"
    own.write_text("test\n")
    assert names(find_data_set(tmp_path, split=str(own))) == ["test"]


def test_davis_2016_has_one_object_however_many_a_release_distinguishes(tmp_path: Path) -> None:
    truth = [both(i) for i in range(4)]
    write_clip(tmp_path, "cows", truth)
    write_list(tmp_path, "2016/val", "cows")
    replay = Replay([(t > 0).astype(np.uint8) for t in truth])
    report = run(tmp_path, replay)
    assert [(o.object_id, o.j) for o in report.clips[0].objects] == [(1, 1.0)]
    assert list(replay.states[0]["prompts"][0].masks) == [1]


def test_youtube_vos_and_its_parts(tmp_path: Path) -> None:
    for part in ("valid", "train"):
        write_clip(tmp_path / part, "0a1b", ONE, layer=".")
        write_meta(tmp_path / part, {"0a1b": {"1": ["00000", "00001"]}})
    data = find_data_set(tmp_path)
    assert (data.name, data.skips_last, data.wrapped) == ("YouTube-VOS valid", False, True)
    assert find_data_set(tmp_path, split="train").name == "YouTube-VOS train"
    assert find_data_set(tmp_path / "train").name == "YouTube-VOS train"


def test_the_other_data_sets(tmp_path: Path) -> None:
    write_clip(tmp_path / "MOSE" / "valid", "a0", ONE, layer=".")
    assert find_data_set(tmp_path / "MOSE").name == "MOSE valid"
    write_clip(tmp_path / "LVOS" / "valid", "a0", ONE, layer=".")
    lvos = find_data_set(tmp_path / "LVOS")
    assert (lvos.name, lvos.wrapped, lvos.skips_last) == ("LVOS valid", True, True)
    for name in ("blueboy", "dressage", "rat"):
        write_clip(tmp_path / "long_video", name, ONE, layer=".")
        write_clip(tmp_path / "long_video_x3", name, ONE, layer=".")
    data = find_data_set(tmp_path / "long_video")
    assert (data.name, data.skips_last, len(data.clips)) == ("Long-time Video", False, 3)
    assert find_data_set(tmp_path / "long_video_x3").name == "Long-time Video 3x"


@pytest.mark.parametrize("images", ["frames", "images", "JPEGImages"])
@pytest.mark.parametrize("masks", ["masks", "Annotations"])
def test_folders_of_any_order(tmp_path: Path, images: str, masks: str) -> None:
    write_clip(tmp_path / "made", "a", ONE, layer=".")
    one = tmp_path / "by-layer"
    one.mkdir()
    (tmp_path / "made/JPEGImages").rename(one / images)
    (tmp_path / "made/Annotations").rename(one / masks)
    assert names(find_data_set(one)) == ["a"]
    two = tmp_path / "by-clip"
    (two / "b").mkdir(parents=True)
    (one / images / "a").rename(two / "b" / images)
    (one / masks / "a").rename(two / "b" / masks)
    data = find_data_set(two)
    assert (data.name, names(data)) == ("folders", ["b"])
    alone = find_data_set(two / "b")
    assert (alone.name, names(alone)) == ("a clip", ["b"])
    assert plan(data) == plan(alone) == {"00001": [1], "00002": [1], "00003": [1]}
    for number in (1, 2):  # masks on the first and the last frame
        (two / "b" / masks / f"{number:05d}.png").unlink()
    assert run(two, Replay(ONE)).to_json()["overall"]["J&F"] == 100.0


# --- what is scored ------------------------------------------------------------------------------------


def test_an_object_is_scored_only_where_it_is_labelled(tmp_path: Path) -> None:
    """The second object comes in a mask of its own: the first one is not missing there."""
    second = square(20, 30, value=2)
    write_clip(tmp_path, "a", [square(2, 3), square(2, 4), second, both(3), both(4), both(5)], layer=".")
    every = [f"{i:05d}" for i in range(6)]
    write_meta(tmp_path, {"a": {"1": every, "2": [n for n in every[2:] if n != "00004"]}})
    data = find_data_set(tmp_path)
    assert plan(data) == {"00001": [1], "00003": [1, 2], "00004": [1], "00005": [1, 2]}
    labels = [square(2, 3), square(2, 4), both(2), both(3), both(4), both(5)]
    report = run(tmp_path, Replay(labels))
    assert [(o.object_id, o.j, o.frames) for o in report.clips[0].objects] == [(1, 1.0, 4), (2, 1.0, 2)]


def test_without_a_list_of_frames_an_object_is_scored_where_it_shows(tmp_path: Path) -> None:
    write_clip(tmp_path, "a", [both(0), square(2, 4), both(2), square(2, 3)], layer=".")
    write_meta(tmp_path, {})
    assert plan(find_data_set(tmp_path)) == {"00001": [1], "00002": [1, 2], "00003": [1]}


def test_every_frame_is_tracked_and_those_given_are_asked_for(tmp_path: Path) -> None:
    write_clip(tmp_path / "valid", "a", ONE, layer=".")
    write_meta(tmp_path / "valid", {})
    images = tmp_path / "valid_all_frames/JPEGImages/a"
    images.mkdir(parents=True)
    picture = (tmp_path / "valid/JPEGImages/a/00000.jpg").read_bytes()
    for number in range(8):
        (images / f"{number:05d}.jpg").write_bytes(picture)
    assert len(find_data_set(tmp_path).clips[0].frames) == 4
    clip = find_data_set(tmp_path, all_frames=True).clips[0]
    assert len(clip.frames) == 8
    assert clip.asked == frozenset(f"{i:05d}" for i in range(4))


# --- what is refused -----------------------------------------------------------------------------------


def refused(root: Path, split: str | None = None, **options: str | bool) -> str:
    with pytest.raises(UsageError) as caught:
        find_data_set(root, split=split, **options)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_split_or_a_resolution_that_is_not_there_is_named(tmp_path: Path) -> None:
    write_clip(tmp_path, "a", ONE)
    assert "has no ImageSets/ and no part of that name" in refused(tmp_path, split="val")
    write_list(tmp_path, "2017/train", "a")
    assert "has no list of the usual names; it has 2017/train: see --split" in refused(tmp_path)
    assert names(find_data_set(tmp_path, split="train")) == ["a"]
    assert "has no list 'vla'; it has 2017/train" in refused(tmp_path, split="vla")
    assert "has no folder '4k'; it has 480p" in refused(tmp_path, split="train", resolution="4k")
    write_list(tmp_path, "2017/val", "a", "goat")
    assert "names clip 'goat', which is not in" in refused(tmp_path)
    assert "there is no folder" in refused(tmp_path, split="train", all_frames=True)


def test_parts_and_damaged_facts_are_named(tmp_path: Path) -> None:
    write_clip(tmp_path / "valid", "a", ONE, layer=".")
    assert "has no part 'test'; it has valid" in refused(tmp_path, split="test")
    for text in ("{", "{}", '{"videos": []}', "[1]"):
        (tmp_path / "valid/meta.json").write_text(text)
        assert "is no meta.json of YouTube-VOS" in refused(tmp_path)
    (tmp_path / "valid/meta.json").write_text('{"videos": {"a": {"objects": {"x": {"frames": []}}}}}')
    assert "objects of clip a cannot be read" in refused(tmp_path)


def test_a_folder_of_no_known_layout_is_named(tmp_path: Path) -> None:
    (tmp_path / "something").mkdir()
    assert "is laid out as no known data set is: it has no folder JPEGImages (or frames" in refused(tmp_path)
