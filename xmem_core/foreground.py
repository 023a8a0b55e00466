"""Labels at the frame's size, computed on a CPU only where an object may be.

Most of a frame is background by far, and stays so when the network's probabilities are brought to the frame's
size: an interpolated probability lies between those around it. The rest is a small part of the frame, to
which bringing up probabilities and comparing them is limited.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xmem_core.bounds import contested


class Foreground(NamedTuple):
    """A part of a frame, outside of which every pixel is background.

    Attributes:
        rows, columns: the part, empty if all is background.
        labels: (h', w') int32: ids of the most probable objects in it; 0 for the background.
        probabilities: (h', w') float32: those of the labels.
    """

    rows: slice
    columns: slice
    labels: Tensor
    probabilities: Tensor


def foreground(planes: Tensor, frame_size: tuple[int, int], object_ids: Sequence[int]) -> Foreground:
    """Find the foreground of a frame on a CPU.

    Args:
        planes: (O + 1, h, w) float32 on the CPU, background first, summing to 1 at each pixel.
        frame_size: (H, W), to which the planes are brought bilinearly, as `F.interpolate` does it.
        object_ids: of the O objects.
    """
    nothing = torch.zeros(0, 0, dtype=torch.int32)
    spans = contested(planes[0])
    if spans is None:
        return Foreground(slice(0, 0), slice(0, 0), nothing, nothing.float())
    if tuple(planes.shape[1:]) == frame_size:
        rows, columns = spans
        parts = iter(planes[:, rows, columns])
    else:
        axes = [
            _Axis.of(size, wanted, span)
            for size, wanted, span in zip(planes.shape[1:], frame_size, spans, strict=True)
        ]
        rows, columns = (axis.span for axis in axes)
        # Each when it is needed: they take the same memory, and the system need not provide new one.
        parts = (torch.from_numpy(_interpolated(plane, *axes)) for plane in planes.numpy())
    best = next(parts).clone()
    labels = torch.zeros_like(best, dtype=torch.int32)
    # A reduction over the outermost dimension is many times slower than this loop over planes, which gives
    # the same result (in a tie, the first wins).
    for object_id, plane in zip(object_ids, parts, strict=True):
        labels.masked_fill_(plane > best, object_id)
        torch.maximum(best, plane, out=best)
    return Foreground(rows, columns, labels, best)


class _Axis(NamedTuple):
    """Linear interpolation of some positions along an axis.

    Attributes:
        span: the positions.
        first, second: indices of the two values that each is interpolated from.
        share: weight of the second.
    """

    span: slice
    first: NDArray[np.intp]
    second: NDArray[np.intp]
    share: NDArray[np.float32]

    @classmethod
    def of(cls, size: int, wanted: int, span: slice) -> _Axis:
        """The positions, of `wanted` ones over `size` values, that values of a span have a part in."""
        scale = np.float32(size) / np.float32(wanted)
        source = (np.arange(wanted, dtype=np.float32) + np.float32(0.5)) * scale - np.float32(0.5)
        source = np.maximum(source, np.float32(0))
        first = np.minimum(source.astype(np.intp), size - 1)
        second = np.minimum(first + 1, size - 1)
        touched = np.flatnonzero((second >= span.start) & (first < span.stop))
        own = slice(0, 0) if not touched.size else slice(int(touched[0]), int(touched[-1]) + 1)
        return cls(own, first[own], second[own], source[own] - first[own].astype(np.float32))


def _interpolated(plane: NDArray[np.float32], down: _Axis, across: _Axis) -> NDArray[np.float32]:
    """(h, w) -> (h', w') at the positions of two axes."""
    if not down.first.size or not across.first.size:
        return np.zeros((down.first.size, across.first.size), np.float32)
    top = int(down.first[0])
    needed = plane[top : int(down.second[-1]) + 1]
    # Without `mode` each index is checked once more: none lies outside.
    near = np.take(needed, across.first, axis=1, mode="wrap")
    near *= 1 - across.share
    far = np.take(needed, across.second, axis=1, mode="wrap")
    far *= across.share
    near += far
    out = np.take(near, down.first - top, axis=0)
    out *= (1 - down.share)[:, None]
    below = np.take(near, down.second - top, axis=0)
    below *= down.share[:, None]
    out += below
    return out
