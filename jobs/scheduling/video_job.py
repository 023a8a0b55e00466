"""One video of a batch: its stream and its priority."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipeline.base.errors import UsageError
from pipeline.distributed.messages import StreamSpec


@dataclass(frozen=True, slots=True)
class VideoJob:
    """One video of a batch.

    Args:
        spec: the stream.
        priority: share of the work relative to other videos; above 0.

    Raises:
        UsageError: the priority is not a finite number above 0.
    """

    spec: StreamSpec
    priority: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.priority < math.inf:
            raise UsageError(f"priority {self.priority!r} is not allowed: give a number above 0")
