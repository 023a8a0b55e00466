"""LiveFeed: what a live stream needs of its source."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any, Protocol

from pipeline.ledger import Ledger
from pipeline.live_spec import LiveSpec
from pipeline.records import Event, Frame


class LiveFeed(Protocol):
    """What a LiveTracker needs of its source: `pipeline.rtsp.LiveSource`, or a test's own."""

    uri: str
    width: int
    height: int
    rate: float | None
    codec: str
    container: str
    ledger: Ledger
    trailing_losses: tuple[Event, ...]

    @property
    def closed(self) -> bool: ...

    def resume(
        self,
        start: int | None = None,
        previous_pts_seconds: float | None = None,
        previous_wall_time: datetime | None = None,
    ) -> None: ...

    def read(self, timeout: float | None = None) -> Frame | None: ...

    def status(self) -> Any: ...

    def close(self) -> None: ...


OpenFeed = Callable[[LiveSpec, Ledger], LiveFeed]
"""Makes the source of a stream, counting in the ledger that it gets."""
