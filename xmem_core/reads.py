"""Attention of memory reads by frame: how much each remembered frame contributed to an object's mask."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from xmem_core.contents import Kind
from xmem_core.steps import Choice
from xmem_core.windows import STRIDE

_KINDS: tuple[Kind, ...] = ("long_term", "permanent", "copied", "working")
_OF_NO_FRAME = (0, 2)  # prototypes, and what was copied from another stream: each counts as one


@dataclass(frozen=True)
class ReadShare:
    """The part of what is read that comes from one remembered frame.

    Args:
        kind: region of the memory, see `xmem_core.contents.MemoryEntry`.
        time: time of the frame, as in `TrackerState.time`; None: all long-term prototypes together, or
            all that was copied from another stream.
        share: 0 to 1.
    """

    kind: Kind
    time: int | None
    share: float


def read_shares(choices: Mapping[int, Choice], cells: Tensor | None = None) -> dict[int, list[ReadShare]]:
    """Shares of the read weights by object, the largest first.

    Args:
        choices: what is read, see `ModelSteps.choices`.
        cells: (h * w,) importance of each position, such as the number of its pixels that are asked about;
            None: all positions count alike.

    Returns:
        by object the shares, which sum to 1. Empty where the object is not read: outside its search window,
        or while it is not searched for.
    """
    return {i: _shares(choice, cells) for i, choice in choices.items()}


def _shares(choice: Choice, cells: Tensor | None) -> list[ReadShare]:
    weights = choice.weights.double()
    if cells is not None:
        weights = weights * cells.to(weights)[choice.cells].unsqueeze(1)
    total = float(weights.sum())
    if total == 0:
        return []
    region, time = choice.memory.origin(choice.rows.flatten())
    time = torch.where(torch.isin(region, torch.tensor(_OF_NO_FRAME, device=region.device)), -1, time)
    pairs, place = torch.unique(torch.stack([region, time]), dim=1, return_inverse=True)
    sums = torch.bincount(place, weights.flatten(), minlength=pairs.shape[1]) / total
    found = [
        ReadShare(_KINDS[kind], None if kind in _OF_NO_FRAME else when, share)
        for (kind, when), share in zip(pairs.T.tolist(), sums.tolist(), strict=True)
        if share > 0
    ]
    return sorted(found, key=lambda share: -share.share)


def cells_of(mask: Tensor, size: tuple[int, int], left: int, top: int, grid: tuple[int, int]) -> Tensor:
    """Number of a mask's pixels in each position of the memory.

    Args:
        mask: (H, W) bool, of the frame.
        size: (height, width) of the network's input before padding.
        left, top: padding of the input, pixels.
        grid: (h, w), positions.

    Returns:
        (h * w,) float64.
    """
    ys, xs = mask.nonzero(as_tuple=True)
    stride_y, stride_x = mask.shape[0] / size[0], mask.shape[1] / size[1]
    rows = ((ys + 0.5) / stride_y + top).long().div(STRIDE, rounding_mode="floor").clamp(0, grid[0] - 1)
    columns = ((xs + 0.5) / stride_x + left).long().div(STRIDE, rounding_mode="floor").clamp(0, grid[1] - 1)
    return torch.bincount(rows * grid[1] + columns, minlength=grid[0] * grid[1]).double()
