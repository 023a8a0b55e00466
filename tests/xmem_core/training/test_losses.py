from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xmem_core.training.losses import bootstrapped_cross_entropy, dice_loss, hardest_fraction, mean_iou


def plain_cross_entropy(logits: np.ndarray, labels: np.ndarray, fraction: float) -> float:
    """Pixel by pixel: -log softmax of the true class; the hardest of each image; the mean over images."""
    means = []
    for image, truth in zip(logits, labels, strict=True):
        losses = []
        for y in range(truth.shape[0]):
            for x in range(truth.shape[1]):
                values = image[:, y, x].astype(np.float64)
                losses.append(
                    np.log(np.exp(values - values.max()).sum()) + values.max() - values[truth[y, x]]
                )
        losses.sort(reverse=True)
        means.append(np.mean(losses[: max(1, int(len(losses) * fraction))]))
    return float(np.mean(means))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 3), st.sampled_from([1.0, 0.5, 0.2, 0.01]))
def test_cross_entropy_equals_the_plain_one(seed: int, objects: int, fraction: float) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 4, (3, objects + 1, 7, 9)).astype(np.float32)
    labels = rng.integers(0, objects + 1, (3, 7, 9))
    ours = bootstrapped_cross_entropy(torch.from_numpy(logits), torch.from_numpy(labels), fraction)
    assert float(ours) == pytest.approx(plain_cross_entropy(logits, labels, fraction), rel=1e-5)


def test_only_the_hardest_pixels_get_a_gradient() -> None:
    logits = torch.zeros(1, 2, 1, 4)
    logits[0, 0, 0] = torch.tensor([5.0, 4.0, -3.0, -6.0])
    logits.requires_grad_()
    bootstrapped_cross_entropy(logits, torch.zeros(1, 1, 4, dtype=torch.long), 0.5).backward()
    assert logits.grad is not None
    assert (logits.grad[0, 0, 0] != 0).tolist() == [False, False, True, True]


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.5])
def test_a_fraction_out_of_range_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match="fraction is"):
        bootstrapped_cross_entropy(torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, dtype=torch.long), fraction)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 4))
def test_dice_equals_the_plain_one(seed: int, objects: int) -> None:
    rng = np.random.default_rng(seed)
    p = rng.random((3, objects, 6, 5)).astype(np.float32)
    labels = rng.integers(0, objects + 1, (3, 6, 5))
    present = rng.random((3, objects)) < 0.6
    present[0, 0] = True
    terms = []
    for b in range(3):
        for o in range(objects):
            if present[b, o]:
                truth = labels[b] == o + 1
                terms.append(1 - (2 * p[b, o][truth].sum() + 1) / (p[b, o].sum() + truth.sum() + 1))
    ours = dice_loss(torch.from_numpy(p), torch.from_numpy(labels), torch.from_numpy(present).float())
    assert float(ours) == pytest.approx(np.mean(terms), rel=1e-5)


def test_dice_of_a_perfect_and_of_an_empty_answer() -> None:
    labels = torch.zeros(1, 10, 10, dtype=torch.long)
    labels[0, :5] = 1
    perfect = (labels == 1).float()[:, None]
    here = torch.ones(1, 1)
    assert float(dice_loss(perfect, labels, here)) == pytest.approx(0.0, abs=1e-6)
    assert float(dice_loss(torch.zeros(1, 1, 10, 10), labels, here)) == pytest.approx(1 - 1 / 51)
    # Nothing there and nothing painted is right; nobody present is no loss.
    nothing = torch.zeros_like(labels)
    assert float(dice_loss(torch.zeros(1, 1, 10, 10), nothing, here)) == pytest.approx(0.0)
    assert float(dice_loss(perfect, nothing, torch.zeros(1, 1))) == 0.0


def test_hardest_fraction_falls_from_all_to_the_last() -> None:
    values = [hardest_fraction(s, 100, 300, 0.2) for s in (0, 100, 200, 300, 900)]
    assert values == pytest.approx([1.0, 1.0, 0.6, 0.2, 0.2])


def test_mean_iou_counts_pixels() -> None:
    predicted = torch.tensor([[1, 1, 0, 2]])
    labels = torch.tensor([[1, 0, 0, 2]])
    assert mean_iou(predicted, labels, 2) == pytest.approx((0.5 + 1.0) / 2)
    assert mean_iou(predicted, labels, 3) == pytest.approx((0.5 + 1.0 + 1.0) / 3)
    assert mean_iou(predicted, torch.zeros_like(labels), 1) == 0.0
