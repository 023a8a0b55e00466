"""Scores committed tracks against the true boxes or masks of a multi-object tracking benchmark.

Definitions are those of TrackEval (its figures are in the tests), on the frames that the truth covers: MOTA,
ID switches, fragmentations, recall, precision and mostly tracked (CLEAR MOT, at a box IoU of 0.5), IDF1 (at
0.5), and HOTA (mean over IoU 0.05 to 0.95).
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from jobs.evaluation.mask_truth import is_mask_truth, score_masks
from jobs.evaluation.mot_measures import (
    TINY,
    Boxes,
    Overlaps,
    TrackingScores,
    frames_to_score,
    score_overlaps,
)
from pipeline.base.errors import UsageError
from pipeline.base.redaction import shareable
from pipeline.storage.locations import locate, read_error
from pipeline.tracks.reader import open_tracks

_NEEDED = 6
"""Values of a line: frame, id, x, y, w, h."""


def evaluate_tracking(
    truth: str, out: str, *, stream_id: str | None = None, first: int = 0, last: int | None = None
) -> TrackingScores:
    """Score the committed tracks of a stream: the boxes of its masks against MOT truth, or its masks.

    Args:
        truth: path or URI of MOT text or CSV, `frame,id,x,y,w,h,...`, frames from 1. Where there is a seventh
            value, rows with 0 there are not scored. Only frames with rows are scored. Or true masks, see
            `jobs.evaluation.mask_truth.score_masks`.
        out: output folder of tracking.
        stream_id: its stream; may be left out if there is one only.
        first, last: range of frame_index to score. Default: all that the truth covers.

    Raises:
        UsageError: the truth cannot be read or does not fit the video, or there is no such stream.
        StoreError: the folder cannot be read.
    """
    if is_mask_truth(truth):
        return score_masks(truth, out, stream_id=stream_id, first=first, last=last)
    boxes = read_truth(truth)
    reader = open_tracks(truth, out, stream_id, option="--stream")  # the only stream, if no id is given
    true = {frame: boxes[frame] for frame in frames_to_score(truth, "boxes", boxes, reader, first, last)}
    found: dict[int, dict[int, tuple[float, float, float, float]]] = {}
    sizes: dict[int, tuple[int, int]] = {}
    for frame_index in true:
        rows = reader.at(frame_index)
        for row in rows[:1]:
            sizes[frame_index] = (row.frame_width, row.frame_height)
        found[frame_index] = {
            r.object_id: (float(r.bbox[0]), float(r.bbox[1]), float(r.bbox[2]), float(r.bbox[3]))
            for r in rows
            if r.bbox is not None
        }
    largest = max((w for w, _ in sizes.values()), default=0), max((h for _, h in sizes.values()), default=0)
    if size := largest if sizes else reader.recorded_size():
        _check_inside(truth, true, sizes, size)
    return score_boxes(true, found)


def _check_inside(
    truth: str, true: Boxes, sizes: Mapping[int, tuple[int, int]], others: tuple[int, int]
) -> None:
    """UsageError if a true box has no pixel in its frame.

    Args:
        sizes: width and height in pixels of the frames that have rows.
        others: that of the other frames.
    """
    for frame_index, boxes in true.items():
        width, height = sizes.get(frame_index, others)
        for x, y, w, h in boxes.values():
            if x >= width or y >= height or x + w <= 0 or y + h <= 0:
                raise UsageError(
                    f"{truth} has the box {x:g},{y:g},{w:g},{h:g} outside frame {frame_index} of "
                    f"{width}x{height} pixels: it is of another video"
                )


def read_truth(uri: str) -> dict[int, dict[int, tuple[float, float, float, float]]]:
    """Boxes of MOT text or CSV. Raises UsageError, naming the line that is wrong."""
    try:
        text = locate(uri).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{uri} is not a text file of boxes: {error.reason} at byte {error.start}"
        ) from error
    except Exception as error:
        raise UsageError(f"the truth cannot be read: {read_error(uri, error)}") from shareable(error)
    boxes: dict[int, dict[int, tuple[float, float, float, float]]] = {}
    for line, fields in enumerate(csv.reader(io.StringIO(text)), start=1):
        if not any(field.strip() for field in fields) or (line == 1 and fields[0].strip() == "frame"):
            continue
        try:
            number, identity, box, scored = _row(fields)
        except ValueError as error:
            raise UsageError(
                f"{uri} line {line}: {error}; expected frame,id,x,y,w,h with frames from 1"
            ) from error
        on_frame = boxes.setdefault(number - 1, {})
        if not scored:
            continue
        if identity in on_frame:
            raise UsageError(f"{uri} line {line}: id {identity} is twice on frame {number}")
        on_frame[identity] = box
    return boxes


def _row(fields: list[str]) -> tuple[int, int, tuple[float, float, float, float], bool]:
    """Frame from 1, id, x, y, width and height in pixels of a line, and whether it is scored.

    Raises:
        ValueError: it says which value is wrong.
    """
    if len(fields) < _NEEDED:
        raise ValueError(f"{len(fields)} values")
    values = [float(field) for field in fields]
    for text, value in zip(fields[:_NEEDED], values, strict=False):
        if not math.isfinite(value):
            raise ValueError(f"{text.strip()} is not a finite number")
    number, identity, x, y, w, h, *more = values
    if number < 1 or number != int(number):
        raise ValueError(f"frame {number:g}, not a whole number from 1 on")
    if identity != int(identity):
        raise ValueError(f"id {identity:g}, not a whole number")
    if w <= 0 or h <= 0:
        raise ValueError(f"box of {w:g} x {h:g} pixels")
    return int(number), int(identity), (x, y, w, h), not more or more[0] != 0


def score_boxes(true: Boxes, found: Boxes) -> TrackingScores:
    """Scores of the boxes `found` on the frames of `true`."""
    frames = []
    for frame in sorted(true):
        ours = found.get(frame, {})
        ious = box_ious(list(true[frame].values()), list(ours.values()))
        frames.append(Overlaps([*true[frame]], [*ours], ious))
    return score_overlaps(frames)


def box_ious(
    these: list[tuple[float, float, float, float]], those: list[tuple[float, float, float, float]]
) -> NDArray[np.float64]:
    """N x M, intersection over union of boxes x, y, width, height."""
    a, b = np.array(these, float).reshape(-1, 1, 4), np.array(those, float).reshape(1, -1, 4)
    low = np.maximum(a[..., :2], b[..., :2])
    high = np.minimum(a[..., :2] + a[..., 2:], b[..., :2] + b[..., 2:])
    shared = np.maximum(high - low, 0).prod(-1)
    result: NDArray[np.float64] = shared / np.maximum(
        a[..., 2:].prod(-1) + b[..., 2:].prod(-1) - shared, TINY
    )
    return result
