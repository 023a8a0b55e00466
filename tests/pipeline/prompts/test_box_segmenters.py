from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

import pipeline.base.plugins
import pipeline.prompts.box_segmenters
from pipeline.base.errors import UsageError
from pipeline.prompts.box_segmenters import (
    GrabCut,
    inscribed_ellipse,
    load_box_segmenter,
    require_box_segmenter,
)
from pipeline.prompts.click_network import BoxNetwork
from pipeline.testing.boxes import check_box_segmenter


def scene(noise: float = 6, height: int = 120, width: int = 160) -> tuple[np.ndarray, np.ndarray]:
    """A figure (body and head) on a two-coloured, noisy background."""
    rng = np.random.default_rng(3)
    image = np.empty((height, width, 3), np.uint8)
    image[:70], image[70:] = (170, 170, 165), (90, 120, 60)
    truth = np.zeros((height, width), np.uint8)
    cv2.ellipse(truth, (80, 70), (14, 32), 0, 0, 360, 1, -1)
    cv2.circle(truth, (80, 28), 9, 1, -1)
    image[truth == 1] = (40, 30, 60)
    noisy = image + rng.normal(0, noise, image.shape)
    return np.clip(noisy, 0, 255).astype(np.uint8), truth == 1


def box_around(mask: np.ndarray, slack: int = 2) -> tuple[int, int, int, int]:
    rows, columns = np.nonzero(mask)
    left, top = columns.min() - slack, rows.min() - slack
    return int(left), int(top), int(columns.max() + slack + 1 - left), int(rows.max() + slack + 1 - top)


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / (a | b).sum())


def test_grabcut_finds_the_figure() -> None:
    image, truth = scene()
    mask = GrabCut().segment(image, box_around(truth))
    assert iou(mask, truth) > 0.93
    assert iou(inscribed_ellipse(truth.shape, box_around(truth)), truth) < 0.85  # what it has to beat


def test_grabcut_scales_large_objects_down_and_back() -> None:
    image, truth = scene()
    large = cv2.resize(image, None, fx=6, fy=6, interpolation=cv2.INTER_CUBIC).astype(np.uint8)
    large_truth = cv2.resize(truth.astype(np.uint8), None, fx=6, fy=6, interpolation=cv2.INTER_NEAREST) == 1
    mask = GrabCut().segment(large, box_around(large_truth, 9))
    assert mask.shape == large_truth.shape
    assert iou(mask, large_truth) > 0.93


def test_grabcut_keeps_the_promises_of_the_protocol() -> None:
    check_box_segmenter(load_box_segmenter("grabcut"))


def test_grabcut_gives_the_same_bytes_in_any_process_with_any_threads() -> None:
    image, truth = scene(noise=40)  # so noisy that without the seed every other call gives another mask
    box = box_around(truth)
    masks = {GrabCut().segment(image, box).tobytes() for _ in range(8)}
    assert len(masks) == 1
    here = hashlib.sha256(masks.pop()).hexdigest()
    program = (
        "import sys, hashlib, cv2\n"
        "sys.path[:0] = sys.argv[2:]\n"
        "from test_box_segmenters import GrabCut, box_around, scene\n"
        "cv2.setNumThreads(int(sys.argv[1]))\n"
        "image, truth = scene(noise=40)\n"
        "mask = GrabCut().segment(image, box_around(truth))\n"
        "sys.stdout.write(hashlib.sha256(mask.tobytes()).hexdigest())\n"
    )
    paths = [str(Path(__file__).parent), str(Path(pipeline.prompts.box_segmenters.__file__).parents[1])]
    for threads in ("1", "4"):
        ran = subprocess.run(
            [sys.executable, "-c", program, threads, *paths],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        )
        assert ran.stdout == here


@pytest.mark.parametrize("colour", [0, 128, 255])
def test_grabcut_sees_nothing_in_a_frame_of_one_colour(colour: Any) -> None:
    image = np.full((60, 80, 3), colour, np.uint8)
    assert not GrabCut().segment(image, (20, 10, 30, 40)).any()


def test_grabcut_gives_up_rather_than_returning_a_crumb() -> None:
    image = np.full((80, 80, 3), 200, np.uint8)
    image[38:42, 38:42] = 0  # 16 of 3,600 pixels: not what anybody draws such a box around
    assert not GrabCut().segment(image, (10, 10, 60, 60)).any()


def test_grabcut_drops_speckle_and_fills_small_holes() -> None:
    image, truth = scene()
    image[70:72, 79:81] = (90, 120, 60)  # a hole of 4 pixels in the figure
    image[100:102, 60:62] = (40, 30, 60)  # a speck of 4 in the box's corner, coloured like the figure
    mask = GrabCut().segment(image, box_around(truth, 6))
    assert mask[70:72, 79:81].all()
    assert not mask[100:102, 60:62].any()


