"""SQL functions on masks, against the same on pixels; their examples in docs/query.md run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from support.chunks import NO_EVENTS

from pipeline.analytics.mask_functions import FUNCTIONS
from pipeline.analytics.query import connect, query
from pipeline.base.errors import UsageError
from pipeline.base.records import Frame, tracks_table
from pipeline.tracks.masks import records_from_label_map, rle_to_mask
from pipeline.tracks.store import StreamStore

DOCS = Path(__file__).parents[3] / "docs" / "query.md"
FRAMES, HEIGHT, WIDTH = 12, 20, 30
POLYGON = [[3, 2], [26.5, 4], [20, 17], [5, 18]]


def label_maps() -> list[NDArray[np.int32]]:
    """Objects 1 and 2 with ragged edges; 2 is out of sight on every fourth frame, 1 fills a frame."""
    random = np.random.default_rng(5)
    found = []
    for frame in range(FRAMES):
        labels = np.zeros((HEIGHT, WIDTH), np.int32)
        labels[5:15, 4 + frame : 14 + frame] = random.random((10, 10)) < 0.8
        if frame % 4:
            labels[8:19, 12:20][random.random((11, 8)) < 0.7] = 2
        found.append(labels)
    found[-1][:] = 1
    return found


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Streams `gate` and `other`, the latter of half the width."""
    root = tmp_path_factory.mktemp("masks") / "out"
    for stream_id, width in (("gate", WIDTH), ("other", WIDTH // 2)):
        records = []
        for frame, labels in enumerate(label_maps()):
            labels = np.ascontiguousarray(labels[:, :width])
            picture = Frame(np.zeros((HEIGHT, width, 3), np.uint8), frame, frame / 25)
            records += records_from_label_map(labels, {1: 1.0, 2: 0.5}, [1, 2], picture, {1: "person"})
        StreamStore(root, stream_id).commit(0, FRAMES - 1, tracks_table(records), NO_EVENTS)
    return root


def rows(out: Path, columns: str) -> list[dict[str, Any]]:
    """Columns of the masks of `gate`, by object and frame."""
    sql = f"SELECT object_id, frame_index, {columns} FROM masks WHERE stream_id = 'gate' ORDER BY ALL"
    found: list[dict[str, Any]] = query(out, sql).to_pylist()
    return found


def pixels(row: dict[str, Any]) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = label_maps()[row["frame_index"]] == row["object_id"]
    return found


def decoded(mask: dict[str, Any]) -> NDArray[np.bool_]:
    return rle_to_mask(mask["counts"], mask["height"], mask["width"])


def test_each_function_gives_what_the_pixels_give(out: Path) -> None:
    found = rows(
        out,
        f"mask, mask_area(mask) AS area, mask_centroid(mask) AS centroid, "
        f"mask_contains(mask, 13.5, 9) AS has, "
        f"mask_in_polygon(mask, {POLYGON}) AS share, mask_crop(mask, 10, 4, 12, 9) AS crop, "
        f"mask_to_png(mask) AS png, mask_to_polygon(mask) AS rings",
    )
    assert len(found) == 2 * FRAMES
    polygon = np.array(POLYGON, np.float64)
    y, x = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    edges = zip(polygon, np.roll(polygon, -1, axis=0), strict=True)
    turns = [(bx - ax) * (y - ay) - (by - ay) * (x - ax) for (ax, ay), (bx, by) in edges]
    inside = np.all([turn >= 0 for turn in turns], axis=0)  # it is convex
    for row in found:
        mask = pixels(row)
        if not mask.any():
            assert all(
                row[name] is None for name in ("mask", "area", "centroid", "has", "share", "crop", "png")
            )
            continue
        np.testing.assert_array_equal(decoded(row["mask"]), mask)
        assert row["area"] == mask.sum()
        assert row["has"] == mask[9, 13]
        assert row["share"] == (mask & inside).sum() / mask.sum()
        rows_, columns_ = np.nonzero(mask)
        assert (row["centroid"]["x"], row["centroid"]["y"]) == pytest.approx((columns_.mean(), rows_.mean()))
        np.testing.assert_array_equal(decoded(row["crop"]), mask[4:13, 10:22])
        picture = cv2.imdecode(np.frombuffer(row["png"], np.uint8), cv2.IMREAD_UNCHANGED)
        np.testing.assert_array_equal(picture, mask * 255)
        drawn = np.zeros((HEIGHT, WIDTH), np.int64)
        for ring in row["rings"]:
            for (ax, ay), (bx, by) in zip(ring, [*ring[1:], ring[0]], strict=True):
                if ax == bx:
                    drawn[min(ay, by) : max(ay, by), ax:] += 1
        np.testing.assert_array_equal(drawn % 2 == 1, mask)


def test_functions_of_two_masks(out: Path) -> None:
    sql = """SELECT a.frame_index, mask_iou(a.mask, b.mask) AS iou, mask_union(a.mask, b.mask) AS both
             FROM masks a JOIN masks b ON a.stream_id = b.stream_id AND a.frame_index + 1 = b.frame_index
             WHERE a.stream_id = 'gate' AND a.object_id = 1 AND b.object_id = 1 ORDER BY 1"""
    found = query(out, sql).to_pylist()
    maps = label_maps()
    assert len(found) == FRAMES - 1
    for frame, row in enumerate(found):
        a, b = maps[frame] == 1, maps[frame + 1] == 1
        assert row["iou"] == (a & b).sum() / (a | b).sum()
        np.testing.assert_array_equal(decoded(row["both"]), a | b)
    assert found[3]["iou"] > 0.1


def test_a_mask_of_ones_own(out: Path) -> None:
    sql = """SELECT mask_area(mask_from_rle(mask_rle, frame_height, frame_width)) = area AS same
             FROM tracks GROUP BY 1 ORDER BY 1"""
    assert [row["same"] for row in query(out, sql).to_pylist()] == [True, None]
    own = "SELECT mask_area({'counts': '224', 'height': 2, 'width': 4}) AS area, mask_area(NULL) AS none"
    assert query(out, own).to_pylist() == [{"area": 2, "none": None}]


def test_a_polygon_of_each_row(out: Path) -> None:
    sql = """SELECT mask_in_polygon(mask, [[bbox_x, bbox_y], [bbox_x + bbox_w, bbox_y],
                    [bbox_x + bbox_w, bbox_y + bbox_h], [bbox_x, bbox_y + bbox_h],
                    [bbox_x, bbox_y]]) AS share,
             mask_in_polygon(mask, [[0, 0], [0.1, 0], [0, 0.1]]) AS no
             FROM masks WHERE area > 0"""
    found = query(out, sql).to_pylist()
    assert len(found) > 2 * FRAMES
    assert {(row["share"], row["no"]) for row in found} == {(1.0, 0.0)}


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        (
            "mask_iou(mask, mask_crop(mask, 0, 0, 2, 5))",
            r"^query: mask_iou: masks of 20x\d+ and 5x2 \(height x width\): both must have one size$",
        ),
        ("mask_crop(mask, 0, 0, 0, 5)", "mask_crop: box of 0x5"),
        ("mask_area(mask_from_rle(mask.counts, 3, 3))", "mask_area: counts cover .* pixels, not the 9"),
        ("mask_area(mask_from_rle('4P', 3, 3))", "mask_area: counts end in the middle of a number"),
        ("mask_in_polygon(mask, [[0, 0], [5, 5]])", "mask_in_polygon: polygon has 2 corners: at least 3"),
        (
            "mask_in_polygon(mask, [[0, 0], [5, 5], [5]])",
            r"polygon has the point \[5.0\]: each is a list of two",
        ),
        ("mask_in_polygon(mask, [[0, 0], [5, 5], ['nan'::DOUBLE, 5]])", "polygon has the point"),
        (
            "mask_in_polygon(mask, [[0, 0], [5, 5], [5, 0], [0, 5]])",
            r"polygon crosses itself: the edges from corners 0 and 2 \(counted from 0\) meet",
        ),
        ("mask_area('224')", "can't be cast"),
        ("mask_area(mask.counts)", "No function matches the given name and argument types 'mask_area"),
    ],
)
def test_what_cannot_be_computed_is_one_line(out: Path, expression: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        query(out, f"SELECT {expression} FROM masks WHERE area > 0")
    assert "\n" not in str(caught.value)


def test_only_what_a_function_needs_is_read(out: Path) -> None:
    plan = query(out, "EXPLAIN SELECT mask_area(mask) FROM masks WHERE stream_id = 'gate'")
    text = plan["explain_value"][0].as_py()
    assert "mask_rle" in text
    assert "centroid_x" not in text


def test_there_is_an_example_of_each_function_and_it_runs(out: Path) -> None:
    blocks = re.findall(r"^```sql\n(.*?)^```$", DOCS.read_text(), re.MULTILINE | re.DOTALL)
    examples = [statement for block in blocks for statement in block.split(";\n") if statement.strip()]
    with connect(out) as connection:
        for statement in examples:
            found = connection.sql(statement).to_arrow_table()
            assert found.num_rows > 0, statement
            assert found.columns[-1].null_count < found.num_rows, statement
    named = {name for statement in examples for name in re.findall(r"\bmask_\w+(?=\()", statement)}
    assert named == {*FUNCTIONS, "mask_from_rle"}
