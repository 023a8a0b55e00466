"""Loads detectors by name: the built-in ones and those of plugins."""

from __future__ import annotations

from pipeline.base.errors import UsageError
from pipeline.base.plugins import load_plugin
from pipeline.detect.protocol import ENTRY_POINT_GROUP, Detector

_BUILT_IN = ["motion", "people", "file:PATH"]


def load_detector(name: str = "motion") -> Detector:
    """Create a detector by name: built in, or an entry point of the group `xmem.detectors`.

    `file:PATH` replays the detections of a file, see `pipeline.detect.file_detector`. An entry point is a
    class or function that returns a detector when called without arguments. It is called once per stream.

    Raises:
        UsageError: no such detector is installed, it cannot be loaded, or it is not a detector.
    """
    kind, colon, argument = name.partition(":")
    if colon and kind == "file":
        if not argument:
            raise UsageError(f"detector {name!r} names no file: give file:PATH, such as file:det.txt")
        from pipeline.detect.file_detector import FileDetector

        return FileDetector(argument)
    if name == "people":
        from pipeline.detect.people import PeopleDetector

        return PeopleDetector()
    if name == "motion":
        from pipeline.detect.motion import MotionDetector

        return MotionDetector()
    detector: Detector = load_plugin(
        name,
        group=ENTRY_POINT_GROUP,
        kind="detector",
        protocol=Detector,
        lacking="lacks one of the methods detect(frame), to_bytes() and from_bytes(blob)",
        built_in=_BUILT_IN,
    )
    return detector
