"""Admission of streams: by size and objects, by measured times, with the right numbers in messages."""

from __future__ import annotations

import re
from typing import Any

import pytest
from support.small_net import SMALL_MEMORY, small_model

from pipeline.base.errors import UsageError
from pipeline.live.hub.capacity import Capacity, Load
from pipeline.live.spec import LiveSettings, LiveSpec
from xmem_core import VideoSegmenter


def load(name: str, ms: float | None = None, objects: int = 1, **settings: Any) -> Load:
    spec = LiveSpec(name, "rtsp://camera/live", settings=LiveSettings.from_dict(settings))
    return Load(spec, (720, 1280), ms, objects)


@pytest.fixture
def capacity() -> Capacity:
    """A device on which a frame at 360 pixels takes 100 ms, and 10 ms for each object."""
    made = Capacity(VideoSegmenter(small_model(), SMALL_MEMORY, size=360), 1 << 40, 0.9)
    made._object = 0.1
    made._ms_per_unit = 100 / (360 * 640)
    return made


def refusal(capacity: Capacity, new: Load, *there: Load) -> str:
    with pytest.raises(UsageError) as caught:
        capacity.admit(new.spec, there)
    return str(caught.value)


def test_a_refusal_names_what_is_promised(capacity: Capacity) -> None:
    there = [load("a", fps=3, max_objects=2), load("b", fps=2, max_objects=4), load("c")]
    assert capacity.report(there)["promised_load"] == pytest.approx(3 * 0.12 + 2 * 0.14)
    message = refusal(capacity, load("new", fps=4, max_objects=2), *there)
    assert "4 frames/s at 120.0 ms each (with 2 objects) take 48 %, 64 % are promised, of 90 %" in message
    assert "at most 2.2 frames/s" in message
    capacity.admit(load("new", fps=2.1, max_objects=2).spec, there)


def test_a_stream_that_is_slower_than_predicted_corrects_the_numbers(capacity: Capacity) -> None:
    new = load("new", fps=2, max_objects=1)
    capacity.admit(new.spec, [load("a", fps=3, max_objects=1)])
    slow = load("a", ms=220.0, objects=1, fps=3, max_objects=1)  # twice as long as predicted
    message = refusal(capacity, new, slow)
    assert "2 frames/s at 220.0 ms each (with 1 objects) take 44 %, 66 % are promised" in message
    # Measured with one object; what is promised has to hold with all that may come.
    assert capacity.report([load("a", ms=220.0, fps=1, max_objects=10)])["promised_load"] == pytest.approx(
        0.4
    )


def test_a_frame_costs_by_the_streams_own_size_and_objects(capacity: Capacity) -> None:
    speed = capacity._speed([])
    assert speed is not None

    def ms(**settings: Any) -> float:
        return capacity._frame_ms(load("x", **settings), speed)

    assert ms(max_objects=1) == pytest.approx(110)
    assert ms(max_objects=8) == pytest.approx(180)
    assert ms(max_objects=1, size=720) == pytest.approx(440)
    assert ms(max_objects=1, size=2160) == pytest.approx(440)  # never enlarged: the camera's frames have 720
    large = Load(load("x", max_objects=1, size=2160).spec, (2160, 3840))
    assert capacity._frame_ms(large, speed) == pytest.approx(36 * 110)


def test_a_large_stream_is_refused_beside_others_and_not_alone(capacity: Capacity) -> None:
    large = LiveSpec(
        "large",
        "rtsp://camera/live",
        settings=LiveSettings(size=2160, expected_height=2160, expected_width=3840),
    )
    capacity.admit(large, [])
    message = refusal(capacity, Load(large), load("kept", fps=1))
    assert "a frame of stream large takes 6.5 s, at most 2 s are allowed" in message
    assert "stream kept is promised 1 frames/s" in message
    assert "stream kept" in refusal(capacity, load("kept", fps=1), Load(large))
    capacity._ms_per_unit = 200 / (
        360 * 640
    )  # on a slower device it would hold up even who is promised nothing
    assert "takes 7.9 s, at most 5 s are allowed" in refusal(capacity, Load(large), load("other"))
    capacity.admit(load("other").spec, [load("another"), load("third", fps=0.5)])


def test_what_was_admitted_stays_unless_its_frames_are_larger_than_expected(capacity: Capacity) -> None:
    slow = load("a", ms=2000.0, fps=4)
    with pytest.raises(UsageError, match="time"):
        capacity.check("a", [slow])
    capacity.recheck("a", [slow])
    wide = Load(load("a", fps=4).spec, (720, 5000))
    with pytest.raises(UsageError, match=r"4 frames/s at 703\.1 ms"):
        capacity.recheck("a", [wide])
    capacity.recheck("gone", [slow])


def test_without_a_measurement_nothing_is_refused_for_its_time(capacity: Capacity) -> None:
    capacity._ms_per_unit = None
    capacity.admit(load("new", fps=240).spec, [load("a", fps=240)])
    assert "promised" in refusal(capacity, load("new", fps=240), load("a", ms=10.0, fps=40))


def test_the_trial_measures_objects_too() -> None:
    capacity = Capacity(VideoSegmenter(small_model(), SMALL_MEMORY, size=48), None, 0.9)
    ms = capacity.calibrate()
    assert ms > 0
    assert 0 <= capacity._object <= 1
    one = Load(
        LiveSpec("x", "rtsp://c/", settings=LiveSettings.from_dict({"size": 48, "max_objects": 1})), (48, 86)
    )
    speed = capacity._speed([])
    assert speed is not None
    assert capacity._frame_ms(one, speed) == pytest.approx(ms)
    assert re.fullmatch("[a-z]+", capacity.report([])["device"])
