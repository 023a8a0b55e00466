"""Search windows: the part of a frame in which an object is searched, in cells of stride 16."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xmem_core.bounds import above, bounds
from xmem_core.joint import Decode, Work
from xmem_core.network import aggregate

STRIDE = 16
"""Pixels of a cell: a position of keys, values and sensory memory."""

# Margin around the object: the larger of this many cells and this share of its extent.
_LEAST_MARGIN = 4
_MARGIN = 0.5
# Sides are multiples of this, so that many windows have the same size and are decoded together.
_STEP = 2
# Cells per frame by which the window of an object out of sight grows on each side.
_GROWTH = 1
# Searching the whole frame costs as much as five windows. An object not found there is searched on every
# third frame only, until it is found again; after about a second, on every sixth.
_REST = 3
_LONG_LOST = 30
_LONG_REST = 6
# A cell belongs to the object if this share of its pixels has this probability: single pixels must not widen
# the window, but larger parts must. With a share of 1/24, or with only the largest part, tracking is faster
# where masks leak, but loses 4 and 9 points of J&F on a clip with thin parts and one with a divided object.
_LEAST_PROBABILITY = 0.2
_LEAST_SHARE = 1 / 64
# A window larger than this share of the frame saves no time.
_MOST = 0.75
# Rows of pixels aggregated at a time on a CPU: what is computed on the way stays in the cache, and the system
# need not provide new memory for it.
_ROWS = 32


@dataclass(frozen=True)
class Window:
    """A rectangle of cells.

    Args:
        top, left: its first row and column.
        height, width: rows and columns.
        lost: number of frames for which the object was not found on the whole frame, or not searched; at
            most 30.
    """

    top: int
    left: int
    height: int
    width: int
    lost: int = 0

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)"""
        return self.height, self.width

    def cut(self, image: Tensor, scale: int = 1) -> Tensor:
        """The window's part of (..., h * scale, w * scale), a view."""
        rows = slice(self.top * scale, (self.top + self.height) * scale)
        columns = slice(self.left * scale, (self.left + self.width) * scale)
        return image[..., rows, columns]

    def to_json(self) -> list[int]:
        """JSON-ready list for `from_json`."""
        return [int(v) for v in astuple(self)]

    @classmethod
    def from_json(cls, values: Any) -> Window:
        """Build from `to_json`'s output."""
        return cls(*(int(v) for v in values))


def whole(grid: tuple[int, int]) -> Window:
    """The window of a whole frame of h x w cells."""
    return Window(0, 0, *grid)


def next_window(probability: Tensor, before: Window, least: int) -> Window:
    """Search window of an object on the next frame.

    The window surrounds the object's probable cells. For an object out of sight it grows frame by frame up
    to the whole frame; an object not found there either counts as lost.

    Args:
        probability: (H, W), the object's probability at the network's size, padded to the stride.
        before: the object's window on this frame.
        least: minimum side in cells, limited by the frame.
    """
    grid = probability.shape[0] // STRIDE, probability.shape[1] // STRIDE
    everywhere = before.size == grid
    found = _cells(above(probability, _LEAST_PROBABILITY))
    spans, lost = [], 0
    for axis, count in enumerate(grid):
        if found is not None:
            first, end = found[axis]
            margin = max(_LEAST_MARGIN, math.ceil(_MARGIN * (end - first)))
            spans.append(_around(first, end, max(least, end - first + 2 * margin), count))
        else:
            first, length = (before.top, before.height) if axis == 0 else (before.left, before.width)
            spans.append(_around(first, first + length, length + 2 * _GROWTH, count))
            lost = min(before.lost + everywhere, _LONG_LOST)
    (top, height), (left, width) = spans
    if height * width > _MOST * grid[0] * grid[1]:
        return replace(whole(grid), lost=lost)
    return Window(top, left, height, width)


