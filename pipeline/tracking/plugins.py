"""Plugins that settings of tracking name, looked up before anything is started."""

from __future__ import annotations

from collections.abc import Iterable

from pipeline.detect.loading import load_detector
from pipeline.prompts.box_segmenters import load_box_segmenter
from pipeline.tracking.settings import TrackSettings
from pipeline.tracks.sinks import Sinks


def check_plugins(tracking: TrackSettings, detectors: Iterable[str] = ()) -> None:
    """Load each plugin once, on a machine that is going to track with it.

    Args:
        tracking: names a box segmenter, sinks and maybe a detector.
        detectors: further detectors, such as those that live streams may name.

    Raises:
        UsageError: there is none of that name here, or it cannot be loaded.
    """
    load_box_segmenter(tracking.commit.box_segmenter)
    Sinks.load(tracking.commit.sinks)
    own = () if tracking.detector.name is None else (tracking.detector.name,)
    for name in (*own, *detectors):
        load_detector(name)