@pytest.mark.parametrize("box", [(0, 0, 1, 1), (3, 2, 1, 5), (9, 7, 1, 1), (0, 0, 10, 8), (2, 3, 5, 4)])
def test_inscribed_ellipse_stays_inside_and_is_never_empty(box: Any) -> None:
    x, y, w, h = box
    mask = inscribed_ellipse((8, 10), box)
    assert mask.any()
    assert mask[y : y + h, x : x + w].sum() == mask.sum()
    assert not inscribed_ellipse((8, 10), box, 0.01).sum() > 1
    np.testing.assert_array_equal(mask[y : y + h, x : x + w], mask[y : y + h, x : x + w][::-1, ::-1])


def test_inscribed_ellipse_touches_all_four_sides() -> None:
    mask = inscribed_ellipse((50, 70), (10, 5, 40, 30))
    rows, columns = np.nonzero(mask)
    assert (columns.min(), columns.max(), rows.min(), rows.max()) == (10, 49, 5, 34)
    assert mask.sum() == pytest.approx(np.pi / 4 * 40 * 30, rel=0.01)


class WholeBox:
    def segment(self, frame: Any, box: Any) -> Any:
        x, y, w, h = box
        mask = np.zeros(frame.shape[:2], np.bool_)
        mask[y : y + h, x : x + w] = True
        return mask


class TooWide(WholeBox):
    def segment(self, frame: Any, box: Any) -> Any:
        return np.ones(frame.shape[:2], np.bool_)


class Bytes(WholeBox):
    def segment(self, frame: Any, box: Any) -> Any:
        return super().segment(frame, box).astype(np.uint8)


class Scribbler(WholeBox):
    def segment(self, frame: Any, box: Any) -> Any:
        frame[0, 0] = 7
        return super().segment(frame, box)


class Moody(WholeBox):
    def __init__(self) -> None:
        self.calls = 0

    def segment(self, frame: Any, box: Any) -> Any:
        self.calls += 1
        return super().segment(frame, box) & (self.calls % 2 == 1)


class Blind(WholeBox):
    def segment(self, frame: Any, box: Any) -> Any:
        return np.zeros(frame.shape[:2], np.bool_)


class Transposed(WholeBox):
    def segment(self, frame: Any, box: Any) -> Any:
        return super().segment(frame, box).T


def test_conformance_check_accepts_the_simplest_segmenter() -> None:
    check_box_segmenter(WholeBox())


@pytest.mark.parametrize(
    ("segmenter", "complaint"),
    [
        (TooWide(), "outside the box"),
        (Bytes(), "uint8, not bool"),
        (Scribbler(), "frame was changed"),
        (Moody(), "second call returned another mask"),
        (Blind(), "nothing was found"),
        (Transposed(), "the mask has shape"),
    ],
)
def test_conformance_check_catches_each_broken_promise(segmenter: Any, complaint: str) -> None:
    with pytest.raises(AssertionError, match=complaint):
        check_box_segmenter(segmenter)


NOT_A_SEGMENTER = object


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Entry points as an installed package would register them."""
    registered = EntryPoints(
        EntryPoint(name, value, "xmem.box_segmenters")
        for name, value in [
            ("whole", "test_box_segmenters:WholeBox"),
            ("useless", "test_box_segmenters:NOT_A_SEGMENTER"),
            ("gone", "no_such_package:Thing"),
        ]
    )
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setattr(pipeline.base.plugins, "entry_points", lambda group: registered.select(group=group))


def test_a_plugin_is_found_by_name(plugins: Any) -> None:
    assert type(load_box_segmenter("whole")).__name__ == "WholeBox"
    assert isinstance(load_box_segmenter("grabcut"), GrabCut)
    assert isinstance(load_box_segmenter(), BoxNetwork)
    for name in ("whole", "grabcut", "xmem-click"):
        require_box_segmenter(name)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("nobody", "no box segmenter 'nobody'; available: xmem-click, grabcut, gone, useless, whole"),
        ("useless", "has no method segment"),
        ("gone", "cannot be loaded: ModuleNotFoundError: No module named 'no_such_package'"),
    ],
)
def test_unusable_plugins_are_named(plugins: Any, name: str, complaint: str) -> None:
    for find in (load_box_segmenter, require_box_segmenter):
        with pytest.raises(UsageError, match=complaint):
            find(name)


def test_missing_weights_of_the_bundled_one_are_named_without_loading_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("pipeline.prompts.box_segmenters.BUNDLED_CLICKS", tmp_path / "none.safetensors")
    with pytest.raises(UsageError, match=r"'xmem-click': its weights are not at .*none.safetensors: reinst"):
        require_box_segmenter("xmem-click")
