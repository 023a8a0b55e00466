"""Loads detectors by name: the built-in ones and those of plugins."""

from __future__ import annotations

from pipeline.base.errors import UsageError
from pipeline.base.plugins import load_plugin
from pipeline.detect.protocol import ENTRY_POINT_GROUP, Detector, categories_of
from pipeline.detect.settings import FinderSettings

_BUILT_IN = ["motion", "people", "file:PATH", "onnx:FILE"]


def load_detector(name: str = "motion", *, device: str = "cpu", classes: str | None = None) -> Detector:
    """Create a detector by name: built in, or an entry point of the group `xmem.detectors`.

    `file:PATH` replays the detections of a file, see `pipeline.detect.file_detector`; `onnx:FILE` runs an
    exported network, see `pipeline.detect.onnx_detector`. An entry point is a class or function that returns
    a detector when called without arguments. It is called once per stream.

    Args:
        device: device of detectors with a network: cpu, cuda, cuda:1, ...
        classes: classes that are wanted of it, see `FinderSettings.classes`.

    Raises:
        UsageError: no such detector is installed, it cannot be loaded, it is not a detector, or it does not
            have one of the classes.
    """
    detector = _loaded(name, device)
    wanted = FinderSettings(classes=classes).wanted
    known = categories_of(detector)
    if wanted is not None and known is not None and (missing := sorted(wanted - set(known))):
        have = f"its classes are {', '.join(known)}" if known else "its detections have no class"
        raise UsageError(f"detector {name!r} has no class {missing[0]!r}: {have}")
    return detector


def _loaded(name: str, device: str) -> Detector:
    kind, colon, argument = name.partition(":")
    if colon and kind == "file":
        if not argument:
            raise UsageError(f"detector {name!r} names no file: give file:PATH, such as file:det.txt")
        from pipeline.detect.file_detector import FileDetector

        return FileDetector(argument)
    if colon and kind == "onnx":
        if not argument:
            raise UsageError(f"detector {name!r} names no file: give onnx:FILE, such as onnx:yolo11n.onnx")
        from pipeline.detect.onnx_detector import OnnxDetector

        return OnnxDetector(argument, device)
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
