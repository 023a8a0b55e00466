"""A camera that shows given pictures with their own timestamps, as far as the test allows. No threads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import numpy as np
from numpy.typing import NDArray

from pipeline.base.records import Event, Frame
from pipeline.live.camera.ledger import Ledger
from pipeline.live.spec import LiveSpec

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass
class ScriptedStatus:
    state: str = "streaming"
    lag_seconds: float | None = 0.0
    failure: str | None = None


class ScriptedFeed:
    """Shows `picture(frame_index)` at 10 frames a second of its own time.

    Attributes:
        allowed: frames below this number may be read; then no more arrive.
        trailing_losses: set by the test.
    """

    codec, container = "none", "scripted"
    rate: float | None = 10.0
    closed = False

    def __init__(self, spec: LiveSpec, ledger: Ledger, picture: Callable[[int], NDArray[np.uint8]]) -> None:
        self.uri, self.ledger, self._picture = spec.shown_url, ledger, picture
        self.height, self.width = picture(0).shape[:2]
        self.allowed = self._next = 0
        self.losses: dict[int, tuple[Event, ...]] = {}
        self.trailing_losses: tuple[Event, ...] = ()

    def resume(
        self,
        start: int | None = None,
        previous_pts_seconds: float | None = None,
        previous_wall_time: datetime | None = None,
    ) -> None:
        self._next = start or 0

    def read(self, timeout: float | None = None) -> Frame | None:
        if self._next >= self.allowed:
            return None
        index, self._next = self._next, self._next + 1
        self.ledger.received()
        wall = BEGIN + timedelta(seconds=index / 10)
        return Frame(self._picture(index), index, index / 10, wall, self.losses.get(index, ()))

    def status(self) -> ScriptedStatus:
        return ScriptedStatus()

    def close(self) -> None:
        self.closed = True
