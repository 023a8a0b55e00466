"""LiveFeed: the source protocol of live streams, and its part of the stream record."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any, Protocol

from pipeline.base.records import Event, Frame
from pipeline.live.camera.ledger import Ledger
from pipeline.live.spec import LiveSpec
from pipeline.prompts.resolving import PromptSet
from pipeline.tracking.settings import TrackSettings


class LiveFeed(Protocol):
    """The source of a `LiveTracker`, such as `pipeline.live.camera.source.LiveSource`."""

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
"""Creates the source of a stream, which counts frames in the given ledger."""


def live_facts(spec: LiveSpec, settings: TrackSettings, uri: str, feed: LiveFeed | None) -> dict[str, Any]:
    """Source and settings for a live stream's record, in the same fields as the records of files.

    Args:
        uri: URI of the source, without credentials.
        feed: the source; None before it is open.
    """
    return {
        "source": uri,
        "width": 0 if feed is None else feed.width,
        "height": 0 if feed is None else feed.height,
        "rate": None if feed is None else feed.rate,
        "codec": "" if feed is None else feed.codec,
        "container": "" if feed is None else feed.container,
        "model": settings.model.name,
        "settings": settings.to_dict(),
        "prompts": PromptSet().to_record(),
        "resolved_prompts": {},
        "live_settings": spec.settings.to_dict(),
    }
