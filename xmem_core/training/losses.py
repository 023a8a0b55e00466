"""Losses of mask prediction: bootstrapped cross-entropy and dice; and the agreement shown in the log."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def bootstrapped_cross_entropy(logits: Tensor, labels: Tensor, fraction: float) -> Tensor:
    """Mean cross-entropy over the hardest `fraction` of each image's pixels.

    Args:
        logits: (B, O + 1, H, W), background first.
        labels: (B, H, W) int64, 0..O.
        fraction: in (0, 1]; 1 is the plain mean.

    Returns:
        A scalar: the mean over images.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction is {fraction}: must be more than 0 and at most 1")
    loss = F.cross_entropy(logits.float(), labels, reduction="none").flatten(1)  # B, H*W
    if fraction < 1:
        loss = torch.topk(loss, max(1, int(loss.shape[1] * fraction)), dim=1, sorted=False).values
    return loss.mean()


def dice_loss(probabilities: Tensor, labels: Tensor, present: Tensor) -> Tensor:
    """1 - (2 sum(p g) + 1) / (sum p + sum g + 1), per object, averaged over the objects present.

    Args:
        probabilities: (B, O, H, W), objects only.
        labels: (B, H, W) int64, 0..O.
        present: (B, O), 1 for objects of the clip, else 0.

    Returns:
        A scalar; 0 if no object is present.
    """
    objects = torch.arange(1, probabilities.shape[1] + 1, device=labels.device)
    truth = (labels[:, None] == objects[None, :, None, None]).flatten(2).float()
    p = probabilities.float().flatten(2)
    dice = 1 - (2 * (p * truth).sum(2) + 1) / (p.sum(2) + truth.sum(2) + 1)  # B, O
    present = present.to(dice.dtype)
    return (dice * present).sum() / present.sum().clamp(min=1)


def hardest_fraction(step: int, start: int, end: int, last: float) -> float:
    """1 up to `start`, then linearly decreasing to `last` at `end`."""
    if step <= start:
        return 1.0
    if step >= end:
        return last
    return 1.0 - (1.0 - last) * (step - start) / (end - start)


@torch.no_grad()
def mean_iou(predicted: Tensor, labels: Tensor, objects: int) -> float:
    """Mean intersection over union of objects 1..objects on label images of any equal shape.

    An object in neither counts as 1.
    """
    total = 0.0
    for number in range(1, objects + 1):
        p, g = predicted == number, labels == number
        union = int((p | g).sum())
        total += int((p & g).sum()) / union if union else 1.0
    return total / objects
