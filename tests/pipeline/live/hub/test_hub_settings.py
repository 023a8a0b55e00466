"""Effect of a hub's settings on its streams."""

from __future__ import annotations

from support.small_net import SMALL_MEMORY, small_model

from pipeline.detect.settings import FinderSettings
from pipeline.live.camera.options import LiveOptions
from pipeline.live.hub.settings import HubSettings
from pipeline.live.spec import LiveSettings, LiveSpec
from pipeline.tracking.settings import DetectorSettings, TrackSettings
from xmem_core import VideoSegmenter


def test_a_stream_chooses_how_its_camera_is_read() -> None:
    hub = HubSettings("out", options=LiveOptions(transport="tcp", stall_seconds=7))
    newest = hub.source_options(LiveSettings(transport="udp", queue_frames=3, max_lag_seconds=0.5))
    assert (newest.transport, newest.queue_frames, newest.max_age_seconds) == ("udp", 3, 0.5)
    assert newest.stall_seconds == 7
    assert hub.source_options(LiveSettings(policy="every")).max_age_seconds is None
    assert hub.options.transport == "tcp"


def test_the_record_names_the_segmenter_that_tracks() -> None:
    segmenter = VideoSegmenter(small_model(), SMALL_MEMORY, size=96)
    spec = LiveSpec(
        "cam",
        "fake://cam",
        detector="motion",
        settings=LiveSettings(finder=FinderSettings(every=9, max_objects=3), box_segmenter="grabcut"),
    )
    settings = HubSettings(
        "out", tracking=TrackSettings.of(model="xmem", threads=2, size=480)
    ).track_settings(spec, segmenter)
    assert (settings.model.name, settings.model.threads, settings.model.size) == ("xmem", 2, 96)
    assert settings.model_fingerprint == segmenter.fingerprint
    assert settings.detector == DetectorSettings("motion", FinderSettings(every=9, max_objects=3))
    assert settings.commit.box_segmenter == "grabcut"
