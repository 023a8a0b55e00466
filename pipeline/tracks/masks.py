"""Label maps to mask records and back: COCO run lengths, boxes, areas, centroids, scores.

A label map is H x W int32: 0 is the background, other values are object ids. All fields of a record are
computed from the runs of equal labels in column order, as in COCO. One scan over the frame serves all
objects; the remaining cost per object depends on its outline and not on the frame's size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray
from pycocotools import mask as coco

from pipeline.base.records import Frame, MaskRecord

if TYPE_CHECKING:  # what only reads masks needs no torch
    from xmem_core import StepResult
    from xmem_core.runs import LabelRuns

MAX_OBJECT_ID = 2**31 - 1

_FIRST_CHAR = (
    48  # compressed counts use the 64 characters from "0": five bits of the number and one "more follow"
)
_MAX_CHARS_PER_RUN = 7  # 35 bits; any run of an image that fits in memory is shorter


@dataclass(frozen=True, slots=True)
class _Runs:
    """The foreground runs of a label map in column order, sorted by label, then by position.

    `starts` and `ends` (exclusive) count pixels down the columns, x * H + y. Object k is `labels[k]` and owns
    the runs `first[k]:first[k + 1]`.
    """

    labels: list[int]
    first: list[int]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]


def mask_to_rle(mask: ArrayLike) -> str:
    """H x W bool or 0/1 mask as COCO compressed counts."""
    array = np.asarray(mask)
    if array.ndim != 2:
        raise ValueError(f"mask has shape {array.shape}; it must be height x width")
    runs = _runs((array != 0).astype(np.int32))
    return _encode(runs.starts, runs.ends, *array.shape)


def rle_to_mask(counts: str | bytes | Sequence[int], height: int, width: int) -> NDArray[np.bool_]:
    """COCO counts, compressed or a list of run lengths, as an H x W bool mask.

    Raises:
        ValueError: the counts are damaged or belong to a mask of another size.
    """
    lengths = run_lengths(counts, height, width)
    values = np.zeros(len(lengths), np.bool_)
    values[1::2] = True
    return np.ascontiguousarray(np.repeat(values, lengths).reshape(width, height).T)


def run_lengths(counts: str | bytes | Sequence[int], height: int, width: int) -> NDArray[np.int64]:
    """The lengths of the runs in COCO counts, background first, checked to fill a mask of height x width.

    pycocotools does not validate counts and writes past its buffer when they are damaged; hence this decoder.

    Raises:
        ValueError: as for `rle_to_mask`.
    """
    if height < 1 or width < 1:
        raise ValueError(f"RLE size {height}x{width} (height x width): both must be at least 1")
    lengths = _decompress(counts) if isinstance(counts, (str, bytes)) else _listed(counts, height * width)
    if lengths.size and (int(lengths.min()) < 0 or int(lengths.max()) > height * width):
        bad = int(lengths[(lengths < 0) | (lengths > height * width)][0])
        raise ValueError(
            f"RLE counts hold a run of {bad} pixels; a {height}x{width} mask has {height * width}"
        )
    total = int(lengths.sum())
    if total != height * width:
        raise ValueError(
            f"RLE counts cover {total} pixels, not the {height * width} of a {height}x{width} mask"
        )
    return lengths


def label_map_from_rles(rles: Mapping[int, str], height: int, width: int) -> NDArray[np.int32]:
    """H x W label map of the masks given per object id; where masks overlap, the later entry wins.

    Raises:
        ValueError: as for `rle_to_mask`, naming the object.
    """
    down_columns = np.zeros(height * width, np.int32)
    for object_id, counts in rles.items():
        try:
            lengths = run_lengths(counts, height, width)
        except ValueError as error:
            raise ValueError(f"object {object_id}: {error}") from None
        ends = np.cumsum(lengths)
        for end, length in zip(ends[1::2].tolist(), lengths[1::2].tolist(), strict=True):
            down_columns[end - length : end] = object_id
    return np.ascontiguousarray(down_columns.reshape(width, height).T)


def mean_probability(
    label_map: ArrayLike, probabilities: ArrayLike, object_ids: Sequence[int]
) -> dict[int, float]:
    """Mean probability of every object inside its own mask: the `score` of its record.

    Args:
        label_map: H x W integers; ids that are not in `object_ids` are ignored.
        probabilities: H x W float32, the probability of the pixel's label.
        object_ids: the objects to score.

    Returns:
        A float32-rounded mean per object; 0.0 for an object that has no pixel. Pixels are added in float64
        and in the same order each time, so equal input gives equal bytes.
    """
    labels = _as_label_map(label_map)
    values = np.asarray(probabilities, np.float32)
    if values.shape != labels.shape:
        raise ValueError(f"probabilities have shape {values.shape}, the label map {labels.shape}")
    scores = dict.fromkeys(object_ids, 0.0)
    for object_id in scores:
        inside = values[labels == object_id]
        if inside.size:
            scores[object_id] = float(np.float32(inside.sum(dtype=np.float64) / inside.size))
    return scores


def tracked_records(
    result: StepResult,
    label_map: ArrayLike | None,
    frame: Frame,
    categories: Mapping[int, str | None] | None = None,
) -> list[MaskRecord]:
    """The records of a frame's objects from the result of its step.

    Args:
        result: result of the step.
        label_map: the result's label map on the CPU, from which objects were removed; None: as it is. Then
            nothing but the runs is copied from a GPU.
        frame, categories: as in `records_from_label_map`.
    """
    ids = result.object_ids
    found = result.runs if label_map is None else None
    if found is not None:
        sums = _sums(found, ids)
        likely = None if found.presence is None else dict(zip(ids, found.presence.tolist(), strict=True))
        return _records(
            _of_labels(found.labels, found.starts, found.ends), sums, ids, frame, categories, likely
        )
    if label_map is None:
        label_map = result.label_map.cpu().numpy()
    rows, columns, _, probabilities = result.foreground
    seen = np.asarray(label_map)[rows, columns]
    scores = mean_probability(seen, probabilities.cpu().numpy(), ids) if seen.size else {}
    presence = None if result.presence is None else dict(zip(ids, result.presence.tolist(), strict=True))
    return records_from_label_map(label_map, scores, ids, frame, categories, presence, columns)


def records_from_label_map(
    label_map: ArrayLike,
    scores: Mapping[int, float],
    object_ids: Sequence[int],
    frame: Frame,
    categories: Mapping[int, str | None] | None = None,
    presence: Mapping[int, float] | None = None,
    columns: slice = slice(None),
) -> list[MaskRecord]:
    """One record for every id of `object_ids`, in that order, whether the object is visible or not.

    Boxes are COCO xywh in whole pixels: x and y of the first column and row that the mask touches, then how
    many it spans. The centroid is the mean column index and the mean row index of the mask's pixels: a mask
    of the one pixel (x, y) has its centroid at (x, y) and not half a pixel further. An object without a pixel
    has area 0, score 0 and neither box, centroid nor RLE.

    Args:
        label_map: H x W integers of the frame's size.
        scores: score per object id, see `mean_probability`; required for visible objects.
        object_ids: the tracked objects, each once.
        frame: the frame, for index, times and size.
        categories: category per object id, where known.
        presence: presence score per object id, if the model gives one; 0 for an object without pixels.
        columns: outside of these columns there are no objects.

    Raises:
        ValueError: the label map has another size than the frame or holds an id that is not in `object_ids`,
            an id is out of range or there twice, or a visible object has no score.
    """
    labels = _as_label_map(label_map)
    height, width = frame.size
    if labels.shape != (height, width):
        raise ValueError(f"label map of {labels.shape} (height, width) on a frame of {(height, width)}")
    if len(set(object_ids)) != len(object_ids):
        raise ValueError(f"object ids {list(object_ids)} hold an id twice")
    for object_id in object_ids:
        if not 1 <= object_id <= MAX_OBJECT_ID:
            raise ValueError(f"object id {object_id} is out of range; ids go from 1 to {MAX_OBJECT_ID}")
    return _records(_runs(labels, columns), scores, object_ids, frame, categories, presence)


def _sums(found: LabelRuns, object_ids: Sequence[int]) -> dict[int, float]:
    """Scores as `mean_probability` gives them, from the sums of runs."""
    scores = {}
    for object_id in object_ids:
        own = found.labels == object_id
        area = int((found.ends[own] - found.starts[own]).sum())
        scores[object_id] = float(np.float32(found.sums[own].sum() / area)) if area else 0.0
    return scores


def _records(
    runs: _Runs,
    scores: Mapping[int, float],
    object_ids: Sequence[int],
    frame: Frame,
    categories: Mapping[int, str | None] | None,
    presence: Mapping[int, float] | None,
) -> list[MaskRecord]:
    """`records_from_label_map` from the runs of its labels."""
    height, width = frame.size
    position = {label: k for k, label in enumerate(runs.labels)}
    unknown = [label for label in runs.labels if label not in set(object_ids)]
    if unknown:
        raise ValueError(f"label map holds {unknown}, not among the live objects {sorted(object_ids)}")

    records = []
    for object_id in object_ids:
        category = (categories or {}).get(object_id)
        k = position.get(object_id)
        if k is None:
            area, score, bbox, centroid, counts = 0, 0.0, None, None, None
            sure = None if presence is None else 0.0
        else:
            if object_id not in scores:
                raise ValueError(f"object {object_id} is visible and has no score")
            score = float(np.float32(scores[object_id]))
            sure = None if presence is None else float(np.float32(presence[object_id]))
            starts = runs.starts[runs.first[k] : runs.first[k + 1]]
            ends = runs.ends[runs.first[k] : runs.first[k + 1]]
            area = int((ends - starts).sum())
            bbox, centroid = _extent(starts, ends, area, height)
            counts = _encode(starts, ends, height, width)
        records.append(
            MaskRecord(
                frame_index=frame.frame_index,
                object_id=int(object_id),
                frame_height=height,
                frame_width=width,
                area=area,
                score=score,
                presence=sure,
                pts_seconds=frame.pts_seconds,
                wall_time=frame.wall_time,
                category=category,
                bbox=bbox,
                centroid=centroid,
                mask_rle=counts,
            )
        )
    return records


def _as_label_map(label_map: ArrayLike) -> NDArray[np.int32]:
    array = np.asarray(label_map)
    if array.ndim != 2 or array.dtype.kind not in "iu" or 0 in array.shape:
        raise ValueError(f"label map is {array.dtype} of shape {array.shape}; it must be H x W integers")
    if array.dtype != np.int32:
        if array.dtype.itemsize > 2 and not 0 <= int(array.min()) <= int(array.max()) <= MAX_OBJECT_ID:
            raise ValueError(
                f"label map holds {array.min()}..{array.max()}; labels go from 0 to {MAX_OBJECT_ID}"
            )
        array = array.astype(np.int32)
    return array


def record_of_mask(
    counts: str | bytes | Sequence[int], height: int, width: int, *, frame_index: int, object_id: int
) -> MaskRecord:
    """A record whose box, area and centroid are those of COCO counts; its score is 0.

    Raises:
        ValueError: as for `rle_to_mask`.
    """
    lengths = run_lengths(counts, height, width)
    stops = np.cumsum(lengths)[1::2]
    sizes = lengths[1::2]
    starts, ends = (stops - sizes)[sizes > 0], stops[sizes > 0]
    area = int(sizes.sum())
    if not area:
        return MaskRecord(frame_index, object_id, height, width, 0, 0.0)
    joined = np.concatenate(([True], starts[1:] != ends[:-1]))  # runs that touch are one
    starts, ends = starts[joined], ends[np.concatenate((joined[1:], [True]))]
    bbox, centroid = _extent(starts, ends, area, height)
    rle = _encode(starts, ends, height, width)
    return MaskRecord(
        frame_index, object_id, height, width, area, 0.0, bbox=bbox, centroid=centroid, mask_rle=rle
    )


def _runs(labels: NDArray[np.int32], within: slice = slice(None)) -> _Runs:
    """All runs of equal non-zero labels, which lie in some columns."""
    # Only the columns between the first and the last label matter; on most frames that is a small part.
    columns = np.flatnonzero(labels[:, within].any(axis=0)) + (within.start or 0)
    if not columns.size:
        empty = np.zeros(0, np.int64)
        return _Runs([], [0], empty, empty)
    left, right = int(columns[0]), int(columns[-1]) + 1
    down = np.asarray(cv2.transpose(labels[:, left:right]), np.int32).ravel()
    cuts = np.flatnonzero(down[1:] != down[:-1]) + 1
    starts = np.concatenate(([0], cuts))
    ends = np.concatenate((cuts, [down.size]))
    offset = left * labels.shape[0]
    return _of_labels(down[starts], starts + offset, ends + offset)


def _of_labels(values: NDArray[Any], starts: NDArray[np.int64], ends: NDArray[np.int64]) -> _Runs:
    """The foreground among all runs, which are in column order."""
    inside = values != 0
    starts, ends, values = starts[inside], ends[inside], values[inside]
    order = np.argsort(values, kind="stable")
    starts, ends, values = starts[order], ends[order], values[order]
    if not values.size:
        return _Runs([], [0], starts, ends)
    first = np.concatenate(([0], np.flatnonzero(values[1:] != values[:-1]) + 1))
    return _Runs(values[first].tolist(), [*first.tolist(), len(values)], starts, ends)


def _extent(
    starts: NDArray[np.int64], ends: NDArray[np.int64], area: int, height: int
) -> tuple[tuple[int, int, int, int], tuple[float, float]]:
    """Box (xywh) and centroid (x, y) of an object's runs."""
    left, right = int(starts[0]) // height, int(ends[-1] - 1) // height
    x0, y0 = np.divmod(starts, height)
    x1, y1 = np.divmod(ends - 1, height)
    if bool((x0 == x1).all()):
        top, bottom = int(y0.min()), int(y1.max())
    else:
        top, bottom = 0, height - 1  # a run goes on from one column's foot to the next one's head
    # Sums of x and of x * H + y over a run in closed form: integers, so the order of adding changes nothing.
    x_sum = int((_column_sum(ends, height) - _column_sum(starts, height)).sum())
    position_sum = int(((starts + ends - 1) * (ends - starts)).sum()) // 2
    y_sum = position_sum - height * x_sum
    centroid = float(np.float32(x_sum / area)), float(np.float32(y_sum / area))
    return (left, top, right - left + 1, bottom - top + 1), centroid


