"""Runs of equal labels of a frame, found where its planes are: on a GPU only they are copied to the host.

Rows need no more than the runs: areas, boxes, centroids and run lengths follow from where they begin and end,
scores from the sum of the probabilities in them. Sums are those of whole numbers, so that they are exact and
equal in any order of adding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xmem_core.transfer import off_device

# What a probability of 1 is as a whole number. Those of labels are over 2^-13, and have 24 bits.
_ONE = 2.0**36
# Runs that are copied without asking how many there are, 16 bytes each; ten people have about 3,000.
_USUAL = 8192


class LabelRuns(NamedTuple):
    """All runs of equal labels of a frame, in column order: pixel (x, y) has the position x * H + y.

    Attributes:
        labels: (R,) the label of each, 0 for the background.
        starts, ends: (R,) int64, positions; `ends` are exclusive.
        sums: (R,) float64, the sum of the labels' probabilities.
        presence: (O,) float32, see `StepResult.presence`; None without it.
    """

    labels: NDArray[np.int64]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    sums: NDArray[np.float64]
    presence: NDArray[np.float32] | None


def begin_runs(
    labels: Tensor, probabilities: Tensor, presence: Tensor | None, usual: int = _USUAL
) -> Callable[[], LabelRuns]:
    """Start finding the runs; nothing waits for the device.

    Args:
        labels: (H, W) int32
        probabilities: (H, W) float32, those of the labels.
        presence: (O,) float32, or None.
        usual: number of runs up to which a single copy suffices.

    Returns:
        what waits for the runs and gives them.
    """
    pixels = labels.numel()
    most = min(usual, pixels)
    waiting = off_device(_packed(labels, probabilities, presence, most))

    def found() -> LabelRuns:
        host = waiting().numpy()
        count = int(host[0])
        if count > most:
            return begin_runs(labels, probabilities, presence, count)()
        here = 0 if presence is None else len(presence)
        likely = None if presence is None else host[1 : 1 + here].view(np.float32)
        columns = host[1 + here :]
        starts = columns[:most][:count].astype(np.int64)
        own = columns[most : 2 * most][:count].astype(np.int64)
        before = columns[2 * most :].copy().view(np.int64)[: count + 1]
        sums = np.diff(before).astype(np.float64) / _ONE
        return LabelRuns(own, starts, np.append(starts[1:], pixels), sums, likely)

    return found


def _packed(labels: Tensor, probabilities: Tensor, presence: Tensor | None, most: int) -> Tensor:
    """Number of runs, presence, starts, labels, and sums of all before each start: int32, in one tensor."""
    device = labels.device
    down = labels.t().reshape(-1)
    changes = torch.cat([down.new_ones(1, dtype=torch.bool), down[1:] != down[:-1]])
    # The position at which the n-th run begins is the first with n changes up to it. Unlike `nonzero`, this
    # does not ask the device how many there are.
    upto = changes.cumsum(0, dtype=torch.int32)
    wanted = torch.arange(1, most + 2, dtype=torch.int32, device=device)
    starts = torch.searchsorted(upto, wanted, out_int32=True)  # beyond the last run: the number of pixels
    of_runs = down[starts[:most].clamp(max=len(down) - 1)]
    # A power of two: exact.
    whole = (probabilities.t().reshape(-1) * _ONE).to(torch.int64).cumsum(0)
    before = torch.cat([whole.new_zeros(1), whole])[starts]
    parts = [upto[-1:], starts[:most], of_runs, before.view(torch.int32)]
    if presence is not None:
        parts.insert(1, presence.float().view(torch.int32))
    return torch.cat(parts)
