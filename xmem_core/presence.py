"""How sure a tracker may be that an object's mask is on the object: a score that means a probability.

The mean probability inside a mask ranks masks well but is no such probability: of crowd masks that had 0.75,
three in ten were on their objects. How much it and other things that probabilities say count was fitted on
composed scenes (`jobs/suites/presence.py`), so that eight in ten of those that score 0.8 are right.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FEATURES = ("mean", "peak", "solid", "sure", "size", "rival")
"""Of an object's mask, the pixels where it is the most probable:

mean: mean probability inside; peak: the largest; solid: share of the object's probability that lies inside;
sure: share of the pixels inside with over 0.9; size: log10 of the mask's share of the picture, plus 2;
rival: mean over the pixels inside of the most probable other object's probability.
"""


@dataclass(frozen=True, slots=True)
class PresenceConstants:
    """Weights of `FEATURES`, in their order, and the intercept; the score is the logistic of their sum."""

    weights: tuple[float, ...]
    intercept: float

    def __post_init__(self) -> None:
        if len(self.weights) != len(FEATURES):
            raise ValueError(f"{len(self.weights)} weights: need one for each of {', '.join(FEATURES)}")


XMEM_LITE = PresenceConstants(weights=(21.0557, 0.0, 0.0, 0.0, 1.62, 0.0), intercept=-16.8401)
"""For the bundled model: fitted to 2,665 masks of 28 scenes with people it was trained on.

How well it holds for other people is in the model card. To be fitted anew for new weights: `fit_presence` of
`jobs/suites/fitting.py`.
"""


def presence_features(probabilities: Tensor) -> Tensor:
    """(O, 6) float32: `FEATURES` of every object; zeros for one without a mask.

    `probabilities`: (O + 1, h, w), background first, at any size: the network's own is cheapest.
    """
    objects = probabilities[1:].flatten(1)
    if not len(objects):
        return probabilities.new_zeros(0, len(FEATURES))
    winner = probabilities.flatten(1).argmax(0)
    ids = torch.arange(1, len(objects) + 1, device=probabilities.device)
    inside = (winner[None] == ids[:, None]).to(objects.dtype)  # (O, h w)
    area = inside.sum(1)
    own = objects * inside
    total = own.sum(1)
    if len(objects) > 1:
        top = objects.topk(2, dim=0)
        # The best of the others: the second where it is the best itself, as it is inside its mask.
        rival = (inside * top.values[1][None]).sum(1)
    else:
        rival = torch.zeros_like(total)
    some = area.clamp(min=1)
    rows = torch.stack(
        [
            total / some,
            own.amax(1),
            total / objects.sum(1).clamp(min=1e-6),
            ((own > 0.9).to(objects.dtype)).sum(1) / some,
            torch.log10(some / objects.shape[1]) + 2,
            rival / some,
        ],
        dim=1,
    )
    return rows * (area > 0).to(rows.dtype)[:, None]


def presence_scores(probabilities: Tensor, constants: PresenceConstants = XMEM_LITE) -> Tensor:
    """(O,) float32, 0 to 1: how probably each object's mask is on it; 0 for one without a mask."""
    features = presence_features(probabilities)
    weights = features.new_tensor(constants.weights)
    score = torch.sigmoid(features @ weights + constants.intercept)
    return score * (features[:, 0] > 0)