def _cells(mask: Tensor) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """First and end row and column of the cells that a mask fills to `_LEAST_SHARE` at least."""
    spans = bounds(mask)
    if spans is None:
        return None
    tops = [span.start // STRIDE for span in spans]
    ends = [-(-span.stop // STRIDE) for span in spans]
    # Only the part with pixels is counted: an object mostly fills a small part of the frame.
    part = mask[tops[0] * STRIDE : ends[0] * STRIDE, tops[1] * STRIDE : ends[1] * STRIDE]
    full = bounds(F.avg_pool2d(part.float()[None, None], STRIDE)[0, 0] >= _LEAST_SHARE)
    if full is None:
        return None
    rows, columns = ((top + span.start, top + span.stop) for top, span in zip(tops, full, strict=True))
    return rows, columns


def looked_for(windows: Mapping[int, Window], object_ids: Sequence[int], time: int) -> list[int]:
    """Positions in `object_ids` of the objects to search on a frame: all except lost ones that are skipped.

    Which lost objects are skipped depends on `time` and their ids, which spreads their searches over frames.
    """
    lost = [windows[i].lost if i in windows else 0 for i in object_ids]
    every = [1 if n == 0 else _REST if n < _LONG_LOST else _LONG_REST for n in lost]
    return [k for k, i in enumerate(object_ids) if (time + i) % every[k] == 0]


def _around(first: int, end: int, size: int, cells: int) -> tuple[int, int]:
    """Start and length of a span of `size`, rounded up, centred on first..end and inside 0..cells."""
    size = min(cells, -(-size // _STEP) * _STEP)
    return min(max((first + end - size) // 2, 0), cells - size), size


def inside(window: Window, grid: tuple[int, int]) -> Tensor:
    """Cells in the window, (h, w) bool."""
    cells = torch.zeros(grid, dtype=torch.bool)
    window.cut(cells).fill_(True)
    return cells


def covered(windows: Iterable[Window], grid: tuple[int, int]) -> Tensor:
    """Cells in any of the windows, as sorted indices into the flattened grid."""
    cells = torch.zeros(grid, dtype=torch.bool)
    for window in windows:
        window.cut(cells).fill_(True)
    return cells.flatten().nonzero().flatten()


def union(windows: Iterable[Window]) -> Window:
    """The smallest window around all windows; one of no cells if there are none."""
    spans = [(w.top, w.left, w.top + w.height, w.left + w.width) for w in windows]
    if not spans:
        return Window(0, 0, 0, 0)
    tops, lefts, bottoms, rights = zip(*spans, strict=True)
    top, left = min(tops), min(lefts)
    return Window(top, left, max(bottoms) - top, max(rights) - left)


def aggregated_within(probabilities: Tensor, window: Window) -> Tensor:
    """Probabilities after soft aggregation, of independent ones that are 0 outside a window.

    Args:
        probabilities: (O, H, W)
        window: the only part that is computed; in the rest all pixels are alike.

    Returns:
        (O + 1, H, W), background first.
    """
    count, height, width = probabilities.shape
    nothing = probabilities.new_zeros(1, count, 1, 1)
    final = torch.softmax(aggregate(nothing), 1)[0].expand(-1, height, width).contiguous()
    part, own = window.cut(probabilities, STRIDE), window.cut(final, STRIDE)
    if part.numel():
        rows = _ROWS if part.device.type == "cpu" else part.shape[1]
        for given, found in zip(part.split(rows, 1), own.split(rows, 1), strict=True):
            found.copy_(torch.softmax(aggregate(given.unsqueeze(0)), 1)[0])
    return final


def decode_in_windows(
    scales: tuple[Tensor, Tensor, Tensor],
    readout: Tensor,
    hidden: Tensor | None,
    windows: Mapping[int, Window],
    *,
    update_hidden: bool,
) -> Work[tuple[Tensor | None, Tensor]]:
    """`XMem.decode` for each object of a frame, restricted to the object's window.

    Args:
        scales: (f16, f8, f4) of the frame, (1, C, ...).
        readout: (O, C_v, h, w); values outside an object's window are ignored.
        hidden: (O, C_h, h, w), or None for a model without sensory memory.
        windows: windows of the objects to search, by position.
        update_hidden: also compute the next sensory memory.

    Returns:
        the next sensory memory, unchanged outside the windows, and probabilities (O, 16 h, 16 w), 0 outside.
    """
    count, _, h, w = readout.shape
    probabilities = readout.new_zeros((count, h * STRIDE, w * STRIDE))
    renewed = hidden.clone() if hidden is not None and update_hidden else hidden
    groups, calls = _of_one_size(windows), []
    for members in groups:
        looked = [windows[k] for k in members]
        # Each entry of the batch has one image and one object.
        features = [
            torch.cat([window.cut(f, scale) for window in looked]).contiguous(memory_format=_layout(f))
            for f, scale in zip(scales, (1, 2, 4), strict=True)
        ]
        own = torch.stack([windows[k].cut(readout[k]) for k in members]).unsqueeze(1)
        sensed = None
        if hidden is not None:
            sensed = torch.stack([windows[k].cut(hidden[k]) for k in members]).unsqueeze(1)
        f16, f8, f4 = features
        calls.append(Decode((f16, f8, f4), own, sensed, update_hidden))
    for members, (sensed, logits) in zip(groups, (yield calls) if calls else (), strict=True):
        found = torch.sigmoid(logits.float())
        for n, k in enumerate(members):
            windows[k].cut(probabilities[k], STRIDE).copy_(found[n, 0])
            if renewed is not None and sensed is not None and update_hidden:
                windows[k].cut(renewed[k]).copy_(sensed[n, 0])
    return renewed, probabilities


def _of_one_size(windows: Mapping[int, Window]) -> list[list[int]]:
    """Objects grouped by window size."""
    groups: dict[tuple[int, int], list[int]] = {}
    for k, window in windows.items():
        groups.setdefault(window.size, []).append(k)
    return list(groups.values())


def _layout(features: Tensor) -> torch.memory_format:
    nhwc = features.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if nhwc else torch.contiguous_format
