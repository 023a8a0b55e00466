"""HubSettings: settings shared by all streams of one hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from pipeline.live.camera.options import LiveOptions
from pipeline.live.hub.brokers import BrokerSettings
from pipeline.live.hub.webhook import WebhookSettings
from pipeline.live.spec import LiveSettings, LiveSpec
from pipeline.tracking.settings import DetectorSettings, TrackSettings

if TYPE_CHECKING:
    from xmem_core import VideoSegmenter


@dataclass(frozen=True)
class HubSettings:
    """Settings shared by all streams of one hub.

    Args:
        out: the output folder, a path or any fsspec URI.
        hub: name of the hub; one process at a time may use it in one folder.
        tracking: model, memory and sinks of all streams. Detector and box segmenter are each stream's own,
            and so is how often it commits, see `LiveSettings`.
        options: how cameras are read; what streams choose themselves (`LiveSettings`) replaces it. Its guard
            says where they may come from.
        max_streams: that may be there at the same time.
        memory_bytes: device memory that may be used; None: most of the device's.
        load: share of the device's time that admitted frame rates may ask for.
        kept_records: recent mask records per stream.
        secrets: folder for URLs with credentials, see `pipeline.live.hub.registry`.
        first_backoff_seconds, most_backoff_seconds: between tries to open a stream that failed.
        webhook: where events of zones are pushed to; None: nowhere.
        brokers: Kafka topics and MQTT topics that they are pushed to; at most one of each kind.
        calibrate: measure a frame's time before the first stream is admitted.
    """

    out: str
    hub: str = "default"
    tracking: TrackSettings = field(default_factory=TrackSettings)
    options: LiveOptions = field(default_factory=LiveOptions)
    max_streams: int = 16
    memory_bytes: int | None = None
    load: float = 0.9
    kept_records: int = 2000
    secrets: str | None = None
    first_backoff_seconds: float = 1.0
    most_backoff_seconds: float = 60.0
    calibrate: bool = True
    webhook: WebhookSettings | None = None
    brokers: tuple[BrokerSettings, ...] = ()
    out_storage_options: Mapping[str, Any] | None = field(default=None, repr=False)

    def source_options(self, chosen: LiveSettings) -> LiveOptions:
        """How the camera of a stream with these settings is read."""
        return replace(
            self.options,
            policy=chosen.policy,
            transport=chosen.transport,
            queue_frames=chosen.queue_frames,
            max_age_seconds=chosen.max_lag_seconds if chosen.policy == "latest" else None,
        )

    def track_settings(self, spec: LiveSpec, segmenter: VideoSegmenter) -> TrackSettings:
        """What a stream's record says of how it is tracked, by the segmenter that tracks it."""
        asked = replace(
            self.tracking,
            model=replace(self.tracking.model, small_size=0),
            detector=DetectorSettings(spec.detector, spec.settings.finder),
            commit=replace(self.tracking.commit, box_segmenter=spec.settings.box_segmenter),
        )
        return asked.of_segmenter(segmenter, self.tracking.threads)
