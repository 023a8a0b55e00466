"""Presence score: calibrated probability that an object's mask is on the object.

The mean probability inside a mask ranks masks well but is not calibrated: of crowd masks with a mean of 0.75,
three in ten were on their objects. The presence score is a logistic regression on this and other features of
the probabilities, fitted on composed scenes (`jobs/evaluation/suites/presence.py`), so that eight in ten
masks with a score of 0.8 are right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from xmem_core.bounds import contested

if TYPE_CHECKING:
    from torch import Tensor

FEATURES = ("mean", "peak", "solid", "sure", "size", "rival")
"""Of an object's mask, the pixels where it is the most probable:

mean: mean probability inside; peak: the largest; solid: share of the object's probability that lies inside;
sure: share of the pixels inside with over 0.9; size: log10 of the mask's share of the picture, plus 2;
rival: mean over the pixels inside of the most probable other object's probability.
"""


@dataclass(frozen=True, slots=True)
class PresenceConstants:
    """Weights of `FEATURES`, in their order, and the intercept; the score is the logistic of their sum.

    They are specific to a network's weights and stored with them (`ModelConfig.presence`). `python -m
    jobs.evaluation.suites.fitting` fits them.
    """

    weights: tuple[float, ...]
    intercept: float

    def __post_init__(self) -> None:
        if len(self.weights) != len(FEATURES):
            raise ValueError(f"{len(self.weights)} weights: need one for each of {', '.join(FEATURES)}")

    @classmethod
    def from_list(cls, numbers: Sequence[float]) -> PresenceConstants:
        """Build from `to_list`'s output; ValueError unless it has the right number of finite values."""
        good = len(numbers) == len(FEATURES) + 1 and all(
            isinstance(n, int | float) and math.isfinite(n) for n in numbers
        )
        if not good:
            raise ValueError(
                f"presence={numbers!r} is not allowed: need a weight for each of {', '.join(FEATURES)}, "
                "then the intercept"
            )
        return cls(tuple(float(n) for n in numbers[:-1]), float(numbers[-1]))

    def to_list(self) -> list[float]:
        """The weights, then the intercept."""
        return [*self.weights, self.intercept]


def presence_features(probabilities: Tensor, names: Sequence[str] = FEATURES) -> Tensor:
    """(O, K) float32: the named ones of `FEATURES` of every object; zeros for one without a mask.

    `probabilities`: (O + 1, h, w), background first, at any size: the network's own is cheapest.
    """
    import torch  # lazily: settings need the constants only

    whole = probabilities[1:].flatten(1)
    if not len(whole):
        return probabilities.new_zeros(0, len(names))
    planes = probabilities
    if probabilities.device.type == "cpu":
        spans = contested(probabilities[0])
        if spans is None:
            return probabilities.new_zeros(len(whole), len(names))
        planes = probabilities[:, spans[0], spans[1]]
    # On a GPU the whole frame: to find the part with objects would wait for the device.
    planes = planes.flatten(1)
    objects = planes[1:]
    # Plane by plane: a reduction over the outermost dimension is many times slower on a CPU.
    best, winner = planes[0].clone(), torch.zeros_like(planes[0], dtype=torch.int32)
    for k, plane in enumerate(objects, 1):
        winner.masked_fill_(plane > best, k)
        torch.maximum(best, plane, out=best)
    own = torch.stack([plane * (winner == k) for k, plane in enumerate(objects, 1)])
    area = torch.stack([(winner == k).sum() for k in range(1, len(planes))])
    some = area.clamp(min=1)
    total = own.sum(1)

    def rival() -> Tensor:
        if len(objects) == 1:
            return torch.zeros_like(total)
        # The highest other probability: the second highest where the object itself has the highest.
        first, second = objects[0].clone(), torch.zeros_like(objects[0])
        for plane in objects[1:]:
            torch.maximum(second, torch.minimum(first, plane), out=second)
            torch.maximum(first, plane, out=first)
        if second.device.type == "cpu":
            sums = [second[winner == k].sum() for k in range(1, len(planes))]
        else:
            sums = [(second * (winner == k)).sum() for k in range(1, len(planes))]
        return torch.stack(sums) / some

    of = {
        "mean": lambda: total / some,
        "peak": lambda: own.amax(1),
        "solid": lambda: total / whole.sum(1).clamp(min=1e-6),
        "sure": lambda: (own > 0.9).sum(1) / some,
        "size": lambda: torch.log10(some / whole.shape[1]) + 2,
        "rival": rival,
    }
    rows = torch.stack([of[name]() for name in names], dim=1)
    return rows * (area > 0).to(rows.dtype)[:, None]


def presence_scores(probabilities: Tensor, constants: PresenceConstants) -> Tensor:
    """(O,) float32, 0 to 1: probability that each object's mask is on the object; 0 without a mask."""
    import torch

    from xmem_core.transfer import on_device

    weighed = {"mean": 0.0} | {n: w for n, w in zip(FEATURES, constants.weights, strict=True) if w}
    features = presence_features(probabilities, tuple(weighed))
    weights = on_device(torch.tensor(tuple(weighed.values()), dtype=features.dtype), features.device)
    score = torch.sigmoid(features @ weights + constants.intercept)
    return score * (features[:, 0] > 0)
