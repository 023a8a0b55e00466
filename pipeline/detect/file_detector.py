"""The detector `file:PATH`: replays the detections of a file, which another program made.

Two formats, told apart by the first line:

- MOT text without a header, `frame,id,x,y,w,h,score,...`. Frames count from 1: MOT frame 1 is frame_index 0.
  Ids and what follows the score are ignored.
- CSV with a header that names at least `frame_index`, `x`, `y`, `w` and `h`, and optionally `score` and
  `category`. Frames count from 0.

Boxes are in pixels of the frame, (x, y) the upper left corner.
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.base.errors import UsageError
from pipeline.base.records import Frame
from pipeline.base.redaction import shareable
from pipeline.detect.boxes import pixel_box
from pipeline.detect.protocol import Detection
from pipeline.storage.locations import locate, read_error

_MAGIC = b"xmem-file-detector-1\n"
_NEEDED = ("frame_index", "x", "y", "w", "h")
_COLUMNS = (*_NEEDED, "score", "category")
_FORMATS = f"MOT text (frame,id,x,y,w,h,score) or CSV with a header ({','.join(_COLUMNS)})"


@dataclass(frozen=True, slots=True)
class _Row:
    line: int
    box: tuple[float, float, float, float]
    score: float
    category: str | None


class FileDetector:
    """Replays a file's detections on the frames that they are of; a `Detector`.

    Args:
        uri: path or URI of the file; see the module's docstring for its format.

    Attributes:
        categories: empty if no detection of the file has a class, else None.

    Raises:
        UsageError: the file cannot be read, or a line of it is wrong; the message names the line.
    """

    def __init__(self, uri: str) -> None:
        self._uri = uri
        try:
            content = locate(uri).read_bytes()
        except Exception as error:
            raise UsageError(f"detections cannot be read: {read_error(uri, error)}") from shareable(error)
        self._digest = hashlib.sha256(content).digest()
        self._frames: dict[int, list[_Row]] = {}
        for frame_index, row in _parsed(content, uri):
            self._frames.setdefault(frame_index, []).append(row)
        rows = [row for rows in self._frames.values() for row in rows]
        # A class may be rare: that the file has none of it is no mistake, unless it has no classes at all.
        named = any(row.category is not None for row in rows)
        self.categories: tuple[str, ...] | None = None if named or not rows else ()

    def detect(self, frame: Frame) -> list[Detection]:
        """The frame's detections in the file's order, boxes in whole pixels and cut at the frame's edge.

        Raises:
            UsageError: a box has no pixel inside the frame, so the file is of another video.
        """
        height, width = frame.size
        found = []
        for row in self._frames.get(frame.frame_index, ()):
            box = pixel_box(row.box, width, height)
            if box is None:
                x, y, w, h = row.box
                raise UsageError(
                    f"{self._uri} line {row.line}: box {x:g},{y:g},{w:g},{h:g} is outside frame "
                    f"{frame.frame_index} of {width}x{height} pixels; use detections of this video, in its "
                    "pixels"
                )
            found.append(Detection(box=box, category=row.category, score=row.score))
        return found

    def to_bytes(self) -> bytes:
        """A digest of the file: replaying has no other state."""
        return _MAGIC + self._digest

    def from_bytes(self, blob: bytes) -> None:
        """Raises ValueError unless the bytes are of a detector of the same file content."""
        if blob != self.to_bytes():
            raise ValueError(f"they are not of a file detector with the content of {self._uri}")


def _parsed(content: bytes, uri: str) -> Iterator[tuple[int, _Row]]:
    """Frame index and row of each line. Raises UsageError."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{uri} is not a text file of detections: {error.reason} at byte {error.start}"
        ) from error
    first = 1  # number of the first frame
    columns = {"frame_index": 0, "x": 2, "y": 3, "w": 4, "h": 5, "score": 6}
    for number, values in enumerate(csv.reader(io.StringIO(text)), start=1):
        fields = [value.strip() for value in values]
        if not any(fields):
            continue
        if number == 1 and not _is_number(fields[0]):
            columns, first = _header(fields, uri), 0
            continue
        try:
            yield _row(fields, columns, first, number)
        except ValueError as error:
            raise UsageError(f"{uri} line {number}: {error}; expected {_FORMATS}") from error


def _header(fields: list[str], uri: str) -> dict[str, int]:
    columns = {name: fields.index(name) for name in _COLUMNS if name in fields}
    missing = [name for name in _NEEDED if name not in columns]
    if missing:
        raise UsageError(f"{uri} line 1: no column {', '.join(missing)}; expected {_FORMATS}")
    return columns


def _row(fields: list[str], columns: dict[str, int], first: int, line: int) -> tuple[int, _Row]:
    """Raises ValueError."""
    needed = [columns[name] for name in _NEEDED]
    if max(needed) >= len(fields):
        raise ValueError(f"{len(fields)} values")
    number, x, y, w, h = (_number(fields[at]) for at in needed)
    frame_index = int(number) - first
    if frame_index < 0 or number != int(number):
        raise ValueError(f"frame {fields[needed[0]]}, not a whole number from {first} on")
    if w <= 0 or h <= 0:
        raise ValueError(f"box of {w:g} x {h:g} pixels")
    score_at, category_at = columns.get("score"), columns.get("category")
    has_score = score_at is not None and score_at < len(fields) and fields[score_at] != ""
    score = _number(fields[score_at]) if has_score and score_at is not None else 1.0
    if not 0 <= score <= 1:
        raise ValueError(f"score {score:g}, not from 0 to 1")
    has_category = category_at is not None and category_at < len(fields)
    category = fields[category_at] if has_category and category_at is not None else ""
    return frame_index, _Row(line, (x, y, w, h), score, category or None)


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
