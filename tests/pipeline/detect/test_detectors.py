"""Detections, look-up of detectors by name, and the conformance check for detectors."""

from __future__ import annotations

from importlib.metadata import EntryPoint, EntryPoints
from typing import Any

import numpy as np
import pytest

import pipeline.base.plugins as plugin_loader
import pipeline.detect.protocol as detectors
from pipeline.base.errors import UsageError
from pipeline.base.records import Frame
from pipeline.detect.loading import load_detector
from pipeline.detect.motion import MotionDetector
from pipeline.detect.protocol import Detection, Detector, Look, look_with
from pipeline.testing.detectors import check_detector, drawn_scene


def mask_of(height: int, width: int, top: int, left: int, h: int, w: int) -> np.ndarray:
    mask = np.zeros((height, width), np.bool_)
    mask[top : top + h, left : left + w] = True
    return mask


def test_a_detection_knows_its_bounds() -> None:
    assert Detection(mask_of(20, 30, 3, 5, 7, 2)).bounds == (5, 3, 2, 7)
    assert Detection(box=(1, 2, 3, 4)).bounds == (1, 2, 3, 4)
    assert Detection(mask_of(20, 30, 0, 0, 20, 30)).bounds == (0, 0, 30, 20)
    assert "7, 2" in repr(Detection(mask_of(20, 30, 3, 5, 2, 7)))


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({}, "neither mask nor box"),
        ({"mask": np.zeros((4, 4), np.bool_)}, "empty"),
        ({"mask": np.ones((4, 4), np.uint8)}, "uint8"),
        ({"mask": np.ones((4, 4, 1), np.bool_)}, r"\(4, 4, 1\)"),
        ({"box": (-1, 0, 2, 2)}, "-1"),
        ({"box": (0, 0, 0, 2)}, r"\(0, 0, 0, 2\)"),
        ({"box": (0, 0, 2, 2), "score": 1.5}, "1.5"),
        ({"box": (0, 0, 2, 2), "score": float("nan")}, "nan"),
    ],
)
def test_wrong_detections_are_refused(values: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Detection(**values)


def test_a_detection_fits_only_its_frame() -> None:
    frame = Frame(np.zeros((20, 30, 3), np.uint8), 0, 0.0)
    Detection(box=(0, 0, 30, 20)).check_fits(frame)
    with pytest.raises(ValueError, match="30x20"):
        Detection(box=(1, 0, 30, 20)).check_fits(frame)
    with pytest.raises(ValueError, match="has shape"):
        Detection(np.ones((30, 20), np.bool_)).check_fits(frame)
    with pytest.raises(ValueError, match="no pixel in its box"):
        Detection(mask_of(20, 30, 3, 5, 7, 2), (9, 9, 4, 4)).check_fits(frame)


class EveryBright:
    """A detector without state: the box of bright pixels."""

    def detect(self, frame: Frame) -> list[Detection]:
        bright = frame.image.min(-1) > 200
        return [Detection(bright)] if bright.any() else []

    def to_bytes(self) -> bytes:
        return b""

    def from_bytes(self, blob: bytes) -> None:
        if blob:
            raise ValueError(f"{len(blob)} bytes, and there is nothing to remember")


class Counter(EveryBright):
    """A detector with state: every third frame has a detection."""

    def __init__(self) -> None:
        self.seen = 0

    def detect(self, frame: Frame) -> list[Detection]:
        self.seen += 1
        return [Detection(box=(0, 0, 3, 3))] if self.seen % 3 == 0 else []

    def to_bytes(self) -> bytes:
        return f"seen {self.seen:06d}".encode()

    def from_bytes(self, blob: bytes) -> None:
        if len(blob) != 11 or not blob.startswith(b"seen "):
            raise ValueError("damaged")
        self.seen = int(blob[5:])


class Forgetful(Counter):
    def from_bytes(self, blob: bytes) -> None:
        super().from_bytes(blob)
        self.seen = 0


class Gullible(Counter):
    def from_bytes(self, blob: bytes) -> None:
        self.seen = int(b"0" + blob[5:]) if blob.startswith(b"seen") else 0


class Painter(EveryBright):
    def detect(self, frame: Frame) -> list[Detection]:
        frame.image[0, 0] ^= 255
        return []


class Outside(EveryBright):
    def detect(self, frame: Frame) -> list[Detection]:
        return [Detection(box=(0, 0, frame.size[1] + 1, 3))]


class Tuples(EveryBright):
    def detect(self, frame: Frame) -> list[Detection]:
        return ()  # type: ignore[return-value]


class Boxes(EveryBright):
    def detect(self, frame: Frame) -> list[Detection]:
        return [(0, 0, 3, 3)]  # type: ignore[list-item]


class Dice(EveryBright):
    made = 0

    def __init__(self) -> None:
        Dice.made += 1
        self.number = Dice.made

    def detect(self, frame: Frame) -> list[Detection]:
        return [Detection(box=(0, 0, self.number, 3))]


@pytest.mark.parametrize("make", [EveryBright, Counter, MotionDetector])
def test_the_check_lets_good_detectors_pass(make: Any) -> None:
    check_detector(make)


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (Forgetful, "a second detector found something else on frame"),
        (Gullible, "from_bytes accepted"),
        (Painter, "the frame was changed on frame 0"),
        (Outside, "reaches outside"),
        (Tuples, "a tuple, not a list"),
        (Boxes, "detect returned tuple"),
        (Dice, "a second detector found something else on frame 0"),
    ],
)
def test_the_check_catches_each_broken_promise(make: Any, complaint: str) -> None:
    with pytest.raises(AssertionError, match=complaint):
        check_detector(make)


