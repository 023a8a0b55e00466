"""Masks of other tools as prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.base.errors import PromptError, UsageError
from pipeline.exchange.masks_as_prompts import read_masks_as_prompts
from pipeline.exchange.palette_png import palette_png
from pipeline.prompts.files import PromptSet
from pipeline.tracks.masks import mask_to_rle, rle_to_mask


def labels(*ids: int) -> NDArray[np.int32]:
    found = np.zeros((20, 30), np.int32)
    for position, object_id in enumerate(ids):
        found[2:9, 5 * position : 5 * position + 4] = object_id
    return found


def masks(prompts: PromptSet) -> dict[int, dict[int, NDArray[np.bool_]]]:
    return {
        frame: {e.object_id: rle_to_mask(e.rle[2], *e.rle[:2]) for e in entries if e.rle is not None}
        for frame, entries in prompts.objects.items()
    }


def test_palette_pngs_are_prompts_of_their_frames(tmp_path: Path) -> None:
    folder = tmp_path / "masks"
    folder.mkdir()
    for frame, ids in ((0, (1, 4)), (12, (4,)), (13, ())):
        (folder / f"{frame:07d}.png").write_bytes(palette_png(labels(*ids)))
    found = masks(read_masks_as_prompts(folder).prompts)
    assert {frame: sorted(by_id) for frame, by_id in found.items()} == {0: [1, 4], 12: [4]}
    assert np.array_equal(found[0][4], labels(1, 4) == 4)
    assert set(masks(read_masks_as_prompts(folder / "0000012.png").prompts)) == {12}
    named = folder.rename(tmp_path / "other") / "first.png"
    named.write_bytes(palette_png(labels(2)))
    assert set(masks(read_masks_as_prompts(named, frame=5).prompts)) == {5}


def coco(*streams: str) -> dict[str, Any]:
    names = dict(enumerate(streams, 1))
    rle = {"size": [20, 30], "counts": mask_to_rle(labels(7) == 7)}
    return {
        "images": [
            {"id": n, "file_name": "a.jpg", "stream_id": name, "frame_index": 3, "width": 30, "height": 20}
            for n, name in names.items()
        ],
        "annotations": [
            {"id": n, "image_id": n, "category_id": 1, "track_id": 7, "segmentation": rle} for n in names
        ],
        "categories": [{"id": 1, "name": "car"}],
    }


def test_coco_and_prompts_files(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps(coco("x")))
    prompts, numbered = read_masks_as_prompts(file)
    assert numbered == set()  # `track_id` is the object's id
    ((entry,),) = prompts.objects.values()
    assert (entry.object_id, entry.category) == (7, "car")
    assert np.array_equal(masks(prompts)[3][7], labels(7) == 7)
    (tmp_path / "prompts.json").write_text(json.dumps(prompts.to_record()))
    assert read_masks_as_prompts(tmp_path / "prompts.json").prompts == prompts
    file.write_text(json.dumps(coco("x", "y")))
    assert read_masks_as_prompts(file, stream_id="y").prompts == prompts
    with pytest.raises(UsageError, match="masks of x, y"):
        read_masks_as_prompts(file)


@pytest.mark.parametrize(
    ("image", "frame"),
    [
        ({"file_name": "frame_000012.PNG"}, 12),
        ({"file_name": "videos/7/00020.jpg"}, 20),
        ({"file_name": "still.jpg"}, 5),  # the frame that is shown
        ({"file_name": "00020.jpg", "frame_id": 2}, 2),
    ],
)
def test_the_frame_of_an_image_of_another_tool(tmp_path: Path, image: dict[str, Any], frame: int) -> None:
    document = coco("x")
    (known,) = document["images"]
    known.pop("frame_index")
    known.update(image)
    file = tmp_path / "a.json"
    file.write_text(json.dumps(document))
    assert list(read_masks_as_prompts(file, frame=5).prompts.objects) == [frame]


def test_objects_of_coco_files_without_track_ids(tmp_path: Path) -> None:
    """As annotation tools write them: an annotation has an id of its own, of any size, and no other."""
    rle = {"size": [20, 30], "counts": mask_to_rle(labels(7) == 7)}
    document: dict[str, Any] = {
        "images": [{"id": n, "file_name": f"{n:05d}.jpg", "width": 30, "height": 20} for n in (1, 2)],
        "annotations": [
            {"id": 900_100_259_690 + n, "image_id": image, "category_id": category, "segmentation": rle}
            for n, (image, category) in enumerate(((1, 1), (1, 2), (1, 2), (2, 1), (2, 2)))
        ],
        "categories": [{"id": 1, "name": "van"}, {"id": 2, "name": "person"}],
    }
    file = tmp_path / "a.json"
    file.write_text(json.dumps(document))
    prompts, numbered = read_masks_as_prompts(file)
    found = {
        frame: [(e.object_id, e.category) for e in entries] for frame, entries in prompts.objects.items()
    }
    # One van; which of two people a third mask is of, nobody knows.
    assert found == {1: [(1, "van"), (2, "person"), (3, "person")], 2: [(1, "van"), (4, "person")]}
    assert numbered == {1, 2, 3, 4}
    document["annotations"][0]["track_id"] = 12
    file.write_text(json.dumps(document))
    prompts, numbered = read_masks_as_prompts(file)
    assert [e.object_id for e in prompts.objects[1]] == [12, 13, 14]
    assert numbered == {13, 14, 15, 16}


def test_files_that_hold_no_masks(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.json").write_text("no")
    (tmp_path / "blank.png").write_bytes(palette_png(labels()))
    (tmp_path / "coco.json").write_text(json.dumps({**coco("x"), "annotations": []}))
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "images.json").write_text('{"images": 3}')
    for name, said in (
        ("none.json", "No such file"),
        ("empty", "no masks"),
        ("text.json", "neither JSON nor a PNG"),
        ("coco.json", "no masks"),
        ("list.json", "no COCO file"),
        ("images.json", "no COCO file"),
    ):
        with pytest.raises(UsageError, match=said):
            read_masks_as_prompts(tmp_path / name)
    with pytest.raises(PromptError, match="shows no object"):
        read_masks_as_prompts(tmp_path / "blank.png")
