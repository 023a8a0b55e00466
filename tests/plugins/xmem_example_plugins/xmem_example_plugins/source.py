"""Source squares://WIDTHxHEIGHT/FRAMES: a bright square that moves over a dark, textured background."""

import re
from collections.abc import Iterator

import numpy as np

from pipeline.base.errors import SourceError
from pipeline.base.records import Frame

_URI = re.compile(r"squares://(\d{2,4})x(\d{2,4})/(\d{1,6})")


class Squares:
    """Computes each frame independently, so that reading can start anywhere."""

    def open(self, uri: str, start: int) -> Iterator[Frame]:
        match = _URI.fullmatch(uri)
        if match is None:
            raise SourceError(f"{uri}: invalid URI; give squares://WIDTHxHEIGHT/FRAMES")
        width, height, count = (int(text) for text in match.groups())
        return (_frame(index, width, height) for index in range(start, count))


def _frame(index: int, width: int, height: int) -> Frame:
    noise = np.random.default_rng(index)
    image = noise.integers(20, 60, (height, width, 3), dtype=np.uint8)
    side = min(width, height) // 3
    left = index * 2 % (width - side)
    image[side : 2 * side, left : left + side] = (230, 220, 210)
    return Frame(image, index, index / 25)
