from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as coco
from reference.blobs import random_label_map, random_mask

from pipeline.base.records import Frame, tracks_table
from pipeline.tracks.masks import (
    MAX_OBJECT_ID,
    label_map_from_rles,
    mask_to_rle,
    mean_probability,
    records_from_label_map,
    rle_to_mask,
)

SIZES = st.tuples(st.integers(1, 40), st.integers(1, 40))
SEEDS = st.integers(0, 2**32 - 1)


def frame_of(height: int, width: int) -> Frame:
    return Frame(np.zeros((height, width, 3), np.uint8), 7, 0.25, datetime(2026, 1, 2, tzinfo=UTC))


def coco_counts(mask: np.ndarray) -> str:
    return str(coco.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode())


@given(SIZES, SEEDS)
def test_rle_is_cocos_and_comes_back(size: tuple[int, int], seed: int) -> None:
    mask = random_mask(np.random.default_rng(seed), *size)
    counts = mask_to_rle(mask)
    assert counts == coco_counts(mask)
    back = rle_to_mask(counts, *size)
    assert back.dtype == np.bool_
    assert back.flags.c_contiguous
    np.testing.assert_array_equal(back, mask)
    np.testing.assert_array_equal(rle_to_mask(counts.encode(), *size), mask)


def test_long_runs_need_several_characters() -> None:
    mask = np.zeros((300, 4000), np.bool_)
    mask[299, 3999] = mask[5, 2000] = True
    counts = mask_to_rle(mask)
    assert counts == coco_counts(mask)
    np.testing.assert_array_equal(rle_to_mask(counts, 300, 4000), mask)


def test_uncompressed_counts_are_read_column_by_column() -> None:
    np.testing.assert_array_equal(
        rle_to_mask([1, 2, 3], 2, 3), np.array([[False, True, False], [True, False, False]])
    )
    np.testing.assert_array_equal(rle_to_mask([0, 0, 2, 4], 2, 3), rle_to_mask([2, 4], 2, 3))


@pytest.mark.parametrize(
    ("counts", "complaint"),
    [
        ("", "empty"),
        ([], "cover 0 pixels"),
        ("06", "cover 6 pixels, not the 12"),
        ("0<1", "cover 13 pixels"),
        ("0\x7f", "position 1"),
        ("0 <", "' ' at position 1"),
        ("0ü", "not ASCII"),
        ("0P", "cut off"),
        ("0" + "o" * 30 + "O", "35 bits"),
        ("0O", "run of -1 pixels"),
        ("0ooooo7", "run of"),
        ([0, -1, 13], "hold -1"),
        ([0, 12.5], "12.5"),
        ([True, 11], "True"),
        ([0, 2**80], str(2**80)),
    ],
)
def test_damaged_counts_are_refused(counts: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match="RLE counts") as caught:
        rle_to_mask(counts, 3, 4)
    assert complaint in str(caught.value)


@pytest.mark.parametrize("size", [(0, 4), (3, -1)])
def test_impossible_sizes_are_refused(size: Any) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        rle_to_mask("0<", *size)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools' decoder
@given(SIZES, SEEDS, st.data())
def test_damage_never_gives_a_mask_of_another_size(size: tuple[int, int], seed: int, data: Any) -> None:
    counts = bytearray(mask_to_rle(random_mask(np.random.default_rng(seed), *size)), "ascii")
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, len(counts) - 1))
        action = data.draw(st.sampled_from(["set", "cut", "insert"]))
        if action == "set":
            counts[position] = data.draw(st.integers(0, 255))
        elif action == "insert":
            counts.insert(position, data.draw(st.integers(0, 255)))
        elif len(counts) > 1:
            del counts[position]
    try:
        mask = rle_to_mask(bytes(counts), *size)
    except ValueError:
        return
    assert mask.shape == size
    # What was accepted is what COCO's own decoder, which is safe to ask now, makes of it.
    np.testing.assert_array_equal(mask, coco.decode({"size": list(size), "counts": bytes(counts)}) == 1)


