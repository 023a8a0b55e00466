"""Prompts resolved to masks: label regions of their frame.

`pipeline.prompts.files` reads and checks them; its names can be imported from here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.base.errors import PromptError
from pipeline.base.records import Frame
from pipeline.prompts.box_segmenters import Box, BoxSegmenter, inscribed_ellipse
from pipeline.prompts.files import (
    PromptObject,
    PromptSet,
    gather_prompts,
    load_mask_png,
    load_prompts,
    parse_box,
    prompts_schema,
)
from pipeline.tracks.masks import mask_to_rle, rle_to_mask

__all__ = [
    "PromptObject",
    "PromptSet",
    "ResolvedPrompt",
    "gather_prompts",
    "load_mask_png",
    "load_prompts",
    "parse_box",
    "prompts_schema",
    "resolve",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ResolvedPrompt:
    """The masks of one frame's prompts, H x W bool each, without overlaps.

    Args:
        ellipses: objects that the segmenter did not find in their box, so that an ellipse is used.
    """

    masks: dict[int, NDArray[np.bool_]]
    categories: dict[int, str | None]
    warnings: tuple[str, ...] = ()
    ellipses: tuple[int, ...] = ()

    def to_record(self) -> dict[str, Any]:
        """Return JSON-ready values, with masks as RLE."""
        height, width = next(iter(self.masks.values())).shape
        record = {
            "size": [height, width],
            "masks": [[i, self.categories.get(i), mask_to_rle(m)] for i, m in self.masks.items()],
        }
        return record | ({"ellipses": list(self.ellipses)} if self.ellipses else {})

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> ResolvedPrompt:
        """Restore from the output of `to_record`."""
        height, width = record["size"]
        masks = {int(i): rle_to_mask(counts, height, width) for i, _, counts in record["masks"]}
        categories = {int(i): category for i, category, _ in record["masks"]}
        return cls(masks, categories, ellipses=tuple(record.get("ellipses", ())))


def resolve(
    objects: Iterable[PromptObject],
    frame: Frame,
    segmenter: BoxSegmenter,
    aside: Executor | None = None,
) -> ResolvedPrompt:
    """Convert a frame's prompts to masks of its size.

    If masks overlap, the later entry gets the pixels, and one warning is logged.

    Args:
        aside: a thread that may segment some of the boxes, if the segmenter may be used by several threads
            at once (`concurrent`); with as many threads of torch as the caller.

    Raises:
        PromptError: a mask has another size than the frame or is empty, a box or polygon lies outside the
            frame, or an object is wholly covered by later ones.
    """
    masks: dict[int, NDArray[np.bool_]] = {}
    categories: dict[int, str | None] = {}
    warnings: list[str] = []
    ellipses: list[int] = []
    overlapping: set[int] = set()
    covered_by: dict[int, int] = {}
    entries = list(objects)
    names = [f"object {entry.object_id} on frame {frame.frame_index}" for entry in entries]
    made = [
        partial(_mask_of, entry, frame, segmenter, name) for entry, name in zip(entries, names, strict=True)
    ]
    for entry, name, (mask, is_ellipse) in zip(entries, names, _each(made, segmenter, aside), strict=True):
        if is_ellipse:
            ellipses.append(entry.object_id)
            warnings.append(f"{name}: no object found in the box; an ellipse is used instead")
        if not mask.any():
            raise PromptError(f"{name}: its mask is empty; draw it again")
        for earlier, other in masks.items():
            if (other & mask).any():
                overlapping |= {earlier, entry.object_id}
                masks[earlier] = other & ~mask
                covered_by[earlier] = entry.object_id
        masks[entry.object_id] = mask
        categories[entry.object_id] = entry.category
    for object_id, mask in masks.items():
        if not mask.any():
            raise PromptError(
                f"object {object_id} on frame {frame.frame_index} is wholly covered by object "
                f"{covered_by[object_id]}: give it a pixel of its own"
            )
    if overlapping:
        ids = ", ".join(map(str, sorted(overlapping)))
        warnings.append(
            f"frame {frame.frame_index}: prompts of objects {ids} overlap; the later entry gets the pixels"
        )
    for warning in warnings:
        logger.warning("%s", warning)
    return ResolvedPrompt(masks, categories, tuple(warnings), tuple(ellipses))


def _each(
    calls: Sequence[Callable[[], tuple[NDArray[np.bool_], bool]]],
    segmenter: BoxSegmenter,
    aside: Executor | None,
) -> list[tuple[NDArray[np.bool_], bool]]:
    """Results of the calls, in their order."""
    if aside is None or not getattr(segmenter, "concurrent", False):
        return [call() for call in calls]
    from xmem_core.aside import each  # needs torch, as whoever has such a thread

    return each(calls, aside)


def _mask_of(
    entry: PromptObject, frame: Frame, segmenter: BoxSegmenter, name: str
) -> tuple[NDArray[np.bool_], bool]:
    """Return a prompt's mask, and whether it is an ellipse because the segmenter found nothing."""
    height, width = frame.size
    if entry.state is not None:
        raise PromptError(f"{name}: it comes from another stream's state, and a mask is needed here")
    if entry.rle is not None:
        if entry.rle[:2] != (height, width):
            raise PromptError(
                f"{name}: its mask is {entry.rle[1]}x{entry.rle[0]}, the frame {width}x{height}; "
                "give masks at the video's size"
            )
        return rle_to_mask(entry.rle[2], height, width), False
    if entry.polygons is not None:
        mask = np.zeros((height, width), np.bool_)
        for polygon in entry.polygons:
            mask |= _inside(polygon, height, width)
        if not mask.any():
            raise PromptError(f"{name}: its polygons cover no pixel of the frame of {width}x{height}")
        return mask, False
    assert entry.box is not None
    box = _clip(entry.box, width, height, name)
    mask = segmenter.segment(frame.image, box)
    if mask.any():
        return mask, False
    return inscribed_ellipse(frame.size, box), True


