"""Inputs and outputs of exported detection networks: recognises the family and decodes its outputs.

| family | outputs, for C classes | input |
| --- | --- | --- |
| YOLOv5 | 1 x 3N x (5 + C): centre and size in pixels, objectness, class scores | letterboxed, RGB, 0..1 |
| YOLOv8, YOLO11 | 1 x (4 + C) x N: centre and size in pixels, class scores | letterboxed, RGB, 0..1 |
| YOLO with NMS | 1 x up to 1000 x 6: corners in pixels, score, class | letterboxed, RGB, 0..1 |
| YOLOX | 1 x N x (5 + C) as YOLOv5, boxes relative to the cells or decoded | at the upper left, BGR, 0..255 |
| RT-DETR, D-FINE | labels 1 x Q, boxes 1 x Q x 4 (corners), scores 1 x Q | stretched, RGB, 0..1 |
| RT-DETR by Ultralytics | 1 x Q x (4 + C): centre and size as shares, class scores | stretched, RGB, 0..1 |
| the same by Transformers | logits 1 x Q x C, pred_boxes 1 x Q x 4 (centre, size as shares) | as above |

N is the number of cells of the grids of stride 8, 16 and 32 (and 64), Q the number of queries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

FAMILIES = "YOLOv5, YOLOv8, YOLO11, YOLOX, RT-DETR, D-FINE"
_STRIDES = ((8, 16, 32), (8, 16, 32, 64))
_MOST_ROWS = 1000
"""Largest number of rows of an output that is one row per detection."""
_GREY = 114
"""Colour of the border that YOLO networks are trained with."""

Outputs = Mapping[str, NDArray[np.generic]]
Size = tuple[int, int]
"""Height and width of the network's input in pixels."""


@dataclass(frozen=True)
class Raw:
    """Boxes that a network returned, before thresholds.

    Args:
        boxes: N x 4 float32, left, top, right, bottom in pixels of the network's input.
        scores: N float32.
        classes: N int64.
    """

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    classes: NDArray[np.int64]


@dataclass(frozen=True)
class Family:
    """How pictures are given to a network, and how its outputs are read.

    Args:
        name: for messages.
        fit: "centre" and "corner": the picture keeps its aspect ratio and gets a grey border on both sides or
            on the right and below; "stretch": it fills the input.
        decode: reads outputs, given the input's size.
        classes: number of classes; None if the outputs do not show it.
        is_plain: colours are BGR from 0 to 255, instead of RGB from 0 to 1.
        overlaps: several boxes of one thing are returned, so that non-maximum suppression is needed.
    """

    name: str
    fit: Literal["centre", "corner", "stretch"]
    decode: Callable[[Outputs, Size], Raw]
    classes: int | None
    is_plain: bool = False
    overlaps: bool = False


@dataclass(frozen=True)
class Placement:
    """Where in the network's input a picture lies: pixel = picture's pixel * scale + offset, for x and y."""

    scale: tuple[float, float]
    offset: tuple[int, int]

    def in_picture(self, boxes: NDArray[np.float32]) -> NDArray[np.float32]:
        """N x 4 corners in pixels of the input to pixels of the picture."""
        scale = np.array(self.scale * 2, np.float32)
        return (boxes - np.array(self.offset * 2, np.float32)) / scale


