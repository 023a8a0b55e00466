"""Recordings in pieces: several video files, one after the other, as one video.

Frames are numbered through. Times go on where the file before ended: its last frame's time and the duration
of a frame. If all file names contain the time at which they begin, and these times ascend, a file that begins
over two seconds later than that begins at its own time, and the time that is missing is a `gap` event; names
are exact to the second only. A file after the first that is no video is a `gap` event, too.
"""

from __future__ import annotations

import hashlib
import logging
import re
from array import array
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import pairwise
from typing import Any

from pipeline.base.closeable import Closing
from pipeline.base.errors import NotAVideoError, SourceError, one_line
from pipeline.base.records import Event, Frame
from pipeline.base.redaction import redacted
from pipeline.storage.locations import locate
from pipeline.video.video_file import VideoFile

log = logging.getLogger(__name__)

TOLERANCE = 2.0
"""A file that begins later than expected by at most so many seconds goes on without a gap."""
_TIME = re.compile(r"(20\d\d)-?(\d\d)-?(\d\d)[T_ -]?(\d\d)[-_:.h]?(\d\d)[-_:.m]?(\d\d)(?!\d)")
_THREADS = 8


@dataclass(frozen=True)
class _Part:
    """What a file contributes, known once it was read or indexed completely.

    Args:
        frames: their number.
        first, last: the file's own times of its first and last frame in seconds; None without times.
        rate: frames per second.
        trailing: losses after the last frame, numbered as in the file.
        unreadable: why it is no video; then it has no frames.
    """

    frames: int
    first: float | None
    last: float | None
    rate: float | None
    trailing: tuple[Event, ...] = ()
    unreadable: str | None = None


@dataclass
class _Place:
    """Where the next file begins.

    Args:
        frame: its first frame's number.
        end: time at which the file before ended; None if frames have no times, or nothing came before.
        origin: time of the first frame of all; it belongs to the time in the first file's name.
        pending: losses to report on the next frame.
    """

    frame: int = 0
    end: float | None = None
    origin: float | None = None
    pending: tuple[Event, ...] = ()


