"""Exports read back by the formats' own tools and by ours; imports; what is refused."""

from __future__ import annotations

import configparser
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO
from support.walks import HEIGHT, WIDTH, Walk, random_walk, walked_folder

from pipeline.analytics.query import query
from pipeline.base.errors import StoreError, UsageError
from pipeline.base.records import MaskRecord, events_table, tracks_table
from pipeline.exchange.export import export
from pipeline.exchange.importing import import_tracks
from pipeline.exchange.palette_png import palette_png
from pipeline.prompts.index_png import decode_index_png
from pipeline.tracks.masks import mask_to_rle, record_of_mask, rle_to_mask
from pipeline.tracks.reader import TrackReader
from pipeline.tracks.store import StreamStore


def apart(walk: Walk) -> Walk:
    """Without overlaps, as a label map has its objects: of two on one pixel the one with the larger id is
    taken away."""
    frames: dict[int, list[MaskRecord]] = {}
    for frame, rows in walk.frames.items():
        taken = np.zeros((HEIGHT, WIDTH), np.bool_)
        frames[frame] = []
        for r in rows:
            made = r
            if r.mask_rle is not None:
                mask = rle_to_mask(r.mask_rle, HEIGHT, WIDTH)
                hidden = bool((mask & taken).any())
                made = (
                    replace(r, area=0, score=0.0, bbox=None, centroid=None, mask_rle=None)
                    if hidden
                    else exact(r)
                )
                taken |= mask & (not hidden)
            frames[frame].append(replace(made, presence=0.5 if made.area else 0.0, category=named(r)))
    return Walk(frames, walk.events)


def exact(r: MaskRecord) -> MaskRecord:
    """With the box, area and centroid of its mask."""
    found = record_of_mask(str(r.mask_rle), HEIGHT, WIDTH, frame_index=r.frame_index, object_id=r.object_id)
    return replace(found, score=float(np.float32(r.score)), pts_seconds=r.pts_seconds, wall_time=r.wall_time)


def named(r: MaskRecord) -> str | None:
    return None if r.object_id == 2 else "dog" if r.object_id % 2 else "person"


WALKS = {"a": apart(random_walk(4, with_mask=True)), "b": apart(random_walk(5, wall=True, with_mask=True))}
VISIBLE = "SELECT * EXCLUDE (pts_seconds, wall_time) FROM tracks WHERE area > 0 ORDER BY ALL"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    for stream_id, walk in WALKS.items():
        walked_folder(str(tmp_path / "out"), stream_id, walk, rate=10.0)
    return tmp_path / "out"


def visible(walk: Walk) -> list[MaskRecord]:
    return [r for r in walk.records if r.area > 0]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools
def test_coco_is_read_by_pycocotools(out: Path, tmp_path: Path) -> None:
    done = export(out, "coco", tmp_path / "all.json")
    read = COCO(tmp_path / "all.json")
    rows = {(s, r.frame_index, r.object_id): r for s, walk in WALKS.items() for r in visible(walk)}
    assert done.rows == len(read.anns) == len(rows) > 50
    for annotation in read.anns.values():
        image = read.imgs[annotation["image_id"]]
        row = rows[image["stream_id"], image["frame_index"], annotation["track_id"]]
        assert np.array_equal(read.annToMask(annotation), rle_to_mask(str(row.mask_rle), HEIGHT, WIDTH))
        assert read.cats[annotation["category_id"]]["name"] == (row.category or "object")
        assert tuple(annotation["bbox"]) == row.bbox
        assert annotation["score"] == row.score


def test_coco_there_and_back(out: Path, tmp_path: Path) -> None:
    export(out, "coco", tmp_path / "all.json")
    done = import_tracks(tmp_path / "all.json", "coco", tmp_path / "again")
    assert done.streams == 2
    sql = "SELECT * FROM tracks WHERE area > 0 ORDER BY stream_id, frame_index, object_id"
    assert query(tmp_path / "again", sql).equals(query(out, sql))
    kinds = query(tmp_path / "again", "SELECT DISTINCT kind FROM events ORDER BY ALL").to_pylist()
    assert [row["kind"] for row in kinds] == ["object_added", "object_removed"]


def test_mots_there_and_back(out: Path, tmp_path: Path) -> None:
    export(out, "mots", tmp_path / "mots")
    line = (tmp_path / "mots" / "instances_txt" / "a.txt").read_text().splitlines()[0].split(" ")
    first = visible(WALKS["a"])[0]
    assert line[0] == str(first.frame_index + 1)
    assert line[1:2] + line[3:] == [str(first.object_id), str(HEIGHT), str(WIDTH), first.mask_rle]
    import_tracks(tmp_path / "mots", "mots", tmp_path / "again")
    sql = VISIBLE.replace("EXCLUDE (", "EXCLUDE (score, presence, ")
    assert query(tmp_path / "again", sql).equals(query(out, sql))


