"""Shared by the writers of all export formats: streams to export, numbers of categories, counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pipeline.base.errors import StoreError, UsageError
from pipeline.base.records import MaskRecord
from pipeline.tracks.masks import rle_to_mask
from pipeline.tracks.reader import TrackReader

NO_CATEGORY = "object"
"""The name that formats get which want a category for each object."""


@dataclass(frozen=True)
class Exported:
    """What was exported."""

    streams: int
    frames: int
    rows: int


@dataclass
class Stream:
    """One stream: its reader, and what its record says."""

    stream_id: str
    reader: TrackReader
    width: int
    height: int
    rate: float | None
    source: str | None


@dataclass
class Categories:
    """Numbers of categories from 1, in the order in which they are met."""

    numbers: dict[str, int] = field(default_factory=dict)

    def number(self, category: str | None) -> int:
        return self.numbers.setdefault(category or NO_CATEGORY, len(self.numbers) + 1)


@dataclass
class Count:
    """What has been exported so far."""

    streams: int = 0
    frames: int = 0
    rows: int = 0


def visible(rows: Sequence[MaskRecord]) -> list[MaskRecord]:
    """The rows of objects that are in sight."""
    return [r for r in rows if r.mask_rle is not None and r.bbox is not None and r.area > 0]


def mask_in_box(stream: Stream, r: MaskRecord) -> NDArray[np.bool_]:
    """The mask of a visible row, cut to its box: height x width of the box. StoreError if it is damaged."""
    assert r.mask_rle is not None
    assert r.bbox is not None
    try:
        mask = rle_to_mask(r.mask_rle, r.frame_height, r.frame_width)
    except ValueError as error:
        raise StoreError(
            f"stream {stream.stream_id}, frame {r.frame_index}: object {r.object_id}: {error}"
        ) from error
    left, top, width, height = r.bbox
    return mask[top : top + height, left : left + width]


def one_size(fmt: str, stream: Stream, row: MaskRecord, size: tuple[int, int]) -> None:
    """UsageError if a row's frame is not of a size (height, width): a format holds one a video."""
    if (row.frame_height, row.frame_width) != size:
        raise UsageError(
            f"stream {stream.stream_id}: frame {row.frame_index} is {row.frame_width}x{row.frame_height}, "
            f"earlier ones {size[1]}x{size[0]}: {fmt} holds one size a video, use coco"
        )
