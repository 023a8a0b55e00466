"""Assignments against all permutations."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from pipeline.detect.lifecycle.assignment import assignment


@pytest.mark.parametrize("seed", range(20))
def test_assignments_are_the_best_of_all(seed: int) -> None:
    generator = np.random.default_rng(seed)
    rows, columns = (int(n) for n in generator.integers(1, 6, 2))
    gain = generator.random((rows, columns)).round(1)
    wide = gain if rows <= columns else gain.T
    best = max(
        sum(wide[r, c] for r, c in enumerate(choice))
        for choice in itertools.permutations(range(wide.shape[1]), wide.shape[0])
    )
    pairs = assignment(gain)
    assert len({r for r, _ in pairs}) == len({c for _, c in pairs}) == min(rows, columns)
    assert sum(gain[r, c] for r, c in pairs) == pytest.approx(best)