def test_davis_there_and_back(out: Path, tmp_path: Path) -> None:
    export(out, "davis", tmp_path / "davis")
    folder = tmp_path / "davis" / "Annotations" / "a"
    reader = TrackReader(out, "a")
    assert len(list(folder.iterdir())) == reader.next_frame
    for frame in range(reader.next_frame):
        index = decode_index_png((folder / f"{frame:05d}.png").read_bytes(), "it")
        expected = np.zeros((HEIGHT, WIDTH), np.int32)
        for r in WALKS["a"].frames.get(frame, ()):
            if r.mask_rle is not None:
                expected[rle_to_mask(r.mask_rle, HEIGHT, WIDTH)] = r.object_id
        assert np.array_equal(index, expected)
    import_tracks(tmp_path / "davis", "davis", tmp_path / "again", frame_rate=25.0)
    sql = VISIBLE.replace("EXCLUDE (", "EXCLUDE (score, presence, category, ")
    assert query(tmp_path / "again", sql).equals(query(out, sql))
    (row,) = query(
        tmp_path / "again", "SELECT max(pts_seconds * 25 - frame_index) AS d FROM tracks"
    ).to_pylist()
    assert row["d"] == pytest.approx(0)


def test_masks_that_overlap_are_named_where_a_format_cannot_hold_both(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mask = np.zeros((HEIGHT, WIDTH), np.bool_)
    mask[2:6, 3:9] = True
    first, shifted = (
        record_of_mask(mask_to_rle(np.roll(mask, 2 * n, 1)), HEIGHT, WIDTH, frame_index=0, object_id=n + 1)
        for n in range(2)
    )
    StreamStore(tmp_path / "out", "a").commit(0, 0, tracks_table([first, shifted]), events_table([]))
    export(tmp_path / "out", "davis", tmp_path / "davis")
    assert "stream a: masks overlap on 1 frames (first 0)" in caplog.text
    assert "16 pixels went to the object with the higher id" in caplog.text
    caplog.clear()
    export(tmp_path / "out", "coco", tmp_path / "coco")
    assert caplog.text == ""


def test_palette_pngs_have_the_colours_of_davis() -> None:
    png = palette_png(np.array([[0, 1, 2], [3, 4, 255]], np.int32))
    picture = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR)
    assert picture is not None
    colours = picture[..., ::-1].reshape(-1, 3)
    assert colours[:5].tolist() == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 0, 128]]
    with pytest.raises(ValueError, match="holds the values 0 to 255, not 256"):
        palette_png(np.array([[256]], np.int32))


def test_mot_and_its_sequences(out: Path, tmp_path: Path) -> None:
    export(out, "mot", tmp_path / "mot", streams=["a"])
    assert sorted(p.name for p in (tmp_path / "mot").iterdir()) == ["a", "labels.txt"]
    text = (tmp_path / "mot" / "a" / "gt" / "gt.txt").read_text()
    labels = (tmp_path / "mot" / "labels.txt").read_text().splitlines()
    lines = [[int(word) for word in line.split(",")] for line in text.splitlines()]
    assert [(w[0] - 1, w[1], tuple(w[2:6]), labels[w[7] - 1]) for w in lines] == [
        (r.frame_index, r.object_id, r.bbox, r.category or "object") for r in visible(WALKS["a"])
    ]
    ini = configparser.ConfigParser()
    ini.read(tmp_path / "mot" / "a" / "seqinfo.ini")
    assert (ini["Sequence"]["frameRate"], ini["Sequence"]["imWidth"]) == ("10", str(WIDTH))
    assert int(ini["Sequence"]["seqLength"]) == TrackReader(out, "a").next_frame


def test_youtube_vis(out: Path, tmp_path: Path) -> None:
    export(out, "youtube-vis", tmp_path / "yt.json")
    document = json.loads((tmp_path / "yt.json").read_text())
    videos = {video["id"]: video for video in document["videos"]}
    found = {
        (videos[a["video_id"]]["name"], frame, a["track_id"]): segmentation["counts"]
        for a in document["annotations"]
        for frame, segmentation in enumerate(a["segmentations"])
        if segmentation is not None
    }
    assert found == {
        (s, r.frame_index, r.object_id): r.mask_rle for s, walk in WALKS.items() for r in visible(walk)
    }
    assert all(len(v["file_names"]) == v["length"] for v in videos.values())


SQUARE = np.zeros((10, 20), np.bool_)
SQUARE[2:5, 3:9] = True


