"""Search windows: where on a frame an object is looked for, in cells of stride 16."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xmem_core.network import XMem

STRIDE = 16
"""Pixels of a cell: a position of keys, values and sensory memory."""

# Around the object at least so many cells, or so much of its own extent, whatever is more.
_LEAST_MARGIN = 4
_MARGIN = 0.5
# Sides are multiples of it, so that many objects' windows have one size and are decoded together.
_STEP = 2
# Cells by which the window of an object that is out of sight grows per frame on each side.
_GROWTH = 1
# To search the whole frame for an object costs as much as five in windows. One that was not found there is
# looked for on every third frame only, until it is seen again; after a second or so, on every sixth.
_REST = 3
_LONG_LOST = 30
_LONG_REST = 6
# A cell counts where so much of it may be the object: a single pixel must not widen the window. Larger parts
# must: with 1/24, or with only the largest part counting, tracking is faster where an object leaks, but loses
# 4 and 9 points of J&F on a clip of thin parts and on one of an object that gaps divide.
_LEAST_PROBABILITY = 0.2
_LEAST_SHARE = 1 / 64
# A window of more than this share of the frame saves nothing.
_MOST = 0.75


@dataclass(frozen=True)
class Window:
    """A rectangle of cells.

    Args:
        top, left: its first row and column.
        height, width: rows and columns.
        lost: for how many frames the object has been nowhere on the whole frame, or rested; more than 30 are
            30.
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
        """For `from_json`."""
        return [int(v) for v in astuple(self)]

    @classmethod
    def from_json(cls, values: Any) -> Window:
        """What `to_json` made."""
        return cls(*(int(v) for v in values))


def whole(grid: tuple[int, int]) -> Window:
    """The window of a whole frame of h x w cells."""
    return Window(0, 0, *grid)


def next_window(probability: Tensor, before: Window, least: int) -> Window:
    """Where to look for an object on the next frame.

    Around what may be seen of it; for an object out of sight the window grows, frame by frame, until it is
    the whole frame, and the object counts as lost where it is not found there either.

    Args:
        probability: (H, W), the object's at the size the network sees, padded to the stride.
        before: where it was looked for on this frame.
        least: cells that each side has at least, where the frame has as many.
    """
    grid = probability.shape[0] // STRIDE, probability.shape[1] // STRIDE
    everywhere = before.size == grid
    may_be = (probability > _LEAST_PROBABILITY).float()
    cells = F.avg_pool2d(may_be[None, None], STRIDE)[0, 0] >= _LEAST_SHARE
    spans, lost = [], 0
    for axis, count in enumerate(grid):
        seen = cells.any(1 - axis).nonzero().flatten().tolist()
        if seen:
            first, end = seen[0], seen[-1] + 1
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


def looked_for(windows: Mapping[int, Window], object_ids: Sequence[int], time: int) -> list[int]:
    """Positions in `object_ids` of those to look for on a frame: all but the lost ones that rest on it.

    Which ones rest follows from `time` and their ids, so that several lost objects share the work out.
    """
    lost = [windows[i].lost if i in windows else 0 for i in object_ids]
    every = [1 if n == 0 else _REST if n < _LONG_LOST else _LONG_REST for n in lost]
    return [k for k, i in enumerate(object_ids) if (time + i) % every[k] == 0]


def _around(first: int, end: int, size: int, cells: int) -> tuple[int, int]:
    """Start and length of a span of `size`, rounded up, with first..end in its middle, inside 0..cells."""
    size = min(cells, -(-size // _STEP) * _STEP)
    return min(max((first + end - size) // 2, 0), cells - size), size


def covered(windows: Iterable[Window], grid: tuple[int, int]) -> Tensor:
    """The cells that lie in any of the windows, as sorted indices into the flattened grid."""
    inside = torch.zeros(grid, dtype=torch.bool)
    for window in windows:
        window.cut(inside).fill_(True)
    return inside.flatten().nonzero().flatten()


def decode_in_windows(
    network: XMem,
    scales: tuple[Tensor, Tensor, Tensor],
    readout: Tensor,
    hidden: Tensor | None,
    windows: Mapping[int, Window],
    *,
    update_hidden: bool,
) -> tuple[Tensor | None, Tensor]:
    """`XMem.decode` of each of a frame's objects as if its window were the image.

    Args:
        network: the model.
        scales: (f16, f8, f4) of the frame, (1, C, ...).
        readout: (O, C_v, h, w); what lies outside an object's window is not looked at.
        hidden: (O, C_h, h, w), or None for a model without sensory memory.
        windows: by position, of the objects to look for.
        update_hidden: also compute the next sensory memory.

    Returns:
        the next sensory memory, outside the windows as it was; and probabilities (O, 16 h, 16 w), outside 0.
    """
    count, _, h, w = readout.shape
    probabilities = readout.new_zeros((count, h * STRIDE, w * STRIDE))
    renewed = hidden.clone() if hidden is not None and update_hidden else hidden
    for members in _of_one_size(windows):
        looked = [windows[k] for k in members]
        # One image and one object in each entry of the batch.
        features = [
            torch.cat([window.cut(f, scale) for window in looked]).contiguous(memory_format=_layout(f))
            for f, scale in zip(scales, (1, 2, 4), strict=True)
        ]
        own = torch.stack([windows[k].cut(readout[k]) for k in members]).unsqueeze(1)
        sensed = None
        if hidden is not None:
            sensed = torch.stack([windows[k].cut(hidden[k]) for k in members]).unsqueeze(1)
        f16, f8, f4 = features
        sensed, logits = network.decode((f16, f8, f4), own, sensed, update_hidden=update_hidden)
        found = torch.sigmoid(logits.float())
        for n, k in enumerate(members):
            windows[k].cut(probabilities[k], STRIDE).copy_(found[n, 0])
            if renewed is not None and sensed is not None and update_hidden:
                windows[k].cut(renewed[k]).copy_(sensed[n, 0])
    return renewed, probabilities


def _of_one_size(windows: Mapping[int, Window]) -> list[list[int]]:
    """Which objects have windows of one size."""
    groups: dict[tuple[int, int], list[int]] = {}
    for k, window in windows.items():
        groups.setdefault(window.size, []).append(k)
    return list(groups.values())


def _layout(features: Tensor) -> torch.memory_format:
    nhwc = features.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if nhwc else torch.contiguous_format
