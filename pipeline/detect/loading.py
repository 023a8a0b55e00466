"""Loads detectors by name: the built-in ones and those of plugins."""

from __future__ import annotations

from pipeline.base.plugins import load_plugin
from pipeline.detect.protocol import ENTRY_POINT_GROUP, Detector


def load_detector(name: str = "motion") -> Detector:
    """Create a detector by name: built in, or an entry point of the group `xmem.detectors`.

    The entry point is a class or function that returns a detector when called without arguments. It is
    called once per stream.

    Raises:
        UsageError: no such detector is installed, it cannot be loaded, or it is not a detector.
    """
    if name == "motion":
        from pipeline.detect.motion import MotionDetector

        return MotionDetector()
    detector: Detector = load_plugin(
        name,
        group=ENTRY_POINT_GROUP,
        kind="detector",
        protocol=Detector,
        lacking="lacks one of the methods detect(frame), to_bytes() and from_bytes(blob)",
        built_in=["motion"],
    )
    return detector