def test_the_drawn_scene_has_something_to_find() -> None:
    found = [len(EveryBright().detect(f)) for f in drawn_scene()]
    assert not any(found[:50])


NOT_A_DETECTOR = object


def broken() -> None:
    raise RuntimeError("no\nweights")


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    registered = EntryPoints(
        EntryPoint(name, f"test_detectors:{value}", detectors.ENTRY_POINT_GROUP)
        for name, value in [
            ("counter", "Counter"),
            ("useless", "NOT_A_DETECTOR"),
            ("broken", "broken"),
            ("gone", "NoSuchName"),
        ]
    )
    monkeypatch.setattr(plugin_loader, "entry_points", lambda group: registered.select(group=group))


@pytest.mark.usefixtures("plugins")
def test_a_plugin_is_found_by_its_name_and_made_anew_each_time() -> None:
    one, other = load_detector("counter"), load_detector("counter")
    assert isinstance(one, Detector)
    assert one is not other
    assert type(one).__name__ == "Counter"
    assert isinstance(load_detector(), MotionDetector)


@pytest.mark.usefixtures("plugins")
@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("useless", "'useless' .test_detectors:NOT_A_DETECTOR. lacks one of the methods"),
        ("broken", "cannot be loaded: RuntimeError: no weights; repair"),
        ("gone", "cannot be loaded: AttributeError"),
        (
            "missing",
            "no detector 'missing'; available: motion, people, file:PATH, onnx:FILE, broken, counter, gone, "
            "useless",
        ),
    ],
)
def test_plugins_that_cannot_be_used_are_named(name: str, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        load_detector(name)


def test_a_look_covers_what_lies_inside_a_searched_region_and_is_not_too_small() -> None:
    look = Look([], ((0, 0, 40, 30), (20, 10, 40, 30)), least_share=0.2)
    assert look.covers((5, 5, 4, 10))
    assert look.covers((30, 20, 30, 20))
    assert not look.covers((5, 15, 10, 20))  # leaves the first region, begins outside the second
    assert not look.covers((5, 5, 3, 5))  # smaller than a fifth of 30 pixels
    assert Look([]).covers((5, 5, 3, 5))


def test_a_detector_without_look_searches_all_of_the_frame() -> None:
    frame = Frame(np.full((20, 30, 3), 255, np.uint8), 0, 0.0)
    look = look_with(EveryBright(), frame, [(0, 0, 3, 3)])
    assert [d.bounds for d in look.detections] == [(0, 0, 30, 20)]
    assert look.regions is None
