"""Parts of a frame to which computations are restricted."""

from __future__ import annotations

import pytest
import torch

from xmem_core.bounds import above, bounds, contested


@pytest.mark.parametrize("corner", [(0, 0), (6, 8), (3, 0), (2, 5)])
def test_bounds_are_the_first_and_last_row_and_column(corner: tuple[int, int]) -> None:
    mask = torch.zeros(7, 9, dtype=torch.bool)
    mask[corner] = mask[3, 5] = True
    rows, columns = sorted((corner[0], 3)), sorted((corner[1], 5))
    assert bounds(mask) == (slice(rows[0], rows[1] + 1), slice(columns[0], columns[1] + 1))


def test_an_empty_mask_has_no_bounds() -> None:
    assert bounds(torch.zeros(4, 5, dtype=torch.bool)) is None


@pytest.mark.parametrize("objects", [1, 2, 5])
def test_outside_of_the_contested_part_the_background_wins(objects: int) -> None:
    generator = torch.Generator().manual_seed(objects)
    logits = torch.randn(objects + 1, 24, 32, generator=generator)
    logits[0] += 6
    logits[1:, 8:14, 10:22] += 6
    probabilities = torch.softmax(logits, 0)
    spans = contested(probabilities[0])
    assert spans is not None
    outside = torch.ones(24, 32, dtype=torch.bool)
    outside[spans] = False
    assert outside.sum() > 200
    assert not probabilities.argmax(0)[outside].any()


def test_a_clear_background_is_not_contested() -> None:
    assert contested(torch.full((4, 5), 0.9)) is None


def test_above_compares_as_torch_does() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(3, 40, 50, generator=generator)
    values[0, 0, 0] = values[1, 2, 3] = torch.tensor(0.2)
    for part in (values, values[1], values[:, 5:20, 7:9]):
        assert torch.equal(above(part, 0.2), part > 0.2)
