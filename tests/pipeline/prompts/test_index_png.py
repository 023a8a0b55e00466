"""Index PNGs of every bit depth and colour type decode to the written values."""

from __future__ import annotations

import zlib

import cv2
import numpy as np
import pytest
from reference.plain_png import GREY, GREY_ALPHA, PALETTE, RGB, RGBA, plain_png

from pipeline.base.errors import PromptError
from pipeline.prompts.index_png import decode_index_png


def values_of(depth: int, height: int = 9, width: int = 13) -> np.ndarray:
    return np.random.default_rng(depth).integers(0, 1 << depth, (height, width))


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_grey_values_come_back_unstretched(depth: int) -> None:
    values = values_of(depth)
    found = decode_index_png(plain_png(values, depth, GREY), "m.png")
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, values)


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_palette_indices_come_back_whatever_the_colours(depth: int) -> None:
    values = values_of(depth)
    black = [(0, 0, 0)] * (1 << depth)
    np.testing.assert_array_equal(decode_index_png(plain_png(values, depth, PALETTE, black), "m.png"), values)


def test_a_palette_padded_with_black_keeps_background_and_objects_apart() -> None:
    values = np.array([[0, 1, 2], [2, 1, 0]])
    palette = [(0, 0, 0), (128, 0, 0), (0, 0, 0), (0, 0, 0)]
    np.testing.assert_array_equal(decode_index_png(plain_png(values, 2, PALETTE, palette), "m.png"), values)


def test_indices_outside_the_palette_are_kept() -> None:
    values = np.array([[0, 7, 200]])
    np.testing.assert_array_equal(
        decode_index_png(plain_png(values, 8, PALETTE, [(1, 2, 3)]), "m.png"), values
    )


def test_transparency_and_gamma_change_nothing() -> None:
    values = values_of(8)
    extra = [(b"gAMA", (30000).to_bytes(4, "big")), (b"tEXt", b"Comment\0hello")]
    np.testing.assert_array_equal(decode_index_png(plain_png(values, 8, GREY, extra=extra), "m.png"), values)
    colours = [(i, 255 - i, 7) for i in range(256)]
    see_through = [(b"tRNS", bytes([0, 10, 128]))]
    data = plain_png(values, 8, PALETTE, colours, extra=see_through)
    np.testing.assert_array_equal(decode_index_png(data, "m.png"), values)


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("kind", [GREY_ALPHA, RGB, RGBA])
def test_equal_channels_count_as_grey_and_alpha_as_nothing(kind: int, depth: int) -> None:
    values = values_of(depth)
    channels = [values] * (1 if kind == GREY_ALPHA else 3)
    if kind in (GREY_ALPHA, RGBA):
        channels.append(values[::-1] % (1 << depth))
    data = plain_png(np.dstack(channels), depth, kind)
    np.testing.assert_array_equal(decode_index_png(data, "m.png"), values)


def test_opencv_itself_agrees_where_nothing_is_ambiguous() -> None:
    values = values_of(16)
    written = cv2.imencode(".png", values.astype(np.uint16))[1].tobytes()
    np.testing.assert_array_equal(decode_index_png(written, "m.png"), values)


def test_a_coloured_picture_is_refused() -> None:
    picture = np.dstack([values_of(8), values_of(8), values_of(8)])
    picture[4, 4, 1] ^= 1  # a single value of a single channel
    with pytest.raises(PromptError, match=r"^m\.png is a coloured picture: give a PNG with one value per"):
        decode_index_png(plain_png(picture, 8, RGB), "m.png")


GOOD = plain_png(values_of(8), 8, GREY)


@pytest.mark.parametrize(
    "data", [b"", b"hello", GOOD[1:], cv2.imencode(".jpg", np.ones((9, 9)))[1].tobytes()]
)
def test_what_is_no_png_is_refused(data: bytes) -> None:
    with pytest.raises(PromptError, match=r"^m\.png is not a PNG: give"):
        decode_index_png(data, "m.png")


@pytest.mark.parametrize("length", range(8, len(GOOD)))
def test_a_png_cut_off_anywhere_is_refused(length: int) -> None:
    with pytest.raises(PromptError, match=r"^m\.png is a damaged PNG \(cut off after \d+ bytes\): write it"):
        decode_index_png(GOOD[:length], "m.png")


@pytest.mark.parametrize("position", range(len(GOOD)))
def test_a_flipped_bit_anywhere_is_refused(position: int) -> None:
    data = bytearray(GOOD)
    data[position] ^= 4
    with pytest.raises(PromptError, match=r"^m\.png is [^\n]*$"):
        decode_index_png(bytes(data), "m.png")


def test_pixels_that_end_early_are_refused() -> None:
    values = np.ones((4, 4), np.int64)
    half = plain_png(values[:2], 8, GREY)
    claims_more = plain_png(values, 8, GREY)[:33] + half[33:]
    with pytest.raises(PromptError, match="cannot be decoded"):
        decode_index_png(claims_more, "m.png")


def test_a_header_in_the_wrong_place_is_refused() -> None:
    swapped = GOOD[:8] + GOOD[33:]  # without its first chunk
    with pytest.raises(PromptError, match="header is wrong"):
        decode_index_png(swapped, "m.png")


def test_a_size_no_memory_holds_is_refused() -> None:
    header = bytearray(GOOD[12:29])
    header[4:12] = (60000).to_bytes(4, "big") * 2
    data = GOOD[:12] + bytes(header) + zlib.crc32(bytes(header)).to_bytes(4, "big") + GOOD[33:]
    with pytest.raises(PromptError, match=r"m\.png"):
        decode_index_png(data, "m.png")
