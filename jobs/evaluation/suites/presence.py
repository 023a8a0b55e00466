"""Calibration of presence scores: reliability, calibration error, and the fit.

A mask is *right* if its intersection over union with the truth is over 0.5. A score is calibrated if, of the
masks with a score of 0.8, eight in ten are right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RIGHT_IOU = 0.5
BINS = 10


@dataclass(frozen=True)
class Observations:
    """All masks of a model: one entry per object and frame with a mask.

    Attributes:
        features: (M, K) features, see `xmem_core.presence.FEATURES`; the first is the mean probability
            inside.
        scores: (M,) the calibrated score, 0 to 1; NaN if none was fitted to the weights.
        iou: (M,) intersection over union with the truth.
    """

    features: NDArray[np.float64]
    scores: NDArray[np.float64]
    iou: NDArray[np.float64]

    @property
    def right(self) -> NDArray[np.bool_]:
        """(M,) whether the mask is on its object."""
        return self.iou > RIGHT_IOU

    @staticmethod
    def joined(parts: Sequence[Observations]) -> Observations:
        """Concatenate observations; at least one."""
        return Observations(
            np.concatenate([p.features for p in parts]),
            np.concatenate([p.scores for p in parts]),
            np.concatenate([p.iou for p in parts]),
        )


@dataclass(frozen=True, slots=True)
class Bin:
    """Masks whose scores lie in [low, high) (1 counts for the last bin)."""

    low: float
    high: float
    masks: int
    score: float
    right: float
    iou: float


@dataclass(frozen=True, slots=True)
class Reliability:
    """A score compared with the truth.

    Attributes:
        error: expected calibration error, the mean distance of score and share of right masks over the bins.
        ranking: the probability that a right mask scores higher than a wrong one (area under the ROC curve);
            nan if all are right or all are wrong.
        brier: mean squared distance of score and truth.
    """

    bins: tuple[Bin, ...]
    error: float
    ranking: float
    brier: float


def reliability(scores: NDArray[np.float64], iou: NDArray[np.float64], bins: int = BINS) -> Reliability:
    """Bin (M,) scores from 0 to 1 against (M,) intersections over union."""
    right = iou > RIGHT_IOU
    place = np.minimum((scores * bins).astype(int), bins - 1)
    rows, error = [], 0.0
    for b in range(bins):
        own = place == b
        if own.any():
            score, share = float(scores[own].mean()), float(right[own].mean())
            rows.append(Bin(b / bins, (b + 1) / bins, int(own.sum()), score, share, float(iou[own].mean())))
            error += abs(score - share) * int(own.sum()) / len(scores)
    brier = float(((scores - right) ** 2).mean()) if len(scores) else float("nan")
    return Reliability(tuple(rows), error, ranking(scores, right), brier)


def ranking(scores: NDArray[np.float64], right: NDArray[np.bool_]) -> float:
    """Area under the ROC curve, ties counted half."""
    wins, losses = int(right.sum()), int((~right).sum())
    if not wins or not losses:
        return float("nan")
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]
    return float((ranks[right].sum() - wins * (wins + 1) / 2) / (wins * losses))


def fit(
    features: NDArray[np.float64], right: NDArray[np.bool_], ridge: float = 1.0
) -> tuple[NDArray[np.float64], float]:
    """Fit weights (K,) and intercept of a logistic regression of rightness, by Newton's method.

    Features are standardised for the fit, with `ridge` as penalty on the squared weights; the result is given
    for the unscaled features.
    """
    mean, spread = features.mean(axis=0), np.maximum(features.std(axis=0), 1e-9)
    design = np.column_stack([(features - mean) / spread, np.ones(len(features))])
    penalty = np.diag([ridge] * features.shape[1] + [1e-6])
    weights = np.zeros(design.shape[1])
    for _ in range(50):
        chance = 1 / (1 + np.exp(-np.clip(design @ weights, -30, 30)))
        gradient = design.T @ (chance - right) + penalty @ weights
        curvature = (design * (chance * (1 - chance))[:, None]).T @ design + penalty
        step = np.linalg.solve(curvature, gradient)
        weights -= step
        if np.abs(step).max() < 1e-8:
            break
    slopes = weights[:-1] / spread
    return slopes, float(weights[-1] - slopes @ mean)
