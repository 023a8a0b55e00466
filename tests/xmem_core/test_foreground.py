"""Labels computed only where an object may be: as if they were computed everywhere."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from xmem_core import StepResult
from xmem_core.foreground import foreground


def blobs(places: list[tuple[int, int, int, int]], size: tuple[int, int], soft: int = 5) -> Tensor:
    """Probabilities (O + 1, h, w) of objects with soft edges, at (top, left, height, width)."""
    objects = torch.zeros(len(places), *size)
    for plane, (top, left, height, width) in zip(objects, places, strict=True):
        plane[top : top + height, left : left + width] = 0.97
    spread = F.avg_pool2d(objects[None], soft, 1, soft // 2)[0]
    logits = torch.logit(torch.cat([1 - spread.sum(0, keepdim=True), spread]).clamp(1e-4, 1 - 1e-4))
    return torch.softmax(logits, 0)


CASES = {
    "apart": ([(10, 12, 20, 9), (30, 70, 9, 30)], (72, 104)),
    "touching": ([(10, 12, 20, 9), (12, 20, 22, 30), (20, 10, 20, 20)], (72, 104)),
    "at the edges": ([(0, 0, 9, 9), (63, 95, 9, 9)], (72, 104)),
    "everywhere": ([(0, 0, 72, 104)], (72, 104)),
    "a few pixels": ([(33, 41, 4, 4)], (72, 104)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("scale", [1, 1.5, 2, 2.37, 0.7])
def test_labels_are_those_of_the_whole_frame(case: str, scale: float) -> None:
    planes = blobs(*CASES[case])
    size = round(72 * scale), round(104 * scale)
    ids = tuple(range(7, 6 + len(planes)))
    result = StepResult(ids, size, planes)
    best, index = result.probabilities.max(0)
    wanted = torch.tensor([0, *ids], dtype=torch.int32)[index]
    # Two labels may differ only where two objects are equally probable up to rounding.
    second = result.probabilities.topk(2, 0).values[1]
    assert bool(((result.label_map == wanted) | (best - second < 1e-5)).all())
    assert float((result.label_map != wanted).float().mean()) < 1e-3
    assert (result.label_map > 0).any()
    np.testing.assert_allclose(result.label_probabilities, best, atol=1e-5)
    assert result.label_map.dtype == torch.int32
    assert result.label_map.shape == result.label_probabilities.shape == size


def test_only_the_part_with_objects_is_computed() -> None:
    planes = blobs([(20, 30, 10, 8), (24, 50, 8, 8)], (72, 104))
    found = foreground(planes, (144, 208), (1, 2))
    assert found.labels.shape == found.probabilities.shape
    assert found.labels.shape == (
        found.rows.stop - found.rows.start,
        found.columns.stop - found.columns.start,
    )
    assert found.labels.numel() < 0.1 * 144 * 208
    whole = F.interpolate(planes[None], (144, 208), mode="bilinear")[0]
    outside = torch.ones(144, 208, dtype=torch.bool)
    outside[found.rows, found.columns] = False
    assert float(whole[0][outside].min()) > 0.5


def test_without_objects_there_is_no_part() -> None:
    planes = torch.zeros(3, 16, 24)
    planes[0] = 1
    result = StepResult((1, 2), (32, 48), planes)
    assert result.foreground.labels.numel() == 0
    assert not result.label_map.any()
    assert bool((result.label_probabilities == 1).all())


def test_a_result_at_the_networks_own_size_is_not_interpolated() -> None:
    planes = blobs([(10, 12, 20, 9)], (72, 104))
    found = foreground(planes, (72, 104), (3,))
    assert torch.equal(found.probabilities, planes[:, found.rows, found.columns].amax(0))


def test_the_planes_of_many_objects_are_not_held_at_the_frames_size() -> None:
    planes = blobs([(8 * i, 8 * i, 16, 20) for i in range(7)], (72, 104))
    foreground(planes, (720, 1040), range(1, 8))
    tracemalloc.start()
    try:
        found = foreground(planes, (720, 1040), range(1, 8))
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 5 * found.probabilities.numel() * 4  # of eight planes, and what computing them takes
    assert most > found.probabilities.numel() * 4  # so they are counted
