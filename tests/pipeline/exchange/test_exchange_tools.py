"""Exports to BURST, CVAT, Label Studio, supervision and GeoJSON: each is read back, and nothing is lost that
the format can hold."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from support.walks import HEIGHT, WIDTH, Walk, random_walk, record, walked_folder

from pipeline.base.errors import StoreError, UsageError
from pipeline.base.records import MaskRecord
from pipeline.exchange.export import FORMATS, export
from pipeline.exchange.geojson import polygons_of
from pipeline.tracks.mask_arrays import outline
from pipeline.tracks.masks import mask_to_rle, record_of_mask, rle_to_mask

ODD = np.zeros((HEIGHT, WIDTH), np.bool_)
ODD[10:30, 10:30] = True
ODD[12:28, 12:28] = False  # a hole
ODD[15:25, 15:25] = True  # an island in it
ODD[18:20, 17:21] = False  # a hole in that
ODD[30:33, 30:34] = True  # touches in a corner
ODD[0, 99] = ODD[99, 0] = True


def walk(seed: int, *, category: str | None = "person") -> Walk:
    """With rows of the odd mask as object 77 on frames 0 and 1, and a row out of sight on frame 2."""
    made = random_walk(seed, with_mask=True)
    frames = {frame: [exact(r) for r in rows] for frame, rows in made.frames.items()}
    for frame in (0, 1):
        found = record_of_mask(mask_to_rle(ODD), HEIGHT, WIDTH, frame_index=frame, object_id=77)
        frames[frame] = [*frames.get(frame, []), from_row(found, category)]
    frames[2] = [*frames.get(2, []), record(2, 77, None)]
    return Walk(frames, made.events)


def from_row(r: MaskRecord, category: str | None) -> MaskRecord:
    return replace(r, category=category, score=0.5, pts_seconds=r.frame_index / 10)


def exact(r: MaskRecord) -> MaskRecord:
    """With the box and area of its mask."""
    if r.mask_rle is None:
        return r
    found = record_of_mask(r.mask_rle, HEIGHT, WIDTH, frame_index=r.frame_index, object_id=r.object_id)
    return replace(r, bbox=found.bbox, area=found.area)


WALKS = {"a": walk(4, category='<"&é>'), "b": walk(5, category=None)}
ROWS = {(s, r.frame_index, r.object_id): r for s, w in WALKS.items() for r in w.records if r.area > 0}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tools") / "out"
    for stream_id, found in WALKS.items():
        walked_folder(str(folder), stream_id, found, rate=10.0)
    return folder


def category(r: MaskRecord) -> str:
    return r.category or "object"


def burst(path: Path) -> dict[Any, Any]:
    document = json.loads(path.read_text())
    names = {entry["id"]: entry["name"] for entry in document["categories"]}
    found = {}
    for sequence in document["sequences"]:
        assert len(sequence["segmentations"]) == len(sequence["annotated_image_paths"])
        for image, objects in zip(sequence["annotated_image_paths"], sequence["segmentations"], strict=True):
            for track, entry in objects.items():
                mask = rle_to_mask(entry["rle"], sequence["height"], sequence["width"])
                kind = names[sequence["track_category_ids"][track]]
                found[sequence["seq_name"], int(image.removesuffix(".jpg")), int(track)] = (
                    mask, kind, entry["score"]
                )  # fmt: skip
    return found


def cvat(path: Path) -> dict[Any, Any]:
    found = {}
    for file in sorted(path.iterdir()):
        root = ElementTree.parse(file).getroot()
        labels = {e.text for e in root.iterfind("meta/task/labels/label/name")}
        images = root.findall("image")
        assert root.findtext("meta/task/size") == str(len(images))
        assert [int(i.attrib["id"]) for i in images] == [*range(len(images))]
        for image in images:
            for entry in image:
                has = entry.attrib
                assert has["label"] in labels
                left, top, width, height = (int(has[n]) for n in ("left", "top", "width", "height"))
                runs = [int(n) for n in has["rle"].split(",")]
                assert sum(runs) == width * height
                box = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(height, width)
                mask = np.zeros((int(image.attrib["height"]), int(image.attrib["width"])), np.bool_)
                mask[top : top + height, left : left + width] = box
                track = int(entry.findtext("attribute[@name='track_id']") or 0)
                found[file.stem, int(image.attrib["id"]), track] = mask, has["label"], None
    return found


def supervision(path: Path) -> dict[Any, Any]:
    found = {}
    for file in sorted(path.iterdir()):
        with file.open(encoding="utf-8", newline="") as lines:
            for row in csv.DictReader(lines):
                mask = rle_to_mask(row["mask_rle"], int(row["frame_height"]), int(row["frame_width"]))
                ys, xs = np.nonzero(mask)
                box = [float(row[n]) for n in ("x_min", "y_min", "x_max", "y_max")]
                assert box == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
                key = file.stem, int(row["frame_index"]), int(row["tracker_id"])
                found[key] = mask, row["class_name"], float(row["confidence"])
    return found


def geojson(path: Path) -> dict[Any, Any]:
    found = {}
    for feature in json.loads(path.read_text())["features"]:
        has, shape = feature["properties"], feature["geometry"]
        polygons = shape["coordinates"] if shape["type"] == "MultiPolygon" else [shape["coordinates"]]
        key = has["stream_id"], has["frame_index"], has["object_id"]
        mask = painted(polygons, has["frame_height"], has["frame_width"])
        found[key] = mask, has["category"] or "object", has["score"]
    return found


def painted(polygons: Any, height: int, width: int) -> NDArray[np.bool_]:
    """Pixels whose centres are in the outer ring of a polygon and in none of its holes."""
    mask = np.zeros((height, width), np.bool_)
    y, x = np.mgrid[:height, :width] + 0.5

    def inside(ring: Any) -> NDArray[np.bool_]:
        crossed = np.zeros((height, width), np.bool_)
        for (x0, y0), (_, y1) in pairwise(ring):
            crossed ^= (x0 > x) & ((y0 > y) != (y1 > y))
        return crossed

    for outer, *holes in polygons:
        assert outer[0] == outer[-1]
        assert all(hole[0] == hole[-1] for hole in holes)
        mask |= inside(outer) & ~np.any([inside(hole) for hole in holes], axis=0)
    return mask


@pytest.mark.parametrize(
    ("fmt", "read"), [("burst", burst), ("cvat", cvat), ("supervision", supervision), ("geojson", geojson)]
)
def test_masks_come_back(out: Path, tmp_path: Path, fmt: str, read: Callable[[Path], dict[Any, Any]]) -> None:
    done = export(out, fmt, tmp_path / "it")
    found = read(tmp_path / "it")
    assert done.rows == len(found) > 100
    assert found.keys() == ROWS.keys()
    for key, (mask, kind, score) in found.items():
        row = ROWS[key]
        assert np.array_equal(mask, rle_to_mask(str(row.mask_rle), HEIGHT, WIDTH)), key
        assert kind == category(row)
        assert score is None or score == pytest.approx(row.score, rel=1e-6)
    assert [p.name for p in tmp_path.iterdir()] == ["it"], "nothing is left beside it"


def test_label_studio_keeps_boxes_and_absences(out: Path, tmp_path: Path) -> None:
    export(out, "labelstudio", tmp_path / "tasks.json", streams=["a"])
    (task,) = json.loads((tmp_path / "tasks.json").read_text())
    assert task["data"]["stream_id"] == "a"
    (prediction,) = task["predictions"]
    boxes = {}
    for result in prediction["result"]:
        assert (result["type"], result["from_name"], result["to_name"]) == ("videorectangle", "box", "video")
        sequence = result["value"]["sequence"]
        for this, after in zip(sequence, [*sequence[1:], None], strict=True):
            key = "a", this["frame"] - 1, result["meta"]["track_id"]
            names = ("x", "width", "y", "height")
            x, width, y, height = (
                this[n] * size / 100 for n, size in zip(names, (WIDTH, WIDTH, HEIGHT, HEIGHT), strict=True)
            )
            boxes[key] = x, y, width, height
            assert result["value"]["labels"] == [category(ROWS[key])]
            assert this["enabled"] == (after is not None and after["frame"] == this["frame"] + 1)
            assert this["time"] == pytest.approx((this["frame"] - 1) / 10)
    assert boxes.keys() == {key for key in ROWS if key[0] == "a"}
    for key, box in boxes.items():
        assert box == pytest.approx(ROWS[key].bbox)


def test_holes_belong_to_the_ring_around_them() -> None:
    polygons = polygons_of(outline(ODD))
    assert [len(polygon) for polygon in sorted(polygons, key=lambda p: min(p[0]))] == [1, 2, 2, 1, 1]
    rng = np.random.default_rng(3)
    for _ in range(30):
        noise = rng.random((12, 15)) < 0.55
        closed = [[[*ring, ring[0]] for ring in polygon] for polygon in polygons_of(outline(noise))]
        assert np.array_equal(painted(closed, 12, 15), noise)
        assert len(closed) == cv2.connectedComponents(noise.astype(np.uint8), connectivity=4)[0] - 1


@pytest.mark.parametrize("fmt", ["cvat", "geojson"])
def test_a_damaged_mask_is_named_and_nothing_is_left(tmp_path: Path, fmt: str) -> None:
    walked_folder(str(tmp_path / "out"), "c", Walk({0: [replace(record(0, 3, (50, 50)), mask_rle="~")]}))
    with pytest.raises(StoreError, match="stream c, frame 0: object 3: RLE counts hold"):
        export(tmp_path / "out", fmt, tmp_path / "it")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_burst_holds_one_size_a_video(tmp_path: Path) -> None:
    frames = {
        0: [record(0, 3, (50, 50), with_mask=True)],
        1: [record(1, 3, (50, 50), with_mask=True, size=(120, 80))],
    }
    walked_folder(str(tmp_path / "out"), "c", Walk(frames))
    with pytest.raises(
        UsageError, match="stream c: frame 1 is 80x120, earlier ones 100x100: burst holds one"
    ):
        export(tmp_path / "out", "burst", tmp_path / "it")


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_stream_without_objects(tmp_path: Path, fmt: str) -> None:
    walked_folder(str(tmp_path / "out"), "c", Walk({0: [], 1: []}))
    assert export(tmp_path / "out", fmt, tmp_path / "it").rows == 0
    assert (tmp_path / "it").exists()


def test_burst_is_read_by_trackeval(out: Path, tmp_path: Path) -> None:
    converter = pytest.importorskip("trackeval.datasets.burst_helpers.format_converter", reason="trackeval")
    export(out, "burst", tmp_path / "burst.json")
    document = json.loads((tmp_path / "burst.json").read_text())
    truth = converter.GroundTruthBURSTFormatToTAOFormatConverter(document).convert()
    read = converter.PredictionBURSTFormatToTAOFormatConverter(truth, document, False).convert()
    assert len(truth["annotations"]) == len(read) == len(ROWS)


def test_supervision_writes_the_same_file(out: Path, tmp_path: Path) -> None:
    sv = pytest.importorskip("supervision")
    export(out, "supervision", tmp_path / "it")
    classes: dict[str, int] = {}
    for stream_id in WALKS:
        path = tmp_path / f"{stream_id}.csv"
        with sv.CSVSink(str(path)) as sink:
            for (s, frame, object_id), r in ROWS.items():
                if s == stream_id:
                    x, y, width, height = r.bbox or (0, 0, 0, 0)
                    detections = sv.Detections(
                        xyxy=np.array([[x, y, x + width, y + height]], np.float32),
                        confidence=np.array([r.score]),
                        class_id=np.array([classes.setdefault(category(r), len(classes))]),
                        tracker_id=np.array([object_id]),
                    )
                    custom = {
                        "frame_index": frame, "pts_seconds": r.pts_seconds, "class_name": category(r),
                        "mask_rle": r.mask_rle, "frame_height": HEIGHT, "frame_width": WIDTH,
                    }  # fmt: skip
                    sink.append(detections, custom_data=custom)
        ours = (tmp_path / "it" / path.name).read_text().splitlines()
        theirs = path.read_text().splitlines()
        assert ours[0] == theirs[0]
        for our, their in zip(csv.reader(ours), csv.reader(theirs), strict=True):
            assert [our[:5], our[6:]] == [their[:5], their[6:]]
            assert our[5] == their[5] or float(our[5]) == pytest.approx(float(their[5]), rel=1e-6)
