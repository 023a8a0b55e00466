"""Draws masks, outlines and labels onto a picture."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.base.errors import UsageError, one_line
from pipeline.base.records import MaskRecord
from pipeline.draw.look import Colour, Image, Look
from pipeline.tracks.masks import rle_to_mask

_FADED = 0.6
"""Brightness of what is no object, of the overlay fade."""


def object_color(object_id: int) -> tuple[int, int, int]:
    """The RGB colour of an object id: fixed, and far from those of neighbouring ids."""
    hue = object_id * 0.61803398875 % 1.0  # the golden ratio spreads any number of hues evenly
    band = object_id // 12 % 3
    red, green, blue = colorsys.hsv_to_rgb(hue, (0.85, 0.6, 1.0)[band], (1.0, 0.95, 0.75)[band])
    return round(red * 255), round(green * 255), round(blue * 255)


@dataclass(frozen=True)
class _Shape:
    """An object's pixels, cut out, with their place in the picture."""

    record: MaskRecord
    top: int
    left: int
    inside: NDArray[np.bool_]

    def of(self, picture: NDArray[Any]) -> NDArray[Any]:
        """The part of a picture in which the pixels lie."""
        height, width = self.inside.shape
        return picture[self.top : self.top + height, self.left : self.left + width]


def overlay(image: Image, records: Sequence[MaskRecord], look: Look | None = None) -> Image:
    """Return a copy of an image with masks, outlines and labels (id and category) drawn over it.

    Args:
        image: H x W x 3 uint8 RGB.
        records: mask records of the frame; objects out of sight are left out.
        look: how they are drawn; None: `Look()`.

    Raises UsageError if a mask is damaged or has another size than the image.
    """
    look = look or Look()
    drawn = np.array(image, dtype=np.uint8, order="C")
    shown = [r for r in records if r.mask_rle is not None and r.area > 0 and look.shows(r.object_id)]
    shapes = [shape for r in shown if (shape := _shape(r, *drawn.shape[:2])) is not None]
    if look.overlay in ("fade", "popup", "layered"):
        _change_background(drawn, shapes, look)
    thickness = max(1, round(min(drawn.shape[:2]) / 320))
    tinted = look.overlay in ("davis", "fade", "light")
    for shape in shapes:
        color = look.colours.get(shape.record.object_id) or object_color(shape.record.object_id)
        if tinted:
            patch = shape.of(drawn)
            mixed = patch[shape.inside] * (1 - look.strength) + np.array(color) * look.strength
            patch[shape.inside] = np.round(mixed).astype(np.uint8)
        if look.has_outlines:
            lines, _ = cv2.findContours(shape.inside.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
            cv2.drawContours(drawn, lines, -1, color, thickness, offset=(shape.left, shape.top))
    if look.has_ids:
        for record in shown:
            _draw_label(drawn, record, look.colours.get(record.object_id) or object_color(record.object_id))
    return drawn


def _change_background(drawn: Image, shapes: Sequence[_Shape], look: Look) -> None:
    """Darken the background, take its colours away, or put a layer between it and the objects."""
    before = look.overlay == "layered" and look.layer_place == "before"
    objects = np.zeros(drawn.shape[:2], np.bool_)
    for shape in () if before else shapes:
        shape.of(objects)[shape.inside] = True
    if look.overlay == "fade":
        changed = cv2.convertScaleAbs(drawn, alpha=_FADED)
    elif look.overlay == "popup":
        grey = cv2.cvtColor(cv2.cvtColor(drawn, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
        changed = cv2.addWeighted(grey, look.strength, drawn, 1 - look.strength, 0)
    else:
        assert look.layer is not None
        colours, alpha = look.layer.scaled(*drawn.shape[:2])
        mixed = drawn * (1 - look.strength * alpha)[..., None] + look.strength * colours
        changed = np.round(np.clip(mixed, 0, 255)).astype(np.uint8)
    drawn[~objects] = np.asarray(changed)[~objects]


def _shape(record: MaskRecord, height: int, width: int) -> _Shape | None:
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
        return None
    top, left = int(rows[0]), int(columns[0])
    return _Shape(record, top, left, mask[top : int(rows[-1]) + 1, left : int(columns[-1]) + 1])


def _draw_label(drawn: Image, record: MaskRecord, color: Colour) -> None:
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
    bright = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] > 140
    cv2.rectangle(drawn, (x, y - text_height - below - 4), (x + text_width + 4, y), color, -1)
    ink = (0, 0, 0) if bright else (255, 255, 255)
    cv2.putText(drawn, text, (x + 2, y - below), cv2.FONT_HERSHEY_SIMPLEX, scale, ink, weight, cv2.LINE_AA)