def coco_file(tmp_path: Path, **changed: Any) -> Path:
    """As CVAT and the like write one: no stream, polygons, ids in attributes."""
    document: dict[str, Any] = {
        "images": [
            {"id": 7, "file_name": "b.jpg", "width": 20, "height": 10},
            {"id": 8, "file_name": "a.jpg", "width": 20, "height": 10},
        ],
        "categories": [{"id": 3, "name": "cat"}],
        "annotations": [
            {
                "id": 1,
                "image_id": 7,
                "category_id": 3,
                "segmentation": [[3, 2, 9, 2, 9, 5, 3, 5]],
                "attributes": {"track_id": 4},
            },
            {
                "id": 2,
                "image_id": 8,
                "category_id": 3,
                "segmentation": {"size": [10, 20], "counts": mask_to_rle(SQUARE)},
                "attributes": {"track_id": 4},
            },
        ],
    }
    path = tmp_path / "clip.json"
    path.write_text(json.dumps(document | changed))
    return path


def test_coco_of_other_tools(tmp_path: Path) -> None:
    import_tracks(coco_file(tmp_path), "coco", tmp_path / "out", frame_rate=5)
    rows = query(tmp_path / "out", "FROM tracks ORDER BY frame_index").to_pylist()
    assert [(r["stream_id"], r["frame_index"], r["object_id"], r["category"]) for r in rows] == [
        ("clip", 0, 4, "cat"),
        ("clip", 1, 4, "cat"),
    ]
    assert all(np.array_equal(rle_to_mask(r["mask_rle"], 10, 20), SQUARE) for r in rows)
    assert rows[1]["pts_seconds"] == 0.2


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"images": 3}, "is no COCO file: it needs images"),
        ({"annotations": [{"id": 5, "image_id": 99}]}, "is no COCO file: KeyError: 99"),
        ({"annotations": [{"id": 5, "image_id": 7, "bbox": [1, 2, 3, 4]}]}, "annotation 5 has no mask"),
        (
            {"annotations": [{"id": 5, "image_id": 7, "segmentation": {"size": [9, 9], "counts": "x"}}]},
            "annotation 5: its mask is",
        ),
        (
            {"annotations": [{"id": 5, "image_id": 7, "segmentation": {"size": [10, 20], "counts": "~"}}]},
            "annotation 5: RLE counts hold",
        ),
        (
            {"annotations": [{"id": 5, "track_id": 0, "image_id": 7, "segmentation": [[3, 2, 9, 2, 9, 5]]}]},
            "object id 0 is not allowed",
        ),
    ],
)
def test_coco_files_that_are_none(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        import_tracks(coco_file(tmp_path, **changed), "coco", tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_what_is_refused(out: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="format 'avi' is not known: use coco, youtube-vis, mot"):
        export(out, "avi", tmp_path / "x")
    with pytest.raises(UsageError, match="stream 'c' matches no stream in"):
        export(out, "coco", tmp_path / "x", streams=["c"])
    with pytest.raises(UsageError, match="is no output folder"):
        export(tmp_path / "empty", "coco", tmp_path / "x")
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(UsageError, match="taken exists: give a name that is free"):
        export(out, "coco", tmp_path / "taken")
    with pytest.raises(UsageError, match="there is no such file or folder"):
        import_tracks(tmp_path / "none", "davis", tmp_path / "again")
    (tmp_path / "clip.txt").write_text("1 2 3\n")
    with pytest.raises(UsageError, match=r"clip\.txt, line 1: it needs frame, id"):
        import_tracks(tmp_path / "clip.txt", "mots", tmp_path / "again")
    export(out, "coco", tmp_path / "all.json")
    with pytest.raises(UsageError, match="has a stream a already"):
        import_tracks(tmp_path / "all.json", "coco", out)


def test_large_ids_and_damaged_rows_leave_nothing(tmp_path: Path) -> None:
    rows = {0: [replace(exact(visible(WALKS["a"])[0]), frame_index=0, object_id=300)]}
    walked_folder(str(tmp_path / "out"), "c", Walk(rows))
    with pytest.raises(UsageError, match="stream c has an object 300: palette PNGs hold ids up to 255"):
        export(tmp_path / "out", "davis", tmp_path / "davis")
    rows = {0: [replace(rows[0][0], object_id=3, mask_rle="~")]}
    walked_folder(str(tmp_path / "bad"), "c", Walk(rows))
    with pytest.raises(StoreError, match="stream c, frame 0: object 3: RLE counts hold"):
        export(tmp_path / "bad", "davis", tmp_path / "davis")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad", "out"]


def test_the_commands(out: Path, tmp_path: Path) -> None:
    from jobs.cli.app import main

    def call(*arguments: object) -> int:
        with pytest.raises(SystemExit) as ended:
            main([str(a) for a in arguments])
        return int(ended.value.code or 0)

    assert call("export", out, "--format", "mots", "-o", tmp_path / "mots", "--stream-id", "a") == 0
    assert call("import", tmp_path / "mots", "--format", "mots", "--out", tmp_path / "again") == 0
    (row,) = query(tmp_path / "again", "SELECT count(*) AS n FROM tracks WHERE area > 0").to_pylist()
    assert row["n"] == len(visible(WALKS["a"]))
    assert call("export", out, "--format", "xml", "-o", tmp_path / "x") == 2
