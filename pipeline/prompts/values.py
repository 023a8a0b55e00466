"""Validation of single values in a prompts file, with one-line errors.

`where` names the location in messages. All functions raise PromptError. As in JSON Schema, 3.0 counts as a
whole number and `true` does not.
"""

from __future__ import annotations

import math
import reprlib
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from pipeline.base.errors import PromptError
from pipeline.tracks.masks import MAX_OBJECT_ID, mask_to_rle, rle_to_mask

_MAX_FRAME = 2**62
_MAX_PIXELS = 2**28

_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother, _REPR.maxlong = 2, 40, 40, 40


def frame_number(value: Any, where: str) -> int:
    """Check a frame number."""
    frame = whole(value)
    if frame is None or not 0 <= frame <= _MAX_FRAME:
        raise PromptError(f"{where}: frame {short(value)} is not a frame number, 0 or more")
    return frame


def object_id(value: Any, where: str) -> int:
    """Check an object id: 1 .. 2^31 - 1."""
    number = whole(value)
    if number is None or not 1 <= number <= MAX_OBJECT_ID:
        raise PromptError(
            f"{where}: object id {short(value)} is out of range; ids go from 1 to {MAX_OBJECT_ID}"
        )
    return number


def category(value: Any, where: str) -> str | None:
    """Check a category: a text that can be stored, or None."""
    if value is None:
        return None
    if not isinstance(value, str) or not value:
        raise PromptError(f"{where}: category {short(value)} is not a text of at least one character")
    try:
        value.encode()  # JSON can contain a lone surrogate, which no output format accepts
    except UnicodeEncodeError:
        raise PromptError(f"{where}: category {value!a} has half a character: write it again") from None
    return value


def box(value: Any, where: str) -> tuple[float, float, float, float]:
    """Check a box: x, y, width, height in pixels, width and height above 0."""
    numbers = _numbers(value, f"{where}: box")
    if len(numbers) != 4:
        raise PromptError(f"{where}: box {short(value)} needs four numbers: x, y, width, height")
    if numbers[2] <= 0 or numbers[3] <= 0:
        raise PromptError(f"{where}: box {short(value)} has no area; width and height must be above 0")
    return numbers[0], numbers[1], numbers[2], numbers[3]


def polygons(value: Any, where: str) -> tuple[tuple[float, ...], ...]:
    """Check outlines of three points or more, each x1, y1, x2, y2, ..."""
    outlines = [_numbers(p, f"{where}: polygon") for p in as_list(value, f"{where}: polygons")]
    if not outlines:
        raise PromptError(f"{where}: polygons is empty; give at least one")
    for outline in outlines:
        if len(outline) < 6 or len(outline) % 2:
            raise PromptError(
                f"{where}: a polygon of {len(outline)} numbers; need x, y of at least three points"
            )
    return tuple(outlines)


def rle(value: Any, where: str) -> tuple[int, int, str]:
    """Check a mask: (height, width, COCO compressed counts), not empty."""
    if not isinstance(value, dict) or set(value) != {"size", "counts"}:
        raise PromptError(f'{where}: rle {short(value)}: expected {{"size": [height, width], "counts": ...}}')
    sides = _wholes(value["size"])
    if sides is None or len(sides) != 2 or min(sides) < 1:
        raise PromptError(f"{where}: rle size {short(value['size'])} is not [height, width]")
    height, width = sides
    if height * width > _MAX_PIXELS:
        raise PromptError(f"{where}: rle size {short(value['size'])} is more than {_MAX_PIXELS} pixels")
    counts = value["counts"] if isinstance(value["counts"], str) else _wholes(value["counts"])
    if counts is None:
        raise PromptError(
            f"{where}: rle counts {short(value['counts'])} are neither a text nor a list of run lengths"
        )
    try:
        mask = rle_to_mask(counts, height, width)
    except ValueError as error:
        raise PromptError(f"{where}: {error}") from error
    if not mask.any():
        raise PromptError(f"{where}: its mask is empty; draw it again")
    return height, width, mask_to_rle(mask)


def mask(value: ArrayLike, where: str) -> tuple[int, int, str]:
    """Convert an H x W bool or 0/1 array that is not empty to (height, width, COCO compressed counts)."""
    array = np.asarray(value)
    if array.ndim != 2 or not array.size:
        raise PromptError(f"{where}: mask has shape {array.shape}; it must be height x width")
    if array.dtype != np.bool_:
        found = np.unique(array) if array.dtype.kind in "iuf" else array.ravel()[:1]
        others = [v for v in found.tolist() if v not in (0, 1)]
        if others:
            raise PromptError(
                f"{where}: mask holds {short(others[0])}; it must be bool, or hold 0 and 1 only: mask > 0"
            )
    if not array.any():
        raise PromptError(f"{where}: its mask is empty; draw it again")
    return *array.shape, mask_to_rle(array)


def _numbers(value: Any, where: str) -> tuple[float, ...]:
    numbers = []
    for number in as_list(value, where):
        try:
            # An integer may be too large for a float.
            fits = isinstance(number, (int, float)) and not isinstance(number, bool) and math.isfinite(number)
        except OverflowError:
            fits = False
        if not fits:
            raise PromptError(f"{where}: {short(number)} is not a number of pixels")
        numbers.append(float(number))
    return tuple(numbers)


def as_list(value: Any, where: str) -> list[Any]:
    """Check that a value is a list."""
    if not isinstance(value, list):
        raise PromptError(f"{where}: expected a list, not {short(value)}")
    return value


def whole(value: Any) -> int | None:
    """Return the value as int if it is a whole number, else None.

    3.0 is one, as in JSON Schema, and True is not.
    """
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return int(value) if isinstance(value, int | np.integer) and not isinstance(value, bool) else None


def _wholes(value: Any) -> list[int] | None:
    """Return the values of a list of whole numbers, else None."""
    if not isinstance(value, list):
        return None
    numbers = [whole(v) for v in value]
    return None if None in numbers else [n for n in numbers if n is not None]


def short(value: Any) -> str:
    """Format a value for a message: one line, short however large or deep the value is."""
    text = _REPR.repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
