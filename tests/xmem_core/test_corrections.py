from __future__ import annotations

import pytest
import torch
from torch import Tensor

from xmem_core.corrections import contradicted


def box(top: int, left: int, height: int, width: int) -> Tensor:
    mask = torch.zeros(20, 30, dtype=torch.bool)
    mask[top : top + height, left : left + width] = True
    return mask


def planes(*masks: Tensor) -> Tensor:
    own = torch.stack(masks).float() * 0.9
    return torch.cat([(1 - own.sum(0, keepdim=True)).clamp(min=0.05), own])


SEVEN, NINE = box(0, 0, 10, 10), box(5, 20, 10, 8)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({3: box(12, 0, 4, 4)}, []),  # somewhere else
        ({3: box(0, 0, 10, 10)}, [7]),  # where 7 is
        ({3: box(0, 4, 10, 10)}, [7]),  # on six tenths of it
        ({3: box(0, 6, 10, 10)}, []),  # on four tenths
        ({3: box(0, 0, 20, 21)}, []),  # on all of it, but 7 is less than a quarter of what is given
        ({3: box(0, 0, 10, 10), 9: NINE}, [7]),
        ({9: SEVEN}, [7, 9]),  # 9 is where 7 was
        ({7: NINE, 9: SEVEN}, [7, 9]),  # they were swapped
        ({7: SEVEN, 9: NINE}, []),
        ({7: box(0, 0, 10, 12), 9: box(5, 22, 10, 8)}, []),  # corrected a little
        ({7: box(0, 0, 4, 10)}, [7]),  # most of what was shown of 7 is not 7
        ({3: box(0, 0, 10, 5), 4: box(0, 5, 10, 5)}, []),  # half on each
    ],
)
def test_who_was_on_something_else(given: dict[int, Tensor], expected: list[int]) -> None:
    assert contradicted(planes(SEVEN, NINE), (7, 9), given) == expected


def test_who_was_nowhere_was_not_wrong() -> None:
    nowhere = torch.zeros_like(SEVEN)
    assert contradicted(planes(nowhere, NINE), (7, 9), {3: SEVEN}) == []
    assert contradicted(planes(nowhere, NINE), (7, 9), {7: SEVEN}) == []
    assert contradicted(planes(SEVEN, NINE)[:1], (), {7: SEVEN}) == []
