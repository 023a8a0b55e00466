"""BURST: which files are found, what of them is scored, and what its evaluation gets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco
from support.labelled import HEIGHT, WIDTH, Replay, square

from jobs.evaluation.data_sets import find_data_set, read_labels
from jobs.evaluation.davis import run
from pipeline.base.errors import UsageError

FRAMES = [f"frame{i:04d}.jpg" for i in range(7)]


def both(i: int) -> np.ndarray:
    labels: np.ndarray = square(2, 3 + i, value=1) + square(20, 30 + i, value=2)
    return labels


def rle(mask: np.ndarray) -> str:
    """Compressed counts by pycocotools, with which BURST was made."""
    counts: bytes = coco.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"]
    return counts.decode()


def sequence(name: str, masks: dict[int, np.ndarray], **changes: Any) -> dict[str, Any]:
    """Masks by the number of an annotated frame."""
    shown = [
        {str(i): {"rle": rle(labels == i), "is_gt": True, "score": 1.0} for i in np.unique(labels) if i}
        for labels in masks.values()
    ]
    facts = {"id": 1, "dataset": "LaSOT", "seq_name": name, "fps": 30, "width": WIDTH, "height": HEIGHT}
    facts |= {"all_image_paths": FRAMES, "annotated_image_paths": [FRAMES[n] for n in masks]}
    facts |= {"neg_category_ids": [], "not_exhaustive_category_ids": []}
    return facts | {"track_category_ids": {"1": 4, "2": 9}, "segmentations": shown} | changes


def write(root: Path, *sequences: dict[str, Any], file: str = "val/all_classes") -> Path:
    path = root / f"{file}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    values = {"sequences": sequences, "categories": [{"id": 4, "name": "cat"}], "split": "val"}
    path.write_text(json.dumps(values))
    for each in sequences:
        folder = root / "frames/val/LaSOT" / each["seq_name"]
        folder.mkdir(parents=True, exist_ok=True)
        for name in FRAMES:
            cv2.imwrite(str(folder / name), np.full((HEIGHT, WIDTH, 3), 90, np.uint8))
    return path


# Object 2 is given on frame 3; on frame 6 it is out of sight.
SPARSE = {0: square(2, 3), 3: both(3), 6: square(2, 9)}
TRUTH = [square(2, 3), square(2, 4), square(2, 5), both(3), both(4), both(5), square(2, 9)]


def refused(root: Path, split: str | None = None, **options: Any) -> str:
    with pytest.raises(UsageError) as caught:
        find_data_set(root, split=split, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_frame_is_tracked_and_annotated_ones_are_scored(tmp_path: Path) -> None:
    write(tmp_path, sequence("cat-1", SPARSE))
    replay = Replay(TRUTH)
    lines: list[str] = []
    report = run(tmp_path, replay, progress=lines.append)
    (clip,) = report.clips
    assert (clip.name, clip.frames) == ("LaSOT/cat-1", 7)
    assert [(o.object_id, o.j, o.f, o.frames) for o in clip.objects] == [(1, 1.0, 1.0, 2), (2, 1.0, 1.0, 1)]
    assert [p is None or sorted(p.masks) for p in replay.states[0]["prompts"]] == [
        [1],
        True,
        True,
        [2],
        True,
        True,
        True,
    ]
    assert lines[0].startswith(
        f"BURST val ({tmp_path / 'val/all_classes.json'}): 1 clips, 7 frames; 2 objects"
    )
    # An object that is out of sight and found nevertheless scores nothing there.
    wrong = run(tmp_path, Replay([*TRUTH[:6], both(6)])).clips[0]
    assert [o.j for o in wrong.objects][1] == 0.0


def test_files_are_found_below_the_root_below_annotations_and_from_the_part(tmp_path: Path) -> None:
    few = {0: square(2, 3), 3: square(2, 6)}
    write(tmp_path, sequence("cat-1", SPARSE), sequence("dog-2", few))
    write(
        tmp_path, sequence("dog-2", few), sequence("none", {0: square(2, 3) * 0}), file="val/common_classes"
    )
    for root in (tmp_path, tmp_path / "val"):
        data = find_data_set(root)
        assert [c.name for c in data.clips] == ["LaSOT/cat-1", "LaSOT/dog-2"]
    assert [c.name for c in find_data_set(tmp_path, clips=["LaSOT/dog-2"]).clips] == ["LaSOT/dog-2"]
    common = find_data_set(tmp_path, split="val/common_classes")
    assert (common.name, [c.name for c in common.clips]) == ("BURST val", ["LaSOT/dog-2"])
    named = find_data_set(tmp_path, split=str(tmp_path / "val/common_classes.json"))
    assert [c.name for c in named.clips] == ["LaSOT/dog-2"]
    (tmp_path / "annotations").mkdir()
    (tmp_path / "val").rename(tmp_path / "annotations/val")
    assert len(find_data_set(tmp_path, split="val").clips) == 2
    assert "has no part 'test'; it has val/all_classes, val/common_classes" in refused(tmp_path, "test")
    assert "no clip 'cow'" in refused(tmp_path, clips=["cow"])
    assert "--resolution 480p: BURST has its frames in one resolution" in refused(tmp_path, resolution="480p")


def test_first_masks_alone_give_no_score_and_predictions_are_written(tmp_path: Path) -> None:
    first = {0: square(2, 3), 3: both(3) * (both(3) == 2), 6: square(2, 3) * 0}
    write(tmp_path, sequence("cat-1", first), file="val/first_frame_annotations")
    with pytest.raises(UsageError, match="cannot be scored"):
        run(tmp_path, Replay(TRUTH))
    out = tmp_path / "out"
    report = run(tmp_path, Replay(TRUTH), masks_out=out)
    assert report.j is None
    assert sorted(p.name for p in out.rglob("*.png")) == ["frame0000.png", "frame0003.png", "frame0006.png"]
    values = json.loads((out / "predictions.json").read_text())
    (made,) = values["sequences"]
    assert (values["split"], made["seq_name"], made["track_category_ids"]) == (
        "val",
        "cat-1",
        {"1": 4, "2": 9},
    )
    assert [sorted(each) for each in made["segmentations"]] == [["1"], ["1", "2"], ["1"]]
    assert made["segmentations"][1]["2"]["rle"] == rle(both(3) == 2)
    # The same command again finds everything finished.
    assert run(tmp_path, Replay(), masks_out=out).clips[0].frames == 7


def test_the_smaller_of_overlapping_masks_is_on_top(tmp_path: Path) -> None:
    big, little = square(2, 3, side=20) > 0, square(4, 5, side=4) > 0
    shown = [{"1": {"rle": rle(little)}, "2": {"rle": rle(big)}}] * 3
    write(tmp_path, sequence("cat-1", SPARSE, segmentations=shown))
    labels = read_labels(find_data_set(tmp_path).clips[0].annotations["frame0000"])
    np.testing.assert_array_equal(labels, np.where(little, 1, np.where(big, 2, 0)))


def test_only_annotated_frames_may_be_there_but_not_only_some(tmp_path: Path) -> None:
    write(tmp_path, sequence("cat-1", SPARSE))
    folder = tmp_path / "frames/val/LaSOT/cat-1"
    for number in (1, 2, 4):
        (folder / FRAMES[number]).unlink()
    assert "has no frame frame0001.jpg, which" in refused(tmp_path)
    (folder / FRAMES[5]).unlink()
    assert [p.name for p in find_data_set(tmp_path).clips[0].frames] == [FRAMES[n] for n in SPARSE]
    (folder / FRAMES[3]).unlink()
    assert "has no frame frame0003.jpg, which" in refused(tmp_path)
    (folder).rename(tmp_path / "away")
    assert "there is no folder" in refused(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"segmentations": [{"1": {}}] * 3}, "sequence LaSOT/cat-1 is damaged: KeyError: 'rle'"),
        ({"segmentations": [{"1": {"rle": "6"}}]}, "masks and frames do not fit together"),
        ({"segmentations": []}, "has no sequence with masks"),
        ({"seq_name": "../up"}, "the name 'LaSOT/../up' of a sequence is not allowed"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write(tmp_path, sequence("cat-1", SPARSE, **change))
    assert message in refused(tmp_path)


def test_files_of_another_kind_and_damaged_counts_are_named(tmp_path: Path) -> None:
    path = write(tmp_path, sequence("cat-1", SPARSE, height=HEIGHT + 1))
    with pytest.raises(
        UsageError, match=r"all_classes\.json, LaSOT/cat-1, frame0000\.jpg: RLE counts cover 2400 pixels"
    ):
        run(tmp_path, Replay(TRUTH))
    path.write_text("[]")
    assert "is no annotation file of BURST" in refused(tmp_path)
