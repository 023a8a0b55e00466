"""Bounding regions of the pixels for which a computation is needed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

# No object exceeds a background with more than this, although probabilities sum to 1 only up to rounding.
_MAJORITY = 0.51


def above(values: Tensor, limit: float) -> Tensor:
    """Where float32 values, of any shape, exceed a limit: bool, of that shape."""
    if values.device.type != "cpu":
        return values > limit
    import torch  # lazily: settings import this module

    # numpy compares ten times faster than torch.
    return torch.from_numpy(values.numpy() > limit)


def bounds(mask: Tensor) -> tuple[slice, slice] | None:
    """The rows and columns in which the set pixels of a mask, (H, W) bool, lie; None for an empty mask."""
    spans = []
    for axis in (1, 0):
        # numpy reduces bool arrays many times faster than torch.
        seen = mask.numpy().any(axis) if mask.device.type == "cpu" else mask.any(axis).cpu().numpy()
        places = np.flatnonzero(seen)
        if not places.size:
            return None
        spans.append(slice(int(places[0]), int(places[-1]) + 1))
    return spans[0], spans[1]


def contested(background: Tensor) -> tuple[slice, slice] | None:
    """The part outside of which the background is the most probable label; None if it is everywhere.

    Args:
        background: (H, W), its probability, where those of the background and all objects sum to 1.
    """
    return bounds(~above(background, _MAJORITY))
