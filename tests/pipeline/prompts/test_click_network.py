"""The bundled click segmenter, and which segmenter is the default."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.base.errors import UsageError
from pipeline.prompts.click_network import BoxNetwork, ClickNetwork, _rounds
from pipeline.prompts.click_segmenters import (
    Click,
    GrabCutClicks,
    load_click_segmenter,
    segment_clicks,
)
from pipeline.testing.boxes import check_box_segmenter

Image = NDArray[np.uint8]


def scene(height: int = 150, width: int = 230) -> tuple[Image, NDArray[np.bool_]]:
    """A bright disc of two colours on a dark, noisy ground."""
    rows, columns = np.mgrid[:height, :width]
    truth = (rows - 70) ** 2 + (columns - 120) ** 2 < 38**2
    image = np.random.default_rng(3).integers(20, 60, (height, width, 3)).astype(np.uint8)
    image[truth] = (220, 60, 50)
    image[truth & (rows < 60)] = (230, 200, 60)
    return image, np.asarray(truth)


def iou(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    return float((a & b).sum() / (a | b).sum())


def test_the_bundled_network_is_the_default_and_finds_a_disc() -> None:
    image, truth = scene()
    network = load_click_segmenter()
    assert isinstance(network, ClickNetwork)
    assert iou(segment_clicks(network, image, [Click(120, 70), Click(120, 45)]), truth) > 0.85


def test_the_mask_holds_positive_clicks_and_no_negative_ones() -> None:
    image, _ = scene()
    clicks = [Click(120, 70), Click(5, 140), Click(121, 71, False), Click(229, 0, False)]
    mask = ClickNetwork().segment(image, clicks, None)
    assert [bool(mask[c.y, c.x]) for c in clicks] == [c.positive for c in clicks]


def test_a_mask_given_is_corrected() -> None:
    image, truth = scene()
    previous = truth.copy()
    previous[:, 120:] = False
    mask = ClickNetwork().segment(image, [Click(140, 70)], previous)
    assert iou(mask, truth) > iou(previous, truth) + 0.2


def test_clicks_on_a_frame_seen_before_give_the_same_mask() -> None:
    """Features of earlier windows are reused; another picture of the same size is not taken for it."""
    image, _ = scene()
    other = image[:, ::-1].copy()
    network = ClickNetwork()
    first = network.segment(image, [Click(120, 70)], None)
    mirrored = network.segment(other, [Click(109, 70)], None)
    assert not np.array_equal(first, mirrored)
    assert np.array_equal(network.segment(image, [Click(120, 70)], None), first)
    assert np.array_equal(ClickNetwork().segment(other, [Click(109, 70)], None), mirrored)


def test_clicks_one_by_one_give_the_mask_of_all_at_once() -> None:
    """What is kept of earlier clicks changes nothing."""
    image, _ = scene()
    clicks = [Click(120, 70), Click(120, 40), Click(10, 10, False), Click(150, 80)]
    network = ClickNetwork()
    for end in range(1, len(clicks) + 1):
        mask = network.segment(image, clicks[:end], None)
    assert np.array_equal(mask, ClickNetwork().segment(image, clicks, None))


def test_a_stroke_is_one_round_and_very_many_clicks_are_too() -> None:
    stroke = [Click(x, 50) for x in range(20, 120, 10)]
    assert _rounds(stroke, 240) == [10]
    assert _rounds([*stroke, Click(200, 200, False), Click(20, 200)], 240) == [10, 11, 12]
    assert _rounds([Click(5, 5, False), Click(60, 60), Click(150, 60)], 240) == [2, 3]
    assert _rounds([Click(i * 40, 5) for i in range(60)], 240) == [60]


@pytest.mark.parametrize("size", [(1, 1), (2, 300), (300, 2), (17, 33)])
def test_frames_of_any_size_are_segmented(size: tuple[int, int]) -> None:
    image = np.full((*size, 3), 90, np.uint8)
    mask = segment_clicks(ClickNetwork(), image, [Click(size[1] - 1, size[0] - 1)])
    assert mask[-1, -1]


def test_grabcut_stands_in_where_the_weights_are_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from pipeline.prompts import click_network

    click_network._loaded.cache_clear()
    monkeypatch.setattr("xmem_core.clicks.BUNDLED_CLICKS", tmp_path / "none.safetensors")
    try:
        assert isinstance(load_click_segmenter(), GrabCutClicks)
        assert "clicks are segmented by GrabCut: no click model at" in caplog.text
        with pytest.raises(UsageError, match="click segmenter 'xmem-click': no click model at"):
            load_click_segmenter("xmem-click")
    finally:
        click_network._loaded.cache_clear()


def test_an_unknown_segmenter_is_named_with_those_there_are() -> None:
    with pytest.raises(UsageError, match="no click segmenter 'sam9'; available: xmem-click, grabcut"):
        load_click_segmenter("sam9")
    assert isinstance(load_click_segmenter("grabcut"), GrabCutClicks)


def test_looking_up_click_segmenters_imports_no_torch() -> None:
    code = (
        "import sys; from pipeline.prompts.click_segmenters import load_click_segmenter as load\n"
        "load('grabcut'); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_box_is_segmented_by_the_same_network() -> None:
    segmenter = BoxNetwork()
    check_box_segmenter(segmenter)
    image, truth = scene()
    assert iou(segmenter.segment(image, (80, 30, 80, 80)), truth) > 0.93
    # A box off by a tenth of its sides still holds one thing, and nothing outside the box is taken.
    tight = segmenter.segment(image, (92, 38, 68, 72))
    inside = np.zeros_like(truth)
    inside[38:110, 92:160] = True
    assert iou(tight, truth & inside) > 0.85
    assert not (tight & ~inside).any()


def test_weights_that_are_no_click_models_are_refused(tmp_path: Path) -> None:
    from xmem_core.weight_files import WeightsError

    with pytest.raises(WeightsError, match=r"no click model at .*nowhere\.safetensors"):
        BoxNetwork(tmp_path / "nowhere.safetensors")


def test_an_uncertain_first_mask_is_looked_at_closer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that sees a small object from near only: one click finds it, if the rest is uncertain."""
    image, truth = scene(400, 600)
    large, small = np.zeros_like(truth), np.zeros_like(truth)
    large[10:210, 60:260] = True
    small[60:80, 110:130] = True
    sides: list[int] = []
    sure = False

    def look(self: ClickNetwork, frame: Image, digest: bytes, window: Any, *given: Any, **more: Any) -> Any:
        sides.append(window.width)
        near = window.width <= 160
        seen = (small if near else large)[window.cut]
        return np.where(seen, np.float32(3 if near or sure else 0.2), np.float32(-3))[None]

    monkeypatch.setattr(ClickNetwork, "_look", look)
    click = Click(120, 70)
    assert iou(ClickNetwork().segment(image, [click], None), small) == 1
    assert max(sides) == 600
    sides.clear()
    sure = True  # nothing is to be gained: the mask of the whole frame stays
    monkeypatch.setattr("pipeline.prompts.click_network._SAME", 0.0)
    assert iou(ClickNetwork().segment(image, [click], None), large) == 1
    assert sides == [600]


def test_a_click_that_takes_away_takes_the_like_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that sees three discs, which touch, as one thing."""
    image, _ = scene()
    rows, columns = np.mgrid[:150, :230]
    middles = (50, 110, 170)
    discs = [(rows - 70) ** 2 + (columns - x) ** 2 < 28**2 for x in middles]
    group = np.any([*discs, (abs(rows - 70) < 5) & (columns > 50) & (columns < 170)], 0)

    def look(self: ClickNetwork, frame: Image, digest: bytes, window: Any, *given: Any, **more: Any) -> Any:
        return np.where(group[window.cut], np.float32(4), np.float32(-4))[None]

    monkeypatch.setattr(ClickNetwork, "_look", look)

    def seen(clicks: list[Click], previous: NDArray[np.bool_] | None = None) -> list[bool]:
        mask = ClickNetwork().segment(image, clicks, previous)
        return [bool(mask[60, x]) for x in middles]

    on, beside = Click(110, 70), Click(50, 70, False)
    assert seen([on]) == [True] * 3  # it may be meant
    assert seen([on, beside]) == [False, True, False]
    assert seen([on, beside, Click(170, 70)]) == [False, True, True]
    assert seen([on, beside], group) == [True] * 3  # a mask given before stays whole