def prepared(picture: NDArray[np.uint8], size: Size, family: Family) -> tuple[NDArray[np.float32], Placement]:
    """A picture as the network's input.

    Args:
        picture: H x W x 3 uint8 RGB.
        size: height and width of the input.

    Returns:
        1 x 3 x h x w float32, and where the picture lies in it.
    """
    height, width = picture.shape[:2]
    if family.fit == "stretch":
        inner = size
    else:
        ratio = min(size[0] / height, size[1] / width)
        inner = (max(1, round(height * ratio)), max(1, round(width * ratio)))
    if inner != (height, width):
        # The networks that stretch are trained on pictures that were shrunk with antialiasing.
        shrinks = family.fit == "stretch" and inner[0] < height and inner[1] < width
        method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        picture = np.asarray(cv2.resize(picture, inner[::-1], interpolation=method), np.uint8)
    spare = (size[0] - inner[0], size[1] - inner[1])
    top, left = (spare[0] // 2, spare[1] // 2) if family.fit == "centre" else (0, 0)
    canvas = np.full((*size, 3), _GREY, np.uint8)
    canvas[top : top + inner[0], left : left + inner[1]] = picture
    if family.is_plain:
        values = canvas[:, :, ::-1].astype(np.float32)
    else:
        values = canvas.astype(np.float32) / np.float32(255)
    placement = Placement((inner[1] / width, inner[0] / height), (left, top))
    return np.ascontiguousarray(values.transpose(2, 0, 1)[None]), placement


def recognised(outputs: Outputs, size: Size, names: int | None, description: str = "") -> Family:
    """The family of a network, from its outputs on a grey picture.

    Args:
        size: height and width of the input.
        names: number of class names, if there are any.
        description: the model's own description, if it has one.

    Raises:
        ValueError: the outputs are of no family above.
    """
    shapes = {name: value.shape for name, value in outputs.items()}
    family = _of_several(shapes) or _of_one(outputs, size, names, description)
    if family is None:
        shown = ", ".join(f"{name} {' x '.join(map(str, shape))}" for name, shape in shapes.items())
        raise ValueError(f"outputs {shown} are of no known family; known are exports of {FAMILIES}")
    raw = family.decode(outputs, size)
    if raw.scores.size and not (raw.scores.min() >= -0.01 and raw.scores.max() <= 1.01):
        raise ValueError(
            f"outputs have the shapes of {family.name}, but scores from {raw.scores.min():g} to "
            f"{raw.scores.max():g} instead of 0 to 1: export the model with its sigmoid"
        )
    return family


def _of_several(shapes: Mapping[str, tuple[int, ...]]) -> Family | None:
    if {"labels", "boxes", "scores"} <= set(shapes):
        rows = shapes["scores"]
        if len(rows) == 2 and shapes["labels"] == rows and shapes["boxes"] == (*rows, 4):
            return Family("RT-DETR or D-FINE", "stretch", _decode_named, None)
    if {"logits", "pred_boxes"} <= set(shapes):
        logits = shapes["logits"]
        if len(logits) == 3 and shapes["pred_boxes"] == (*logits[:2], 4):
            return Family("RT-DETR or D-FINE", "stretch", _decode_logits, logits[2])
    return None


def _of_one(outputs: Outputs, size: Size, names: int | None, description: str) -> Family | None:
    """The family by the first output; others may be the feature maps that it was made from."""
    first = next(iter(outputs.values()), None)
    if first is None or first.ndim != 3 or first.shape[0] != 1:
        return None
    rows, columns = first.shape[1:]
    cells = {
        sum((size[0] // stride) * (size[1] // stride) for stride in strides): strides for strides in _STRIDES
    }
    if rows in cells and columns > 5:
        decode = _decode_objectness if _is_decoded(first, size) else _decoder_of_cells(cells[rows])
        return Family("YOLOX", "corner", decode, columns - 5, is_plain=True, overlaps=True)
    if rows % 3 == 0 and rows // 3 in cells and columns > 5:
        return Family("YOLOv5", "centre", _decode_objectness, columns - 5, overlaps=True)
    if rows > 4 and (columns in cells or rows == 4 + (names or 0)):
        return Family("YOLOv8", "centre", _decode_columns, rows - 4, overlaps=True)
    is_detr = names is not None and columns == 4 + names and rows <= _MOST_ROWS
    if columns == 6 and rows <= _MOST_ROWS and not (is_detr and "detr" in description.lower()):
        return Family("YOLO with NMS", "centre", _decode_final, None)
    return Family("RT-DETR", "stretch", _decode_shares, columns - 4) if is_detr else None


def _is_decoded(output: NDArray[np.generic], size: Size) -> bool:
    """Whether YOLOX's boxes are in pixels: then those of the last cells are far to the right and below.

    Relative to their cells, centres are within a few cells.
    """
    return float(np.asarray(output[0, :, :2], np.float32).max()) > max(size) / 2


def _decode_objectness(outputs: Outputs, size: Size) -> Raw:
    values = _first(outputs)
    return _best_class(_corners(values[:, :4]), values[:, 5:] * values[:, 4:5])


def _decoder_of_cells(strides: tuple[int, ...]) -> Callable[[Outputs, Size], Raw]:
    def decode(outputs: Outputs, size: Size) -> Raw:
        values = _first(outputs)
        grids, scales = [], []
        for stride in strides:
            y, x = np.mgrid[: size[0] // stride, : size[1] // stride]
            grids.append(np.stack([x.ravel(), y.ravel()], 1))
            scales.append(np.full((x.size, 1), stride))
        grid, scale = np.concatenate(grids), np.concatenate(scales).astype(np.float32)
        with np.errstate(over="ignore"):
            boxes = np.concatenate([(values[:, :2] + grid) * scale, np.exp(values[:, 2:4]) * scale], 1)
        return _best_class(_corners(boxes.astype(np.float32)), values[:, 5:] * values[:, 4:5])

    return decode


def _decode_columns(outputs: Outputs, size: Size) -> Raw:
    values = _first(outputs).T
    return _best_class(_corners(values[:, :4]), values[:, 4:])


def _decode_final(outputs: Outputs, size: Size) -> Raw:
    values = _first(outputs)
    return Raw(values[:, :4], values[:, 4], values[:, 5].astype(np.int64))


def _decode_shares(outputs: Outputs, size: Size) -> Raw:
    values = _first(outputs)
    return _best_class(_corners(values[:, :4]) * _whole(size), values[:, 4:])


def _decode_named(outputs: Outputs, size: Size) -> Raw:
    # In pixels of the size that the network was told, that of its input.
    boxes = np.asarray(outputs["boxes"][0], np.float32)
    scores = np.asarray(outputs["scores"][0], np.float32)
    return Raw(boxes, scores, np.asarray(outputs["labels"][0]).astype(np.int64))


def _decode_logits(outputs: Outputs, size: Size) -> Raw:
    logits = np.asarray(outputs["logits"][0], np.float32)
    with np.errstate(over="ignore"):
        scores = np.float32(1) / (np.float32(1) + np.exp(-logits))
    boxes = np.asarray(outputs["pred_boxes"][0], np.float32)
    return _best_class(_corners(boxes) * _whole(size), scores)


def _first(outputs: Outputs) -> NDArray[np.float32]:
    return np.asarray(next(iter(outputs.values()))[0], np.float32)


def _whole(size: Size) -> NDArray[np.float32]:
    return np.array([size[1], size[0], size[1], size[0]], np.float32)


def _corners(boxes: NDArray[np.float32]) -> NDArray[np.float32]:
    """Centre and size to two corners, N x 4."""
    half = boxes[:, 2:] / 2
    return np.concatenate([boxes[:, :2] - half, boxes[:, :2] + half], 1)


def _best_class(boxes: NDArray[np.float32], scores: NDArray[np.float32]) -> Raw:
    classes = scores.argmax(1)
    return Raw(boxes, scores[np.arange(len(scores)), classes], classes.astype(np.int64))
