"""Conformance check for detectors."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import cv2
import numpy as np

from pipeline.base.records import Frame
from pipeline.detect.protocol import Detection, Detector


def check_detector(make: Callable[[], Detector], frames: Iterable[Frame] | None = None) -> None:
    """Conformance test for authors of detectors.

    Args:
        make: returns a new detector.
        frames: frames to run it on; by default a drawn scene that a bright object enters after 2 seconds.

    Raises:
        AssertionError: it violates the protocol of `Detector`; the message says how, and on which frame.
    """
    shown = list(drawn_scene() if frames is None else frames)
    first, second = make(), make()
    for index, frame in enumerate(shown):
        where = f"on frame {frame.frame_index}"
        before = frame.image.copy()
        found = first.detect(frame)
        assert isinstance(found, list), f"detect returned a {type(found).__name__}, not a list, {where}"
        for detection in found:
            assert isinstance(detection, Detection), f"detect returned {type(detection).__name__} {where}"
            try:
                detection.check_fits(frame)
            except ValueError as error:
                raise AssertionError(f"{error} {where}") from error
        assert np.array_equal(before, frame.image), f"the frame was changed {where}"
        again = second.detect(frame)
        assert _same(found, again), f"a second detector found something else {where}"
        if index % 7 == 3:
            # The second one is replaced by its own serialized state, again and again.
            blob = second.to_bytes()
            assert isinstance(blob, bytes), f"to_bytes returned a {type(blob).__name__}, not bytes"
            second = make()
            second.from_bytes(blob)
    memory = first.to_bytes()
    for bad in (b"", b"damaged", memory[:-1]) if memory else ():
        try:
            make().from_bytes(bad)
        except ValueError:
            continue
        raise AssertionError(f"from_bytes accepted {len(bad)} bytes that to_bytes did not return")


def drawn_scene(count: int = 100, height: int = 120, width: int = 160) -> list[Frame]:
    """A static, textured scene at 25 frames/s that a bright object enters at frame 50."""
    generator = np.random.default_rng(0)
    texture = generator.integers(60, 150, (height // 8, width // 8, 3), dtype=np.uint8)
    still = np.asarray(cv2.resize(texture, (width, height), interpolation=cv2.INTER_CUBIC), np.uint8)
    frames = []
    for index in range(count):
        image = still.copy()
        if index >= 50:
            left = 2 * (index - 50) - 10
            image[height // 3 : 2 * height // 3, max(0, left) : max(0, left + 20)] = (240, 230, 40)
        image += generator.integers(0, 5, image.shape, dtype=np.uint8)
        frames.append(Frame(image, index, index / 25))
    return frames


def _same(these: list[Detection], those: list[Detection]) -> bool:
    return len(these) == len(those) and all(
        (a.box, a.category, a.score) == (b.box, b.category, b.score)
        and (a.mask is None) == (b.mask is None)
        and (a.mask is None or b.mask is None or np.array_equal(a.mask, b.mask))
        for a, b in zip(these, those, strict=True)
    )
