"""Draws masks, outlines and labels onto a picture."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.base.errors import UsageError, one_line
from pipeline.base.records import MaskRecord
from pipeline.tracks.masks import rle_to_mask

Image = NDArray[np.uint8]


def object_color(object_id: int) -> tuple[int, int, int]:
    """The RGB colour of an object id: fixed, and far from those of neighbouring ids."""
    hue = object_id * 0.61803398875 % 1.0  # the golden ratio spreads any number of hues evenly
    band = object_id // 12 % 3
    red, green, blue = colorsys.hsv_to_rgb(hue, (0.85, 0.6, 1.0)[band], (1.0, 0.95, 0.75)[band])
    return round(red * 255), round(green * 255), round(blue * 255)


def overlay(image: Image, records: Sequence[MaskRecord], alpha: float = 0.5) -> Image:
    """Return a copy of an image with masks, outlines and labels (id and category) drawn over it.

    Args:
        image: H x W x 3 uint8 RGB.
        records: mask records of the frame; objects out of sight are left out.
        alpha: opacity of the masks, 0 to 1.

    Raises UsageError if a mask is damaged or has another size than the image.
    """
    if not 0 <= alpha <= 1:
        raise UsageError(f"alpha={alpha}: must be between 0 (outlines only) and 1 (opaque)")
    drawn = np.array(image, dtype=np.uint8, order="C")
    visible = [r for r in records if r.mask_rle is not None and r.area > 0]
    thickness = max(1, round(min(drawn.shape[:2]) / 320))
    for record in visible:
        _draw_mask(drawn, record, alpha, thickness)
    for record in visible:
        _draw_label(drawn, record)
    return drawn


def _draw_mask(drawn: Image, record: MaskRecord, alpha: float, thickness: int) -> None:
    height, width = drawn.shape[:2]
    if (record.frame_height, record.frame_width) != (height, width):
        raise UsageError(
            f"frame {record.frame_index}: the mask of object {record.object_id} is {record.frame_width}x"
            f"{record.frame_height}, the image {width}x{height}; give the video that was tracked"
        )
    try:
        mask = rle_to_mask(record.mask_rle or "", height, width)
    except ValueError as error:
        raise UsageError(
            f"frame {record.frame_index}: the mask of object {record.object_id} is damaged: {one_line(error)}"
        ) from error
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not rows.size:
        return
    top, left = int(rows[0]), int(columns[0])
    inside = mask[top : int(rows[-1]) + 1, left : int(columns[-1]) + 1]
    color = object_color(record.object_id)
    patch = drawn[top : top + inside.shape[0], left : left + inside.shape[1]]
    tinted = patch[inside] * (1 - alpha) + np.array(color) * alpha
    patch[inside] = np.round(tinted).astype(np.uint8)
    outlines, _ = cv2.findContours(inside.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(drawn, outlines, -1, color, thickness, offset=(left, top))


def _draw_label(drawn: Image, record: MaskRecord) -> None:
    """Draw id and category in a box of the object's colour, above the object if there is room."""
    height, width = drawn.shape[:2]
    text = f"{record.object_id} {record.category}" if record.category else str(record.object_id)
    text = text.encode("ascii", "replace").decode()  # OpenCV's font has only ASCII
    scale = max(0.35, min(height, width) / 900)
    weight = max(1, round(scale * 1.6))
    (text_width, text_height), below = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, weight)
    x, y = (record.bbox or (0, 0, 0, 0))[:2]
    x = max(0, min(x, width - text_width - 4))
    y = max(text_height + below + 4, min(y, height))
    color = object_color(record.object_id)
    bright = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] > 140
    cv2.rectangle(drawn, (x, y - text_height - below - 4), (x + text_width + 4, y), color, -1)
    ink = (0, 0, 0) if bright else (255, 255, 255)
    cv2.putText(drawn, text, (x + 2, y - below), cv2.FONT_HERSHEY_SIMPLEX, scale, ink, weight, cv2.LINE_AA)
