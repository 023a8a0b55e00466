"""Random shapes with the edge cases of mask code: at the border, with holes, in pieces, empty, full."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def random_label_map(rng: np.random.Generator, height: int, width: int, ids: list[int]) -> NDArray[np.int32]:
    """H x W label map of ellipses and speckle; some ids may end up hidden."""
    labels = np.zeros((height, width), np.int32)
    ys, xs = np.mgrid[:height, :width]
    for object_id in ids:
        cy, cx = rng.uniform(-2, height + 2), rng.uniform(-2, width + 2)
        ry, rx = rng.uniform(0.3, height / 2 + 1), rng.uniform(0.3, width / 2 + 1)
        labels[((ys - cy) / ry) ** 2 + ((xs - cx) / rx) ** 2 <= 1] = object_id
    speckle = rng.random((height, width)) < rng.choice([0.0, 0.02, 0.3])
    labels[speckle] = rng.choice([0, *ids], size=int(speckle.sum()))
    return labels


def random_mask(rng: np.random.Generator, height: int, width: int) -> NDArray[np.bool_]:
    """H x W mask; one in eight is empty, one in eight full."""
    kind = rng.integers(8)
    if kind == 0:
        return np.zeros((height, width), np.bool_)
    if kind == 1:
        return np.ones((height, width), np.bool_)
    return np.asarray(random_label_map(rng, height, width, [1]) == 1)
