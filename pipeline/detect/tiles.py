"""Tiles: overlapping parts of a frame, in which a detector finds things that are small on the whole frame."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.prompts.box_segmenters import Box

# Side of a square tile and least overlap of two, as shares of the frame's shorter side: a thing of up to the
# overlap's size lies completely in some tile.
_SIDE, _OVERLAP = 0.6, 0.2
# Frames with a shorter side of fewer pixels have no tiles: enlarging would show nothing new.
_LEAST = 240
# A box that ends within this share of a tile's side from an inner edge is cut off by it.
_AT_EDGE = 0.02
# Width and height of the thumbnail in which motion is looked for, and the grey levels that a change has.
_THUMBNAIL = (96, 72)
_CHANGE = 12
# What makes a tile be looked at sooner: motion in it, counted as up to so many looks of waiting for each look
# of waiting, and a wanted box in it, counted as so many looks.
_MOTION, _WANTED = 3.0, 6.0
# Share of a tile's thumbnail pixels that changed which counts as full motion.
_FULL_MOTION = 0.02


def tiles_of(height: int, width: int) -> list[Box]:
    """The whole frame, then square tiles row by row, which cover it and overlap."""
    whole: Box = (0, 0, width, height)
    short = min(height, width)
    if short < _LEAST:
        return [whole]
    side, overlap = round(short * _SIDE), round(short * _OVERLAP)
    tops, lefts = _starts(height, side, overlap), _starts(width, side, overlap)
    return [whole, *((left, top, side, side) for top in tops for left in lefts)]


def is_cut(box: Sequence[float], tile: Box, height: int, width: int) -> bool:
    """Whether a box (left, top, right, bottom in the frame) ends at an edge of its tile inside the frame."""
    left, top, across, down = tile
    near = _AT_EDGE * min(across, down)
    return (
        (left > 0 and box[0] <= left + near)
        or (top > 0 and box[1] <= top + near)
        or (left + across < width and box[2] >= left + across - near)
        or (top + down < height and box[3] >= top + down - near)
    )


def thumbnail_of(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A small grey copy of an H x W x 3 RGB frame, to see motion on."""
    small = cv2.resize(np.ascontiguousarray(picture), _THUMBNAIL, interpolation=cv2.INTER_AREA)
    return np.asarray(cv2.cvtColor(small, cv2.COLOR_RGB2GRAY), np.uint8)


@dataclass
class Rotation:
    """Which tiles of a frame are looked at next.

    Each look takes the tiles that have waited longest. Waiting counts up to four times as much where
    something moves, and a tile in which something is wanted comes sooner.

    Attributes:
        waited: looks since each tile was last chosen.
        thumbnail: of the frame at the last look.
    """

    waited: list[int]
    thumbnail: NDArray[np.uint8]

    def choose(
        self, tiles: Sequence[Box], count: int, picture: NDArray[np.uint8], wanted: Sequence[Box]
    ) -> list[int]:
        """Indices of the tiles to look at on a frame, ascending; their waiting begins anew.

        Args:
            tiles: of the frame, in the order of `waited`.
            count: how many to choose.
            picture: the frame, H x W x 3 RGB.
            wanted: boxes in which something is looked for.
        """
        thumbnail = thumbnail_of(picture)
        changed = np.asarray(cv2.absdiff(thumbnail, self.thumbnail)) > _CHANGE
        self.thumbnail = thumbnail
        height, width = picture.shape[:2]
        self.waited = [waited + 1 for waited in self.waited]
        urgency = [
            waited * (1 + _MOTION * min(1.0, _moving(changed, tile, height, width) / _FULL_MOTION))
            for waited, tile in zip(self.waited, tiles, strict=True)
        ]
        for box in wanted:
            best = _best_tile(box, tiles)
            if best is not None:
                urgency[best] += _WANTED
        chosen = sorted(sorted(range(len(tiles)), key=lambda at: (-urgency[at], at))[:count])
        for at in chosen:
            self.waited[at] = 0
        return chosen


def _starts(length: int, side: int, overlap: int) -> list[int]:
    """Evenly spaced starts of tiles along one dimension."""
    if length <= side:
        return [0]
    count = ceil((length - overlap) / (side - overlap))
    return [round(at * (length - side) / (count - 1)) for at in range(count)]


def _moving(changed: NDArray[np.bool_], tile: Box, height: int, width: int) -> float:
    """Share of a tile's pixels in the thumbnail that changed."""
    rows, columns = changed.shape
    left, top, across, down = tile
    part = changed[
        top * rows // height : max(1, (top + down) * rows // height),
        left * columns // width : max(1, (left + across) * columns // width),
    ]
    return float(part.mean()) if part.size else 0.0


def _best_tile(box: Box, tiles: Sequence[Box]) -> int | None:
    """The smallest tile that contains a box, with the most room around it; None if no tile does."""
    x, y, w, h = box
    best, found = (0, 0), None
    for at, (left, top, across, down) in enumerate(tiles):
        room = min(x - left, y - top, left + across - x - w, top + down - y - h)
        rank = (-across * down, room)
        if room >= 0 and (found is None or rank > best):
            best, found = rank, at
    return found