def _column_sum(position: NDArray[np.int64], height: int) -> NDArray[np.int64]:
    """Sum of the column indices p // height over all p below `position`."""
    columns, rest = np.divmod(position, height)
    total: NDArray[np.int64] = height * columns * (columns - 1) // 2 + columns * rest
    return total


def _encode(starts: NDArray[np.int64], ends: NDArray[np.int64], height: int, width: int) -> str:
    """Compressed counts of one object's runs, which are in order and never touch."""
    bounds = np.empty(2 * len(starts) + 2, np.int64)
    bounds[0], bounds[-1] = 0, height * width
    bounds[1:-1:2], bounds[2:-1:2] = starts, ends
    lengths = np.diff(bounds)
    if len(starts) and lengths[-1] == 0:  # COCO's own encoder writes no empty last run
        lengths = lengths[:-1]
    encoded = coco.frPyObjects({"size": [height, width], "counts": lengths.tolist()}, height, width)
    return str(encoded["counts"], "ascii")


def _decompress(counts: str | bytes) -> NDArray[np.int64]:
    """Run lengths from compressed counts: groups of five bits, lowest first, signed.

    From the fourth number on, each is the difference to the run length two before it.
    """
    try:
        text = counts.encode("ascii") if isinstance(counts, str) else bytes(counts)
    except UnicodeEncodeError:
        raise ValueError("RLE counts hold a character that is not ASCII") from None
    codes = np.frombuffer(text, np.uint8).astype(np.int64) - _FIRST_CHAR
    if not codes.size:
        raise ValueError("RLE counts are empty")
    strange = np.flatnonzero((codes < 0) | (codes > 63))
    if strange.size:
        at = int(strange[0])
        raise ValueError(f"RLE counts hold {chr(text[at])!r} at position {at}, which no COCO encoder writes")
    last = (codes & 32) == 0
    if not last[-1]:
        raise ValueError("RLE counts end in the middle of a number; they were cut off")
    stops = np.flatnonzero(last)
    begins = np.concatenate(([0], stops[:-1] + 1))
    chars = stops - begins + 1
    if int(chars.max()) > _MAX_CHARS_PER_RUN:
        raise ValueError("RLE counts hold a number of more than 35 bits; no mask is that large")
    shift = 5 * (np.arange(codes.size) - np.repeat(begins, chars))
    numbers = np.add.reduceat((codes & 31) << shift, begins)
    numbers -= np.where(codes[stops] & 16, np.int64(1) << (5 * chars), 0)
    numbers[1::2] = np.cumsum(numbers[1::2])
    numbers[2::2] = np.cumsum(numbers[2::2])  # the first run of all, number 0, is the base of no difference
    return numbers


def _listed(counts: Sequence[int], pixels: int) -> NDArray[np.int64]:
    """Run lengths given as a list."""
    for count in counts:
        if isinstance(count, bool) or not isinstance(count, (int, np.integer)) or not 0 <= count <= pixels:
            raise ValueError(f"RLE counts hold {count!r}; run lengths are whole numbers from 0 to {pixels}")
    return np.array(counts, np.int64)
