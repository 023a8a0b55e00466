"""Plugins that settings of tracking name, looked up before anything is started."""

from __future__ import annotations

from collections.abc import Iterable

from pipeline.detect.loading import load_detector
from pipeline.prompts.box_segmenters import require_box_segmenter
from pipeline.prompts.click_segmenters import load_click_segmenter
from pipeline.tracking.settings import TrackSettings
from pipeline.tracks.sinks import Sinks


def check_plugins(
    tracking: TrackSettings, detectors: Iterable[str] = (), click_segmenter: str | None = None
) -> None:
    """Load each plugin once, to check that it is installed on this machine.

    Args:
        tracking: settings that name a box segmenter, sinks and possibly a detector.
        detectors: names of further detectors, such as those that live streams may use.
        click_segmenter: name of what makes masks of clicks; None: the bundled one.

    Raises:
        UsageError: a plugin is not installed, or cannot be loaded.
    """
    require_box_segmenter(tracking.commit.box_segmenter)
    Sinks.load(tracking.commit.sinks)
    device, own = tracking.model.device, tracking.detector
    if own.name is not None:
        load_detector(own.name, device=device, classes=own.finder.classes)
    for name in detectors:
        load_detector(name, device=device)
    if click_segmenter is not None:
        load_click_segmenter(click_segmenter)
