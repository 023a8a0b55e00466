"""The motion detector on drawn scenes: detections, non-detections, and saved state."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from pipeline.base.records import Frame
from pipeline.detect.motion import MotionDetector, MotionSettings
from pipeline.detect.protocol import Detection

HEIGHT, WIDTH = 240, 320
VTEST = Path("/work/shared/data/video/vtest.avi")

Draw = Callable[[np.ndarray, int], None]


def scene(
    count: int, draw: Draw | None = None, height: int = HEIGHT, width: int = WIDTH, rate: float = 10
) -> Iterator[Frame]:
    """A textured, slightly noisy scene; `draw(image, index)` adds objects."""
    rng = np.random.default_rng(4)
    coarse = rng.integers(70, 160, (height // 10, width // 10, 3), dtype=np.uint8)
    still = np.asarray(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)).astype(np.int16)
    for index in range(count):
        image = np.clip(still + rng.integers(-3, 4, still.shape), 0, 255).astype(np.uint8)
        if draw is not None:
            draw(image, index)
        yield Frame(image, index, index / rate)


def walker(image: np.ndarray, left: int, top: int = 80, h: int = 60, w: int = 24) -> np.ndarray:
    """Draw a dark object, and return its mask."""
    mask = np.zeros(image.shape[:2], np.bool_)
    mask[top : top + h, max(0, left) : max(0, left + w)] = True
    image[mask] = (20, 25, 60)
    return mask


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / (a | b).sum())


def run(frames: Iterator[Frame], detector: MotionDetector | None = None) -> list[list[Detection]]:
    detector = detector or MotionDetector()
    return [detector.detect(frame) for frame in frames]


def test_what_walks_in_is_found_with_its_shape() -> None:
    truth: dict[int, np.ndarray] = {}

    def draw(image: np.ndarray, index: int) -> None:
        if index >= 30:
            truth[index] = walker(image, 6 * (index - 30) - 20)

    found = run(scene(70, draw))
    assert not any(found[:30])
    for index in range(36, 70):
        assert len(found[index]) == 1, index
        mask = found[index][0].mask
        assert mask is not None
        assert iou(mask, truth[index]) > 0.8, index


@pytest.mark.parametrize(("height", "width"), [(480, 640), (576, 768), (101, 67), (720, 404)])
def test_masks_have_the_frames_size_and_place(height: int, width: int) -> None:
    truth: dict[int, np.ndarray] = {}

    def draw(image: np.ndarray, index: int) -> None:
        if index >= 20:
            h, w = height // 3, width // 8
            truth[index] = walker(image, (index - 20) * width // 40, height // 4, h, w)

    found = run(scene(45, draw, height, width))
    for index in range(30, 45):
        (detection,) = found[index]
        assert detection.mask is not None
        assert detection.mask.shape == (height, width)
        assert iou(detection.mask, truth[index]) > 0.7


def test_two_things_are_two_detections_the_larger_one_first() -> None:
    def draw(image: np.ndarray, index: int) -> None:
        if index >= 20:
            walker(image, 5 * (index - 20), 20, 30, 16)
            walker(image, 5 * (index - 20), 120, 60, 24)

    for detections in run(scene(40, draw))[25:]:
        first, second = (d.bounds[1] for d in detections)
        assert (first > 100, second < 50) == (True, True)


def test_what_was_there_from_the_start_leaves_no_ghost() -> None:
    truth: dict[int, np.ndarray] = {}

    def draw(image: np.ndarray, index: int) -> None:
        truth[index] = walker(image, 60 + 5 * index)

    found = run(scene(45, draw))
    for index in range(15, 45):
        (detection,) = found[index]
        assert detection.mask is not None
        assert iou(detection.mask, truth[index]) > 0.75, index


def test_what_stops_becomes_background_and_its_place_is_no_thing_when_it_goes() -> None:
    def draw(image: np.ndarray, index: int) -> None:
        if 20 <= index < 120:
            walker(image, min(5 * (index - 20), 150))

    found = run(scene(160, draw))
    assert all(len(d) == 1 for d in found[25:50])
    assert not any(found[70:118])
    # It vanishes at once: for a moment all of it changes, then nothing does.
    assert not any(found[125:])


def test_a_shadow_is_no_part_of_it() -> None:
    truth: dict[int, np.ndarray] = {}

    def draw(image: np.ndarray, index: int) -> None:
        if index >= 20:
            left = 5 * (index - 20)
            shade = np.zeros(image.shape[:2], np.bool_)
            shade[120:140, left : left + 90] = True
            image[shade] = (image[shade] * 0.72).astype(np.uint8)
            truth[index] = walker(image, left)

    for index, detections in enumerate(run(scene(45, draw))[28:], 28):
        (detection,) = detections
        assert detection.mask is not None
        assert iou(detection.mask, truth[index]) > 0.75


@pytest.mark.parametrize("to", [0.6, 0.8, 1.3])
def test_an_exposure_that_changes_everywhere_is_no_thing(to: float) -> None:
    def draw(image: np.ndarray, index: int) -> None:
        gain = 1 + (to - 1) * np.clip((index - 30) / 5, 0, 1)
        image[:] = np.clip(image * gain, 0, 255).astype(np.uint8)

    assert not any(run(scene(80, draw)))


def test_a_lamp_starts_it_over_and_things_are_found_again_soon() -> None:
    def draw(image: np.ndarray, index: int) -> None:
        if index >= 30:
            # Half of the scene is lit, in another colour: no gain explains that.
            image[:, : WIDTH * 3 // 4] = np.clip(image[:, : WIDTH * 3 // 4] + (90, 60, -40), 0, 255)
        if index >= 50:
            walker(image, 5 * (index - 50))

    found = run(scene(80, draw))
    assert not any(found[:50])
    assert all(len(d) == 1 for d in found[56:80])


def test_specks_and_noise_are_no_things() -> None:
    rng = np.random.default_rng(1)

    def draw(image: np.ndarray, index: int) -> None:
        for x, y in rng.integers(5, 235, (20, 2)):
            image[y : y + 2, x : x + 2] = 255

    assert not any(run(scene(50, draw)))


def test_frames_without_times_count_as_a_fifth_of_a_second() -> None:
    def draw(image: np.ndarray, index: int) -> None:
        if index >= 15:
            walker(image, 8 * (index - 15))

    timed = list(scene(35, draw, rate=5))
    untimed = [replace(f, pts_seconds=None) for f in timed]
    one, other = run(iter(timed)), run(iter(untimed))
    assert any(one)
    for a, b in zip(one, other, strict=True):
        assert [d.bounds for d in a] == [d.bounds for d in b]


def test_a_clock_that_stands_or_jumps_does_no_harm() -> None:
    def draw(image: np.ndarray, index: int) -> None:
        if index >= 30:
            walker(image, 5 * (index - 30))

    for times in ([0.0] * 60, [1e9 * (i % 2) for i in range(60)], [-i / 10 for i in range(60)]):
        frames = (replace(f, pts_seconds=t) for f, t in zip(scene(60, draw), times, strict=True))
        found = run(frames)
        assert all(len(d) == 1 for d in found[36:])


def test_another_frame_size_starts_it_over() -> None:
    detector = MotionDetector()
    run(scene(20), detector)
    found = run(scene(20, None, 120, 160), detector)
    assert not any(found)


@pytest.mark.parametrize("cuts", [[1], [5, 6, 31], [11, 29, 33, 50]])
def test_stored_and_restored_it_goes_on_the_same(cuts: list[int]) -> None:
    def draw(image: np.ndarray, index: int) -> None:
        if index >= 10:
            walker(image, 4 * (index - 10), 40 + index)
        if index >= 35:
            image[:, 200:] = np.clip(image[:, 200:] + (0, 60, 0), 0, 255)

    straight = MotionDetector()
    stored = MotionDetector()
    for frame in scene(60, draw):
        if frame.frame_index in cuts:
            blob = stored.to_bytes()
            stored = MotionDetector()
            stored.from_bytes(blob)
            assert stored.to_bytes() == blob
        expected, found = straight.detect(frame), stored.detect(frame)
        assert [d.score for d in expected] == [d.score for d in found]
        for a, b in zip(expected, found, strict=True):
            assert np.array_equal(a.mask, b.mask)  # type: ignore[arg-type]
    assert straight.to_bytes() == stored.to_bytes()


def test_foreign_and_damaged_bytes_are_refused() -> None:
    detector = MotionDetector()
    run(scene(5), detector)
    blob = detector.to_bytes()
    changed = bytearray(blob)
    changed[len(blob) // 2] ^= 1
    for bad in (b"", b"x", blob[:-1], blob + b"x", bytes(changed), blob[20:]):
        with pytest.raises(ValueError, match="motion detector"):
            MotionDetector().from_bytes(bad)
    with pytest.raises(ValueError, match="other settings"):
        MotionDetector(MotionSettings(patience=9)).from_bytes(blob)


@pytest.mark.skipif(not VTEST.exists(), reason="the video vtest.avi is not here")
def test_people_walking_across_a_square() -> None:
    """Hand-drawn boxes of walking people: they are detected, and nothing on lawn and houses."""
    from pipeline.video.sources import open_source

    # frame -> boxes of people walking free of others, x y w h by eye
    people = {
        50: [(670, 256, 48, 116), (505, 217, 42, 90), (554, 217, 30, 85)],
        200: [(84, 152, 26, 60), (220, 192, 28, 70), (488, 145, 24, 70), (617, 265, 34, 105)],
        250: [(195, 150, 25, 75), (384, 215, 36, 95), (545, 185, 30, 75), (602, 252, 40, 100)],
    }
    detector, found = MotionDetector(), {}
    with open_source(str(VTEST)) as source:
        for frame in itertools.islice(source.frames(), 0, 251):
            if frame.frame_index % 2 == 0:
                found[frame.frame_index] = detector.detect(frame)
    for index, boxes in people.items():
        bounds = [d.bounds for d in found[index]]
        for x, y, w, h in boxes:
            assert any(
                abs(bx + bw / 2 - x - w / 2) < 15 and abs(by + bh / 2 - y - h / 2) < 20
                for bx, by, bw, bh in bounds
            ), (index, (x, y, w, h), bounds)
    for detections in found.values():
        assert all(d.bounds[1] < 400 for d in detections)
