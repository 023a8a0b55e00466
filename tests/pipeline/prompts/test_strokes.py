"""Clicks and strokes."""

from __future__ import annotations

from pipeline.prompts.clicks import MOST_CLICKS, Click, Stroke, joined


def test_a_stroke_becomes_clicks_along_its_line() -> None:
    clicks = Stroke(((10, 20), (40, 20), (40, 50)), False).clicks(10)
    assert clicks[0] == Click(10, 20, False)
    assert clicks[-1] == Click(40, 50, False)
    assert Click(40, 20, False) in clicks
    assert len(clicks) == 7


def test_a_stroke_of_one_point_is_a_click() -> None:
    assert Stroke(((3.7, 4.2),)).clicks(10) == [Click(3, 4)]
    assert Stroke(((3.7, 4.2), (3.7, 4.2))).clicks(10) == [Click(3, 4)]


def test_many_long_strokes_stay_within_what_a_segmenter_takes() -> None:
    strokes = [Stroke(((0, y), (1900, y))) for y in range(0, 1000, 40)]
    clicks = joined([Click(1, 1, False)], strokes, (1080, 1920))
    assert clicks[0] == Click(1, 1, False)
    assert 2 * len(strokes) < len(clicks) <= MOST_CLICKS