class JoinedVideo(Closing):
    """Several files as one `pipeline.video.sources.VideoSource`; width, height and rate are the first one's.

    Only one file is open at a time. A resume counts the frames of the files before by their packet index, if
    the time of the frame before confirms it; otherwise they are decoded again.

    Raises:
        NoSuchSourceError: a file is missing. NotAVideoError: the first file is no video. SourceError.
    """

    def __init__(
        self,
        uri: str,
        parts: Sequence[str],
        open_file: Callable[[str], VideoFile],
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        self.uri = uri
        self.trailing_losses: tuple[Event, ...] = ()
        self.damaged = False
        self._uris, self._open_file = list(parts), open_file
        self._times = _times_in_names(self._uris)
        with ThreadPoolExecutor(_THREADS) as pool:
            prints = list(pool.map(lambda part: locate(part, storage_options).fingerprint(), self._uris))
        digest = hashlib.sha256("|".join(prints).encode()).hexdigest()
        self.fingerprint = f"{len(prints)}-files-{digest[:16]}"
        self._known: dict[int, _Part] = {}
        self._indexes: dict[int, Sequence[float]] = {}
        self._opened: tuple[int, VideoFile] | None = None
        first = self._video(0)
        self.height, self.width, self.rate = first.height, first.width, first.rate
        self.container, self.codec = first.container, first.codec
        # Files of a recording are about equally long.
        self.frame_count = None if first.frame_count is None else first.frame_count * len(self._uris)

    def close(self) -> None:
        """Close the file that is open; `frames` opens it again."""
        opened, self._opened = self._opened, None
        if opened is not None:
            opened[1].close()

    def __repr__(self) -> str:
        return f"JoinedVideo({len(self._uris)} files, the first {redacted(self._uris[0])!r})"

    def frames(self, start: int = 0, *, previous_pts_seconds: float | None = None) -> Iterator[Frame]:
        """Yield frames from `start` on, as `pipeline.video.sources.VideoSource.frames` does."""
        if start < 0:
            raise SourceError(f"frames from {start}: frame numbers begin at 0")
        return self._frames(start, previous_pts_seconds)

    def _frames(self, start: int, previous: float | None) -> Generator[Frame]:
        self.trailing_losses = ()
        number, place, before = self._found(start, previous)
        while number < len(self._uris):
            way = self._frames_of(number, place, start, before)
            with closing(way):
                yield from way
            place, before = self._after(number, place), None
            number += 1
        self.trailing_losses = tuple(replace(e, frame_index=place.frame) for e in place.pending)

    def _frames_of(self, number: int, place: _Place, start: int, before: float | None) -> Generator[Frame]:
        """The frames of a file from frame `start` of all on; what is learnt of it is kept in `_known`.

        Args:
            before: the file's own time of the frame before `start`, if it may seek.
        """
        try:
            video = self._video(number)
        except NotAVideoError as error:
            if number == 0:
                raise
            log.warning("%s is left out: %s", redacted(self._uris[number]), redacted(one_line(error)))
            self._known[number] = _Part(0, None, None, None, unreadable=redacted(one_line(error)))
            return
        local = start - place.frame if before is not None else 0
        first = self._first_time(number) if local else None
        base: float | None = None
        gap: tuple[Event, ...] = ()
        last, count = before, local
        for frame in video.frames(local, previous_pts_seconds=before):
            if first is None:
                first = frame.pts_seconds
            if frame.frame_index == local:
                base, gap = self._begin(number, place, first, video.rate)
            index = frame.frame_index + place.frame
            own = frame.pts_seconds
            pts = None if base is None or own is None else _shifted(own, first, base)
            last, count = own, frame.frame_index + 1
            self.damaged |= video.damaged
            losses: tuple[Event, ...] = ()
            if frame.frame_index == 0:
                losses = place.pending + gap
            losses += frame.losses
            if index >= start:
                renumbered = tuple(replace(e, frame_index=index, pts_seconds=pts) for e in losses)
                yield frame.renumbered(index, pts, renumbered)
        self.damaged |= video.damaged
        self._known[number] = _Part(count, first, last, video.rate, video.trailing_losses)

    def _begin(
        self, number: int, place: _Place, first: float | None, rate: float | None
    ) -> tuple[float | None, tuple[Event, ...]]:
        """The time of a file's first frame, and the gap before it."""
        if number == 0:
            return first, ()
        if first is None or place.end is None:
            return None, ()
        if self._times is not None and place.origin is not None:
            named = place.origin + self._times[number]
            if named - place.end > TOLERANCE:
                detail = {"seconds": round(named - place.end, 3), "file": _name(self._uris[number])}
                return named, (Event(place.frame, "gap", "between files", 0, detail=detail),)
        return place.end, ()

    def _after(self, number: int, place: _Place) -> _Place:
        """Where the file after a known one begins."""
        part = self._known[number]
        if part.unreadable is not None:
            detail = {"file": _name(self._uris[number]), "cause": part.unreadable}
            gap = Event(place.frame, "gap", "file is no video", 0, detail=detail)
            return replace(place, pending=(*place.pending, gap))
        end, origin = None, place.origin
        base, _ = self._begin(number, place, part.first, part.rate)
        if base is not None and part.first is not None and part.last is not None:
            origin = base if origin is None else origin
            rate = part.rate or self.rate
            end = _shifted(part.last, part.first, base) + (1 / rate if rate else 0.0)
        return _Place(place.frame + part.frames, end, origin, part.trailing)

    def _found(self, start: int, previous: float | None) -> tuple[int, _Place, float | None]:
        """The file with frame `start`, where it begins, and its own time of the frame before, to seek.

        Without certainty this is the first file.
        """
        place, before = _Place(), None
        if previous is None or start == 0:
            return 0, place, None
        for number in range(len(self._uris)):
            times = self._indexed(number)
            if times is None:
                break
            part = self._known[number]
            if part.frames and place.frame < start <= place.frame + part.frames:
                local = start - place.frame
                base, _ = self._begin(number, place, part.first, part.rate)
                if base is None or _shifted(times[local - 1], part.first, base) != previous:
                    break
                if local < part.frames:
                    return number, place, times[local - 1]
                return number + 1, self._after(number, place), None
            place = self._after(number, place)
        log.info("%s: decoding starts over to reach frame %d", self, start)
        self._known.clear()
        self._indexes.clear()
        return 0, _Place(), before

    def _indexed(self, number: int) -> Sequence[float] | None:
        """The file's own times of all its frames, by its packet index; what it contributes becomes known."""
        found = self._indexes.get(number)
        if found is not None and number in self._known:
            return found
        try:
            video = self._video(number)
            times = video.indexed_times()
        except NotAVideoError as error:
            if number == 0:
                raise
            self._known[number] = _Part(0, None, None, None, unreadable=redacted(one_line(error)))
            return ()
        if times is None or not len(times):
            return None
        self._known[number] = _Part(len(times), times[0], times[-1], video.rate)
        self._indexes[number] = array("d", times)
        return times

    def _first_time(self, number: int) -> float | None:
        part = self._known.get(number)
        return None if part is None else part.first

    def _video(self, number: int) -> VideoFile:
        if self._opened is not None and self._opened[0] == number:
            return self._opened[1]
        self.close()
        video = self._open_file(self._uris[number])
        self._opened = number, video
        return video


def _shifted(own: float, first: float | None, base: float) -> float:
    """A file's own time on the clock of all. Always computed like this, so that equal times are equal."""
    return own if first == base else base + (own - (first or 0.0))


def _name(uri: str) -> str:
    return redacted(uri.rstrip("/").rpartition("/")[2])


def _times_in_names(uris: Sequence[str]) -> list[float] | None:
    """Seconds from the time in the first file's name to that in each; None unless all have one, ascending."""
    found = []
    for uri in uris:
        match = list(_TIME.finditer(_name(uri)))
        if len(match) != 1:
            return None
        try:
            found.append(datetime(*(int(digits) for digits in match[0].groups())))  # type: ignore[arg-type]
        except ValueError:
            return None
    seconds = [(time - found[0]).total_seconds() for time in found]
    return seconds if all(a < b for a, b in pairwise(seconds)) else None
