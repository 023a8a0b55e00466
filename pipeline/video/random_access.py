"""Pictures of a video in any order, for a person who moves through it.

A few decoded frames around the last one asked for are kept. A video file is entered at the keyframe that its
packet index gives, so that the first picture of any frame costs one group of pictures.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Generator, Iterator
from contextlib import suppress
from typing import cast

from pipeline.base.closeable import Closing
from pipeline.base.errors import SourceError, UsageError
from pipeline.base.records import Frame
from pipeline.video.sources import VideoSource
from pipeline.video.video_file import VideoFile

KEPT_BYTES = 192 * 2**20
_AHEAD = 48
"""Frames up to this far ahead are reached by decoding on; beyond, by seeking."""
_BACK = 12
"""Frames before the wanted one that are kept too after a seek: the next step may go back."""


class FrameAccess(Closing):
    """Random access to the frames of one opened source. Thread-safe; one frame is decoded at a time.

    Args:
        source: the video; closed with this object.
        kept_bytes: decoded frames are kept up to this many bytes, those used last.
    """

    def __init__(self, source: VideoSource, kept_bytes: int = KEPT_BYTES) -> None:
        self.source = source
        self._kept_bytes = kept_bytes
        self._kept: OrderedDict[int, Frame] = OrderedDict()
        self._bytes = 0
        self._frames: Iterator[Frame] | None = None
        self._next = 0
        self._end: int | None = None
        self._lock = threading.Lock()

    @property
    def frame_count(self) -> int | None:
        """Number of frames: exact once the end was reached, else the source's estimate."""
        return self._end if self._end is not None else self.source.frame_count

    @property
    def kept(self) -> list[int]:
        """The frames that are kept, those used last at the end."""
        return list(self._kept)

    def at(self, frame_index: int) -> Frame:
        """A frame.

        Raises:
            UsageError: the video has no such frame. SourceError: it cannot be read.
        """
        with self._lock:
            found = self._kept.get(frame_index)
            if found is not None:
                self._kept.move_to_end(frame_index)
                return found
            return self._read(frame_index)

    def close(self) -> None:
        with self._lock:
            self._leave()
            self._kept.clear()
            self.source.close()

    def _read(self, wanted: int) -> Frame:
        if wanted < 0 or (self._end is not None and wanted >= self._end):
            raise UsageError(f"the video has no frame {wanted}: it ends before")
        if self._frames is None or not self._next <= wanted <= self._next + _AHEAD:
            self._enter(max(0, wanted - _BACK))
        assert self._frames is not None
        try:
            for frame in self._frames:
                self._next = frame.frame_index + 1
                self._keep(frame)
                if frame.frame_index == wanted:
                    return frame
        except SourceError:
            self._leave()
            raise
        self._end = self._next
        self._leave()
        raise UsageError(f"the video has no frame {wanted}: it has {self._end}")

    def _enter(self, start: int) -> None:
        self._leave()
        before = self._kept.get(start - 1)
        pts = None if before is None else before.pts_seconds
        if pts is None and start and isinstance(self.source, VideoFile):
            pts = self.source.expected_pts_seconds(start - 1)
        self._frames, self._next = self.source.frames(start, previous_pts_seconds=pts), start

    def _leave(self) -> None:
        frames, self._frames = self._frames, None
        with suppress(AttributeError):
            cast(Generator[Frame], frames).close()

    def _keep(self, frame: Frame) -> None:
        old = self._kept.pop(frame.frame_index, None)
        self._bytes += frame.image.nbytes - (0 if old is None else old.image.nbytes)
        self._kept[frame.frame_index] = frame
        while self._bytes > self._kept_bytes and len(self._kept) > 1:
            _, gone = self._kept.popitem(last=False)
            self._bytes -= gone.image.nbytes
