"""Image folders as videos: natural order, no timestamps, sizes may differ."""

from __future__ import annotations

import hashlib
import logging
import re
from array import array
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.base.closeable import Closing
from pipeline.base.errors import NotAVideoError
from pipeline.base.picture_size import MAX_PIXELS, check_limit, check_size, header_size
from pipeline.base.records import Event, Frame
from pipeline.base.redaction import redacted, shareable
from pipeline.storage.locations import Location, read_error
from pipeline.storage.retries import retry

log = logging.getLogger(__name__)

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


class ImageFolder(Closing):
    """The images directly inside a folder or prefix, as frames without timestamps.

    An image that cannot be decoded does not become a frame: it is reported as a `corrupt` event on the next
    one that can. EXIF orientation is applied, transparency dropped, 16-bit images reduced to 8. Attributes
    are those of `pipeline.video.sources.VideoSource`. Raises NotAVideoError if there are no images or none
    can be decoded; PictureTooLargeError, without decoding it, for an image of more than `max_pixels` pixels.
    """

    rate: float | None = None
    container = "images"
    damaged = False  # images before the requested one are always decoded

    def __init__(self, location: Location, *, max_pixels: int = MAX_PIXELS) -> None:
        self._max_pixels = check_limit(max_pixels)
        self.uri = location.uri
        self.trailing_losses: tuple[Event, ...] = ()
        self._location = location
        self._entries = _list_images(location)
        if not self._entries:
            kinds = ", ".join(s[1:] for s in SUFFIXES)
            raise NotAVideoError(f"{self.uri}: the folder has no images; it needs files of type {kinds}")
        self.frame_count: int | None = len(self._entries)
        self.codec = self._entries[0][0].rsplit(".", 1)[1].lower()
        self.fingerprint = _fingerprint(self._entries)
        # Entry of each frame, as far as they were read: what was counted once need not be decoded again.
        self._read = array("q")
        first = next(self.frames(), None)
        if first is None:
            raise NotAVideoError(
                f"{self.uri}: none of the folder's {len(self._entries)} images can be decoded; replace them"
            )
        self.height, self.width = first.size

    def frames(self, start: int = 0, *, previous_pts_seconds: float | None = None) -> Iterator[Frame]:
        """Yield frames from `start` on. Images before it are decoded once, too, to count the broken ones."""
        del previous_pts_seconds  # images have no timestamps
        self.trailing_losses = ()
        lost = 0
        names: list[str] = []
        index = min(start, len(self._read))
        first = self._read[index - 1] + 1 if index else 0
        for entry, (path, info) in enumerate(self._entries[first:], first):
            image = self._decode(path, info)
            if image is None:
                lost += 1
                names.append(path.rsplit("/", 1)[-1])
                continue
            losses = _losses(index, lost, names)
            lost, names = 0, []
            if index == len(self._read):
                self._read.append(entry)
            if index >= start:
                yield Frame(image, index, None, losses=losses)
            index += 1
        self.trailing_losses = _losses(index, lost, names)

    def _decode(self, path: str, info: dict[str, Any]) -> NDArray[np.uint8] | None:
        try:
            data = self._location.read_bytes(path, info.get("size"))
        except Exception as error:
            raise read_error(f"{self.uri}: {path}", error) from shareable(error)
        size = header_size(data)
        if size is None or not _looks_whole(data):
            return None
        check_size(f"{self.uri}: {path.rsplit('/', 1)[-1]}", *size, self._max_pixels)
        level = cv2.utils.logging.getLogLevel()
        cv2.utils.logging.setLogLevel(0)  # OpenCV would print errors to stderr that are reported as events
        try:
            bgr = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        except cv2.error as error:
            log.debug("%s: %s", redacted(path), error)
            return None
        finally:
            cv2.utils.logging.setLogLevel(level)
        if bgr is None:
            return None
        return np.asarray(cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB), dtype=np.uint8)

    def close(self) -> None:
        """Do nothing: no file stays open between frames."""

    def __repr__(self) -> str:
        return f"ImageFolder({redacted(self.uri)!r}, {self.frame_count} images, {self.width}x{self.height})"


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sort key that puts frame2 before frame10."""
    parts = re.split(r"(\d+)", name)
    return [(1, int(p), p) if p.isdecimal() else (0, 0, p.lower()) for p in parts if p]


def _list_images(location: Location) -> list[tuple[str, dict[str, Any]]]:
    try:
        listed = retry(f"list {location.uri}", lambda: location.fs.ls(location.path, detail=True))
    except Exception as error:
        raise read_error(location.uri, error) from shareable(error)
    found = []
    for entry in listed:
        name = str(entry["name"]).rsplit("/", 1)[-1]
        if entry.get("type") == "file" and name.lower().endswith(SUFFIXES) and not name.startswith("."):
            found.append((str(entry["name"]), dict(entry)))
    return sorted(found, key=lambda e: (natural_key(e[0].rsplit("/", 1)[-1]), e[0]))


def _fingerprint(entries: list[tuple[str, dict[str, Any]]]) -> str:
    digest = hashlib.sha256()
    for path, info in entries:
        mark = info.get("ETag") or ""
        digest.update(f"{path.rsplit('/', 1)[-1]}|{info.get('size')}|{mark}\n".encode())
    return f"{len(entries)}-{digest.hexdigest()[:16]}"


def _looks_whole(data: bytes) -> bool:
    """Return False for a truncated JPEG or PNG, whose missing part OpenCV would fill with grey."""
    if data.startswith(b"\xff\xd8"):
        return b"\xff\xd9" in data[-4096:]
    if data.startswith(b"\x89PNG"):
        return b"IEND" in data[-4096:]
    return True


def _losses(frame_index: int, lost: int, names: list[str]) -> tuple[Event, ...]:
    if not lost:
        return ()
    return (Event(frame_index, "corrupt", "image cannot be decoded", lost, detail={"files": names[:8]}),)