def _clip(box: tuple[float, float, float, float], width: int, height: int, name: str) -> Box:
    x, y, w, h = box
    # Clip before rounding: a sum of large numbers may be infinite.
    left, top = round(min(max(0, x), width)), round(min(max(0, y), height))
    right, bottom = round(max(0, min(width, x + w))), round(max(0, min(height, y + h)))
    if right <= left or bottom <= top:
        raise PromptError(
            f"{name}: box {x:g},{y:g},{w:g},{h:g} has no pixel inside the frame of {width}x{height}"
        )
    return left, top, right - left, bottom - top


def _inside(polygon: tuple[float, ...], height: int, width: int) -> NDArray[np.bool_]:
    """H x W mask of the pixels whose centres lie inside; even-odd rule if the outline crosses itself.

    Pixel (x, y) reaches from x to x + 1 and from y to y + 1, as for boxes. So the polygon around a box covers
    exactly the box's pixels; outlines filled by OpenCV would exceed them by a row and a column.
    """
    mask = np.zeros((height, width), np.bool_)
    # Clipping this far out has no visible effect; differences of larger numbers could overflow.
    points = np.clip(np.asarray(polygon, np.float64).reshape(-1, 2), -1e9, 1e9)
    x0, y0 = points.T
    x1, y1 = np.roll(points, -1, axis=0).T
    first, last = (int(np.clip(np.ceil(y - 0.5), 0, height)) for y in (y0.min(), y0.max()))
    for row in range(first, last):
        centre = row + 0.5
        crossing = (y0 <= centre) != (y1 <= centre)
        share = (centre - y0[crossing]) / (y1[crossing] - y0[crossing])
        xs = np.sort(x0[crossing] + share * (x1[crossing] - x0[crossing]))
        columns = np.clip(np.ceil(xs - 0.5), 0, width).astype(np.int64).tolist()
        for left, right in zip(columns[::2], columns[1::2], strict=True):
            mask[row, left:right] = True
    return mask
