"""Colours of detections."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.detect.lifecycle.appearance import blended, colours_of, similarity
from pipeline.detect.protocol import Detection

RED, BLUE, GREY = (200, 30, 30), (30, 30, 200), (120, 120, 120)
BOX = (20, 10, 16, 40)


def picture(upper: tuple[int, int, int], lower: tuple[int, int, int]) -> np.ndarray:
    image = np.full((60, 60, 3), GREY, np.uint8)
    x, y, w, h = BOX
    image[y : y + h // 2, x : x + w] = upper
    image[y + h // 2 : y + h, x : x + w] = lower
    return image


def test_the_same_colours_are_alike_and_others_are_not() -> None:
    box = Detection(box=BOX)
    red = colours_of(picture(RED, BLUE), box)
    assert similarity(red, red) == pytest.approx(1)
    assert similarity(red, colours_of(picture(RED, RED), box)) == pytest.approx(0.5)
    assert similarity(red, colours_of(picture(BLUE, RED), box)) == pytest.approx(0)  # halves count


def test_only_the_mask_counts_where_there_is_one() -> None:
    mask = np.zeros((60, 60), np.bool_)
    mask[12:48, 22:28] = True
    image = picture(RED, RED)
    image[:, 28:] = BLUE
    red = colours_of(picture(RED, RED), Detection(box=BOX))
    assert similarity(red, colours_of(image, Detection(mask))) == pytest.approx(1)
    assert similarity(red, colours_of(image, Detection(box=BOX))) < 0.9


def test_averages_keep_their_norm() -> None:
    one, other = (colours_of(picture(a, b), Detection(box=BOX)) for a, b in ((RED, BLUE), (BLUE, GREY)))
    mixed = blended(one, other, 0.2)
    assert similarity(mixed, mixed) == pytest.approx(1)
    assert similarity(mixed, one) > similarity(mixed, other) > 0
    assert blended(one, other, 0.0) == pytest.approx(one)


def test_a_box_of_one_pixel_has_colours() -> None:
    thin = colours_of(picture(RED, BLUE), Detection(box=(25, 15, 1, 1)))
    assert similarity(thin, thin) == pytest.approx(1)