@given(SIZES, SEEDS)
def test_records_match_pixel_by_pixel_counting(size: tuple[int, int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    ids = [3, MAX_OBJECT_ID, 1, 300]
    labels = random_label_map(rng, *size, ids)
    scores, presence = ({i: float(rng.random()) for i in ids} for _ in range(2))
    records = records_from_label_map(labels, scores, ids, frame_of(*size), {3: "person"}, presence)
    assert [r.object_id for r in records] == ids
    for record in records:
        mask = labels == record.object_id
        assert (record.frame_index, record.pts_seconds, record.wall_time) == (
            7,
            0.25,
            datetime(2026, 1, 2, tzinfo=UTC),
        )
        assert (record.frame_height, record.frame_width) == size
        assert record.category == ("person" if record.object_id == 3 else None)
        assert record.area == mask.sum()
        if not mask.any():
            assert (record.bbox, record.centroid, record.mask_rle) == (None, None, None)
            assert (record.score, record.presence) == (0.0, 0.0)
            continue
        rows, columns = np.nonzero(mask)
        assert record.bbox == (
            columns.min(),
            rows.min(),
            columns.max() - columns.min() + 1,
            rows.max() - rows.min() + 1,
        )
        assert record.centroid == (
            float(np.float32(columns.sum() / mask.sum())),
            float(np.float32(rows.sum() / mask.sum())),
        )
        assert record.score == float(np.float32(scores[record.object_id]))
        assert record.presence == float(np.float32(presence[record.object_id]))
        assert record.mask_rle == coco_counts(mask)
    assert tracks_table(records).num_rows == 4


@given(SIZES, SEEDS)
def test_label_map_comes_back_from_its_records(size: tuple[int, int], seed: int) -> None:
    ids = [9, 2, 70000]
    labels = random_label_map(np.random.default_rng(seed), *size, ids)
    records = records_from_label_map(labels, dict.fromkeys(ids, 0.5), ids, frame_of(*size))
    rles = {r.object_id: r.mask_rle for r in records if r.mask_rle is not None}
    back = label_map_from_rles(rles, *size)
    assert back.dtype == np.int32
    np.testing.assert_array_equal(back, labels)


def test_later_rle_wins_and_damage_names_its_object() -> None:
    full, corner = np.ones((2, 2), np.bool_), np.array([[True, False], [False, False]])
    labels = label_map_from_rles({5: mask_to_rle(full), 6: mask_to_rle(corner)}, 2, 2)
    np.testing.assert_array_equal(labels, [[6, 5], [5, 5]])
    with pytest.raises(ValueError, match="object 6: RLE counts cover 4 pixels, not the 6"):
        label_map_from_rles({6: mask_to_rle(full)}, 2, 3)


def test_one_pixel_and_non_contiguous_input() -> None:
    labels = np.zeros((8, 10), np.int32)
    labels[6, 4] = 2
    (record,) = records_from_label_map(labels[::2, ::2], {2: 0.75}, [2], frame_of(4, 5))
    assert (record.bbox, record.centroid, record.area) == ((2, 3, 1, 1), (2.0, 3.0), 1)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int64, np.uint32])
def test_other_integer_types_are_taken(dtype: Any) -> None:
    labels = np.zeros((4, 5), dtype)
    labels[1:3, 2:4] = 200
    (record,) = records_from_label_map(labels, {200: 1.0}, [200], frame_of(4, 5))
    assert (record.area, record.bbox) == (4, (2, 1, 2, 2))


@pytest.mark.parametrize(
    ("labels", "ids", "complaint"),
    [
        (np.zeros((3, 4), np.int32), [1], "label map of (3, 4)"),
        (np.zeros((4, 5), np.float32), [1], "float32"),
        (np.zeros((1, 4, 5), np.int32), [1], "(1, 4, 5)"),
        (np.full((4, 5), 2, np.int32), [1], "holds [2], not among the live objects [1]"),
        (np.full((4, 5), -1, np.int32), [1], "holds [-1]"),
        (np.full((4, 5), 2**31, np.int64), [1], "2147483648"),
        (np.zeros((4, 5), np.int32), [1, 1], "twice"),
        (np.zeros((4, 5), np.int32), [0], "id 0"),
        (np.zeros((4, 5), np.int32), [2**31], "id 2147483648"),
        (np.full((4, 5), 1, np.int32), [1], "object 1 is visible and has no score"),
    ],
)
def test_records_refuse_what_cannot_be_right(labels: Any, ids: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=r"label map|object") as caught:
        records_from_label_map(labels, {}, ids, frame_of(4, 5))
    assert complaint in str(caught.value)


@given(SIZES, SEEDS)
def test_mean_probability_is_the_mean_inside_each_mask(size: tuple[int, int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    ids = [40, 3, 1000]
    labels = random_label_map(rng, *size, [*ids, 8])  # 8 is nobody's: not counted
    probabilities = rng.random(size, dtype=np.float32)
    scores = mean_probability(labels, probabilities, ids)
    assert list(scores) == ids
    for object_id in ids:
        inside = probabilities[labels == object_id].astype(np.float64)
        expected = inside.mean() if inside.size else 0.0
        assert scores[object_id] == pytest.approx(expected, abs=1e-7)
        assert scores[object_id] == float(np.float32(scores[object_id]))
    assert mean_probability(labels, probabilities, ids) == scores


def test_mean_probability_checks_the_size() -> None:
    with pytest.raises(ValueError, match=r"shape \(5, 4\), the label map \(4, 5\)"):
        mean_probability(np.zeros((4, 5), np.int32), np.zeros((5, 4), np.float32), [1, 2])
    assert mean_probability(np.zeros((4, 5), np.int32), np.zeros((4, 5), np.float32), []) == {}
