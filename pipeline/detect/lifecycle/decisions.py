"""Decisions of a detector run: objects to start, to correct and to remove."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class NewObject:
    """An object to start or to correct on the current frame.

    Args:
        object_id: id that is new to the stream, or that of an object that was started here before.
        mask: H x W bool, without the pixels of other objects.
        category, score: values from the detector.
        reason: detector (a new object), found_again or drifted.
    """

    object_id: int
    mask: NDArray[np.bool_]
    category: str | None
    score: float
    reason: str = "detector"


@dataclass(frozen=True)
class Decisions:
    """What is to be done on a frame before it is tracked: first the removals, then the masks.

    Args:
        gone: ids of the objects not to be tracked any more, and why: out_of_sight or unconfirmed.
        masks: objects to start or to correct.
    """

    gone: dict[int, str] = field(default_factory=dict)
    masks: list[NewObject] = field(default_factory=list)
