"""Tiles: they cover the frame, cut boxes are known, and their turn comes sooner where something happens."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.detect.tiles import Rotation, is_cut, thumbnail_of, tiles_of

STILL = np.full((576, 768, 3), 100, np.uint8)


@pytest.mark.parametrize("size", [(576, 768), (1080, 1920), (1920, 1080), (240, 240), (300, 1500)])
def test_everything_up_to_the_overlap_lies_completely_in_some_tile(size: tuple[int, int]) -> None:
    height, width = size
    tiles = tiles_of(height, width)
    assert tiles[0] == (0, 0, width, height)
    assert all(x >= 0 and y >= 0 and x + w <= width and y + h <= height for x, y, w, h in tiles)
    reach = int(0.19 * min(size))
    for y in range(0, height - reach, 7):
        for x in range(0, width - reach, 7):
            box = (x, y, x + reach, y + reach)
            assert any(
                left <= box[0] and top <= box[1] and box[2] <= left + w and box[3] <= top + h
                for left, top, w, h in tiles[1:]
            )


def test_a_small_frame_has_no_tiles() -> None:
    assert tiles_of(200, 900) == [(0, 0, 900, 200)]


def test_boxes_at_inner_edges_are_cut_and_those_at_the_frames_edge_are_not() -> None:
    tile = (0, 200, 300, 300)
    assert is_cut((100, 202, 140, 300), tile, 600, 800)
    assert is_cut((250, 300, 298, 400), tile, 600, 800)
    assert is_cut((100, 400, 140, 499), tile, 600, 800)
    assert not is_cut((0, 300, 40, 400), tile, 600, 800)
    assert not is_cut((0, 0, 800, 600), (0, 0, 800, 600), 600, 800)


def test_every_tile_has_its_turn_and_none_waits_for_long() -> None:
    tiles = tiles_of(576, 768)
    rotation = Rotation([0] * len(tiles), thumbnail_of(STILL))
    looks = [rotation.choose(tiles, 2, STILL, ()) for _ in range(4)]
    assert sorted({at for look in looks for at in look}) == list(range(7))
    assert all(len(look) == 2 for look in looks)


def test_tiles_with_motion_and_wanted_boxes_come_sooner() -> None:
    tiles = tiles_of(576, 768)
    rotation = Rotation([0] * len(tiles), thumbnail_of(STILL))
    moved = STILL.copy()
    moved[500:560, 700:760] = 255
    assert 6 in rotation.choose(tiles, 2, moved, ())  # the last one, at the lower right

    quiet = Rotation([0] * len(tiles), thumbnail_of(STILL))
    assert quiet.choose(tiles, 1, STILL, [(10, 460, 30, 70)]) == [4]  # at the lower left
