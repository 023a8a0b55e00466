"""Many masks at once as run lengths: measures and set operations without decoding to pixels.

A `MaskArray` holds the foreground runs of N masks in flat arrays, so that an operation takes a few numpy
calls for any number of masks. Positions count pixels down the columns, x * height + y, as in COCO.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Point = tuple[float, float]

_FIRST_CHAR = 48
_MAX_CHARS = 7
"""Characters of a number: 35 bits; any run of an image that fits in memory is shorter."""


@dataclass(frozen=True, slots=True, eq=False)
class MaskArray:
    """N masks. Mask i has the runs `first[i]:first[i + 1]`, in order; two runs of a mask never touch.

    Args:
        heights, widths: N sizes in pixels.
        first: N + 1 offsets into the runs.
        starts, ends: positions of the runs' first pixels, and those behind their last ones.
    """

    heights: Ints
    widths: Ints
    first: Ints
    starts: Ints
    ends: Ints

    def __len__(self) -> int:
        return len(self.heights)

    @classmethod
    def from_counts(cls, counts: Sequence[bytes], heights: Ints, widths: Ints) -> MaskArray:
        """Masks of COCO compressed counts.

        Raises:
            ValueError: a size is not positive, or counts are damaged or of a mask of another size.
        """
        bad = np.flatnonzero((heights < 1) | (widths < 1))
        if bad.size:
            height, width = int(heights[bad[0]]), int(widths[bad[0]])
            raise ValueError(f"mask of size {height}x{width} (height x width): both must be at least 1")
        lengths, first = _decoded(counts)
        pixels = heights * widths
        stops = np.cumsum(lengths)
        # Positions within each mask: without the pixels of the masks before it.
        before = np.concatenate(([0], stops))[first]
        totals = before[1:] - before[:-1]
        wrong = np.flatnonzero(totals != pixels)
        if wrong.size:
            i = int(wrong[0])
            raise ValueError(
                f"counts cover {int(totals[i])} pixels, not the {int(pixels[i])} of a mask of "
                f"{int(heights[i])}x{int(widths[i])} (height x width)"
            )
        if lengths.size and int(lengths.min()) < 0:
            raise ValueError(f"counts hold a run of {int(lengths.min())} pixels")
        index = np.arange(len(lengths)) - np.repeat(first[:-1], np.diff(first))
        drawn = (index % 2 == 1) & (lengths > 0)
        owner = np.repeat(np.arange(len(pixels)), np.diff(first))[drawn]
        ends = stops[drawn] - before[owner]
        starts = ends - lengths[drawn]
        return _joined(owner, starts, ends, heights, widths)

    def counts(self) -> list[str]:
        """COCO compressed counts of each mask, as `mask_to_rle` writes them."""
        runs = np.diff(self.first)
        # Background before each run, the run, and the background after the last one if there is any.
        previous = np.concatenate(([0], self.ends[:-1])) if self.ends.size else self.ends
        fresh = np.zeros(len(self.starts), np.bool_)
        fresh[self.first[:-1][runs > 0]] = True
        previous = np.where(fresh, 0, previous)
        pixels = self.heights * self.widths
        last = np.zeros(len(self), np.int64)
        last[runs > 0] = self.ends[self.first[1:][runs > 0] - 1]
        rest = pixels - last
        numbers = 2 * runs + (rest > 0)
        first = np.concatenate(([0], np.cumsum(numbers)))
        values = np.empty(int(first[-1]), np.int64)
        places = np.repeat(first[:-1] - 2 * self.first[:-1], runs) + 2 * np.arange(len(self.starts))
        values[places] = self.starts - previous
        values[places + 1] = self.ends - self.starts
        values[first[1:][rest > 0] - 1] = rest[rest > 0]
        return _encoded(values, first)

    def areas(self) -> Ints:
        """N areas in pixels."""
        return self._sums(self.ends - self.starts)

    def centroids(self) -> tuple[Floats, Floats]:
        """Mean column and row index of each mask's pixels; NaN for an empty mask."""
        height = np.repeat(self.heights, np.diff(self.first))
        areas = self.areas()
        columns = self._sums(_column_sum(self.ends, height) - _column_sum(self.starts, height))
        positions = self._sums((self.starts + self.ends - 1) * (self.ends - self.starts)) // 2
        rows = positions - self.heights * columns
        with np.errstate(invalid="ignore", divide="ignore"):
            return columns / areas, rows / areas

    def contain(self, x: Floats, y: Floats) -> NDArray[np.bool_]:
        """Whether each mask has the pixel in which its point lies; pixel (0, 0) reaches from 0 to 1."""
        with np.errstate(invalid="ignore"):
            inside = (x >= 0) & (y >= 0) & (x < self.widths) & (y < self.heights)
        column = np.where(inside, x, 0).astype(np.int64)
        row = np.where(inside, y, 0).astype(np.int64)
        position = column * self.heights + row
        mask = np.arange(len(self))
        return inside & (self._covered(mask, position + 1) > self._covered(mask, position))

    def intersections(self, other: MaskArray) -> Ints:
        """Pixels that each mask shares with its counterpart. ValueError if sizes differ."""
        self._check_sizes(other)
        owner = np.repeat(np.arange(len(self)), np.diff(self.first))
        return self._sums(other._covered(owner, self.ends) - other._covered(owner, self.starts))

    def ious(self, other: MaskArray) -> Floats:
        """Intersection over union with each counterpart; 0 for two empty masks.

        Raises:
            ValueError: sizes differ.
        """
        shared = self.intersections(other)
        union = self.areas() + other.areas() - shared
        ious: Floats = shared / np.maximum(union, 1)
        return ious

    def unions(self, other: MaskArray) -> MaskArray:
        """Each mask with its counterpart. ValueError if sizes differ."""
        self._check_sizes(other)
        owner = np.concatenate(
            [np.repeat(np.arange(len(self)), np.diff(masks.first)) for masks in (self, other)]
        )
        starts = np.concatenate((self.starts, other.starts))
        ends = np.concatenate((self.ends, other.ends))
        order = np.lexsort((starts, owner))
        owner, starts, ends = owner[order], starts[order], ends[order]
        if ends.size:
            # The furthest end so far, mask by mask: they lie one behind the other.
            offset = np.concatenate(([0], np.cumsum(self.heights * self.widths)))[owner]
            ends = np.maximum.accumulate(ends + offset) - offset
        return _joined(owner, starts, ends, self.heights, self.widths)

    def crops(self, x: Ints, y: Ints, width: Ints, height: Ints) -> MaskArray:
        """The part of each mask in a box, as a mask of the box's size; nothing lies outside the frame.

        Raises:
            ValueError: a box is empty.
        """
        bad = np.flatnonzero((width < 1) | (height < 1))
        if bad.size:
            raise ValueError(
                f"box of {int(width[bad[0]])}x{int(height[bad[0]])} (width x height): both must be at least 1"
            )
        owner = np.repeat(np.arange(len(self)), np.diff(self.first))
        tall = self.heights[owner]
        # Only the columns of a run that the box has, each a piece of its own.
        left = np.maximum(self.starts // tall, x[owner])
        right = np.minimum((self.ends - 1) // tall, x[owner] + width[owner] - 1)
        pieces = np.maximum(right - left + 1, 0)
        run = np.repeat(np.arange(len(owner)), pieces)
        column = np.arange(len(run)) - np.repeat(np.cumsum(pieces) - pieces, pieces) + left[run]
        owner, tall = owner[run], tall[run]
        top = np.maximum(np.maximum(self.starts[run] - column * tall, 0), y[owner])
        bottom = np.minimum(np.minimum(self.ends[run] - column * tall, tall), y[owner] + height[owner])
        kept = top < bottom
        owner, column, top, bottom = owner[kept], column[kept], top[kept], bottom[kept]
        base = (column - x[owner]) * height[owner] - y[owner]
        return _joined(owner, base + top, base + bottom, height, width)

    def pixels_in(self, counts: Ints) -> Ints:
        """How many pixels of each mask, all of one size, lie in a region.

        Args:
            counts: height * width + 1 numbers of pixels of the region before each position.
        """
        return self._sums(counts[self.ends] - counts[self.starts])

    def take(self, chosen: Ints) -> MaskArray:
        """Some of the masks."""
        runs = np.diff(self.first)[chosen]
        first = np.concatenate(([0], np.cumsum(runs)))
        picked = np.repeat(self.first[chosen] - first[:-1], runs) + np.arange(int(first[-1]))
        return MaskArray(
            self.heights[chosen], self.widths[chosen], first, self.starts[picked], self.ends[picked]
        )

    def mask(self, index: int) -> NDArray[np.bool_]:
        """One mask as H x W pixels."""
        height, width = int(self.heights[index]), int(self.widths[index])
        change = np.zeros(height * width + 1, np.int8)
        runs = slice(int(self.first[index]), int(self.first[index + 1]))
        change[self.starts[runs]] = 1
        change[self.ends[runs]] -= 1
        return np.ascontiguousarray(np.cumsum(change[:-1], dtype=np.int8).reshape(width, height).T) > 0

    def boxed(self, index: int) -> tuple[int, int, NDArray[np.bool_]]:
        """Left and top of one mask's box, and the pixels in it; 0 x 0 pixels for an empty mask."""
        runs = slice(int(self.first[index]), int(self.first[index + 1]))
        starts, ends, height = self.starts[runs], self.ends[runs], int(self.heights[index])
        if not starts.size:
            return 0, 0, np.zeros((0, 0), np.bool_)
        left, right = int(starts[0]) // height, int(ends[-1] - 1) // height
        change = np.zeros((right - left + 1) * height + 1, np.int8)
        change[starts - left * height] = 1
        change[ends - left * height] -= 1
        pixels = np.cumsum(change[:-1], dtype=np.int8).reshape(-1, height).T > 0
        rows = np.flatnonzero(pixels.any(axis=1))
        return left, int(rows[0]), pixels[rows[0] : rows[-1] + 1]

    def _covered(self, mask: Ints, position: Ints) -> Ints:
        """How many pixels of a mask lie before a position, for many pairs of both."""
        if not self.starts.size:
            return np.zeros(len(mask), np.int64)
        offset = np.concatenate(([0], np.cumsum(self.heights * self.widths + 1)))
        owner = np.repeat(np.arange(len(self)), np.diff(self.first))
        before = np.concatenate(([0], np.cumsum(self.ends - self.starts)))
        run = np.searchsorted(self.starts + offset[owner], position + offset[mask], side="right") - 1
        own = run >= self.first[mask]
        run = np.where(own, run, 0)
        last = np.minimum(position, self.ends[run]) - self.starts[run]
        return np.where(own, before[run] - before[self.first[mask]] + last, 0)

    def _sums(self, values: Ints) -> Ints:
        """Sum over the runs of each mask."""
        before = np.concatenate(([0], np.cumsum(values)))
        return before[self.first[1:]] - before[self.first[:-1]]

    def _check_sizes(self, other: MaskArray) -> None:
        wrong = np.flatnonzero((self.heights != other.heights) | (self.widths != other.widths))
        if wrong.size:
            i = int(wrong[0])
            raise ValueError(
                f"masks of {int(self.heights[i])}x{int(self.widths[i])} and "
                f"{int(other.heights[i])}x{int(other.widths[i])} (height x width): both must have one size"
            )


def outline(pixels: NDArray[np.bool_]) -> list[list[tuple[int, int]]]:
    """The rings along the edges of a mask's pixels, as corners (x, y).

    A pixel belongs to the mask if its centre lies in an odd number of rings: outer rings go clockwise in the
    picture, those of holes the other way. Pixels that meet in a corner only are in rings of their own.
    """
    padded = np.pad(pixels, 1).astype(np.int8)
    a, b, c, d = padded[:-1, :-1], padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    sums = a + b + c + d
    diagonal = (sums == 2) & (a == d)
    ys, xs = np.nonzero((sums == 1) | (sums == 3) | diagonal)
    if not len(ys):
        return []
    double = diagonal[ys, xs]
    ys, xs, falling = np.repeat(ys, 1 + double), np.repeat(xs, 1 + double), a[ys, xs]
    # Of a corner that is there twice, the first ends the edge on its left, the second begins the one on its
    # right. Where the pixels at the upper left and lower right meet, the first goes on upwards.
    second = np.concatenate(([False], (ys[1:] == ys[:-1]) & (xs[1:] == xs[:-1])))
    twice = second | np.concatenate((second[1:], [False]))
    falling = np.repeat(falling, 1 + double)
    upper = np.where(twice, second == (falling == 0), True)
    along = np.lexsort((~upper, ys, xs))
    across = np.empty(len(along), np.int64)  # the other end of each vertical edge
    across[along[0::2]], across[along[1::2]] = along[1::2], along[0::2]
    # Horizontal edges join corners 2k and 2k + 1.
    rings: list[list[tuple[int, int]]] = []
    partner, corner = across.tolist(), list(zip(xs.tolist(), ys.tolist(), strict=True))
    below = padded[1:, 1:][ys, xs].tolist()
    seen = [False] * len(corner)
    for start in range(0, len(corner), 2):
        if seen[start]:
            continue
        ring, at = [], start
        while not seen[at]:
            seen[at] = seen[at ^ 1] = True
            ring += [corner[at], corner[at ^ 1]]
            at = partner[at ^ 1]
        # The topmost edge of an outer ring has the mask below it, and is passed to the right.
        rings.append(ring if below[start] else ring[::-1])
    return rings


def _joined(owner: Ints, starts: Ints, ends: Ints, heights: Ints, widths: Ints) -> MaskArray:
    """Masks of runs in order, of which those that touch or overlap become one."""
    if starts.size:
        fresh = np.concatenate(([True], (owner[1:] != owner[:-1]) | (starts[1:] > ends[:-1])))
        owner, starts, ends = owner[fresh], starts[fresh], ends[np.concatenate((fresh[1:], [True]))]
    first = np.searchsorted(owner, np.arange(len(heights) + 1))
    return MaskArray(heights, widths, first.astype(np.int64), starts, ends)


def _column_sum(position: Ints, height: Ints) -> Ints:
    """Sum of the column indices p // height over all p below each position."""
    columns, rest = np.divmod(position, height)
    total: Ints = height * columns * (columns - 1) // 2 + columns * rest
    return total


def _decoded(counts: Sequence[bytes]) -> tuple[Ints, Ints]:
    """Run lengths of all masks, one mask after another, and where each mask's begin."""
    sizes = np.fromiter((len(text) for text in counts), np.int64, len(counts))
    if (sizes == 0).any():
        raise ValueError("counts are empty")
    codes = np.frombuffer(b"".join(counts), np.uint8).astype(np.int64) - _FIRST_CHAR
    if not codes.size:
        return np.zeros(0, np.int64), np.zeros(1, np.int64)
    strange = np.flatnonzero((codes < 0) | (codes > 63))
    if strange.size:
        code = int(codes[strange[0]]) + _FIRST_CHAR
        raise ValueError(f"counts hold {chr(code)!r}, which no COCO encoder writes")
    final = (codes & 32) == 0
    text_ends = np.cumsum(sizes)
    if not final[text_ends - 1].all():
        raise ValueError("counts end in the middle of a number; they were cut off")
    stops = np.flatnonzero(final)
    begins = np.concatenate(([0], stops[:-1] + 1))
    chars = stops - begins + 1
    if int(chars.max()) > _MAX_CHARS:
        raise ValueError("counts hold a number of more than 35 bits; no mask is that large")
    shift = 5 * (np.arange(codes.size) - np.repeat(begins, chars))
    numbers = np.add.reduceat((codes & 31) << shift, begins)
    numbers -= np.where(codes[stops] & 16, np.int64(1) << (5 * chars), 0)
    first = np.concatenate(([0], np.searchsorted(stops, text_ends)))
    # From the fourth number of a mask on, each is the difference to the one two before it.
    index = np.arange(len(numbers)) - np.repeat(first[:-1], np.diff(first))
    for which in (index % 2 == 1, (index % 2 == 0) & (index > 0)):
        places = np.flatnonzero(which)
        if places.size:
            summed = np.cumsum(numbers[places])
            owner = np.searchsorted(first, places, side="right") - 1
            begin = np.searchsorted(owner, owner)  # the first of the same mask
            numbers[places] = summed - np.concatenate(([0], summed))[begin]
    return numbers, first


def _encoded(values: Ints, first: Ints) -> list[str]:
    """Compressed counts of run lengths; `first` says where each mask's begin."""
    index = np.arange(len(values)) - np.repeat(first[:-1], np.diff(first))
    later = np.flatnonzero(index > 2)
    numbers = values.copy()
    numbers[later] -= values[later - 2]
    # A number needs characters until the rest is its sign, which the last one's highest bit repeats.
    chars = np.ones(len(numbers), np.int64)
    for count in range(1, _MAX_CHARS):
        limit = np.int64(1) << (5 * count - 1)
        chars += (numbers < -limit) | (numbers >= limit)
    owner = np.repeat(np.arange(len(numbers)), chars)
    place = np.arange(len(owner)) - np.repeat(np.cumsum(chars) - chars, chars)
    codes = (numbers[owner] >> (5 * place)) & 31
    codes += np.where(place < chars[owner] - 1, 32, 0)
    text = (codes + _FIRST_CHAR).astype(np.uint8).tobytes().decode("ascii")
    ends = np.concatenate(([0], np.cumsum(chars)))[first].tolist()
    return [text[begin:end] for begin, end in pairwise(ends)]
