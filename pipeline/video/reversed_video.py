"""A video read backward: its frames from a given one down to the first.

Videos decode forward only. Frames are therefore decoded in blocks of consecutive frames, each entered by a
seek where the source allows it, kept in memory up to a limit, and delivered from their end. Before the first
block, the video is decoded once from the start: seeking needs the times of frames that were really decoded
(see `pipeline.video.sources`), so that a block's frames are numbered as in a decode from the start.

The cost depends on the distance of keyframes: a block decodes the frames from the keyframe before it on. In a
video that cannot seek (damaged, or without times), each block is decoded from the start.
"""

from __future__ import annotations

import math
from array import array
from collections import deque
from collections.abc import Iterator
from dataclasses import replace

from pipeline.base.errors import SourceError
from pipeline.base.records import Event, Frame
from pipeline.video.device_frame import DeviceFrame
from pipeline.video.plugin_video import OpenedVideo
from pipeline.video.sources import VideoSource

KEPT_BYTES = 256 * 2**20
"""Decoded frames in memory, in bytes; 41 frames of 1920 x 1080 pixels."""


class ReversedVideo(OpenedVideo):
    """Frames `last`, `last` - 1, ..., 0 of a video as the frames 0, 1, ..., `last` of a `VideoSource`.

    Images and times are those of the video; its losses are left out. If it ends before frame `last`, frames
    keep their numbers, so that the first ones are missing.

    Args:
        source: the video, which nobody else may iterate meanwhile; not closed with this object.
        last: the frame to begin with.
        kept_bytes: decoded frames are kept up to this many bytes, but at least one.
    """

    def __init__(self, source: VideoSource, last: int, *, kept_bytes: int = KEPT_BYTES) -> None:
        self.uri = source.uri
        self.height, self.width = source.height, source.width
        self.rate = source.rate
        self.frame_count: int | None = last + 1
        self.container, self.codec = source.container, source.codec
        self.fingerprint = f"{source.fingerprint}-backward-from-{last}"
        self.trailing_losses: tuple[Event, ...] = ()
        self.damaged = source.damaged
        self._source, self._last, self._kept_bytes = source, last, kept_bytes

    def frames(self, start: int = 0, *, previous_pts_seconds: float | None = None) -> Iterator[Frame]:
        """Yield frames from `start` on, as `VideoSource.frames` does. The times before need not be known."""
        del previous_pts_seconds
        until = self._last - start
        if until < 0:
            return
        times = array("d")
        block = self._decoded(0, until, None, times)
        while block:
            # The first pass ends with a block, too: a video that fits into memory is decoded once.
            until = block[0].frame_index - 1
            while block:
                frame = block.pop()
                yield replace(frame, frame_index=self._last - frame.frame_index, losses=())
            if until < 0:
                return
            first = max(0, until + 1 - max(1, self._kept_bytes // frame.image.nbytes))
            before = times[first - 1] if first else math.nan
            del frame
            block = self._decoded(first, until, None if math.isnan(before) else before)
            if not block or block[-1].frame_index != until:
                raise SourceError(f"{self.uri}: frame {until} can no longer be read; has the file changed?")

    def _decoded(
        self, first: int, last: int, before: float | None, times: array[float] | None = None
    ) -> deque[Frame]:
        """The last of the frames `first`..`last` that fit into memory.

        Args:
            before: time of frame `first` - 1, if it may be used to seek.
            times: receives the times of all these frames.
        """
        kept: deque[Frame] = deque()
        size = 0
        frames = self._source.frames(first, previous_pts_seconds=before)
        try:
            for frame in frames:
                if isinstance(frame, DeviceFrame):  # a GPU's memory is scarcer
                    frame = frame.on_host()
                if times is not None:
                    times.append(math.nan if frame.pts_seconds is None else frame.pts_seconds)
                kept.append(frame)
                size += frame.image.nbytes
                while size > self._kept_bytes and len(kept) > 1:
                    size -= kept.popleft().image.nbytes
                if frame.frame_index >= last:
                    break
        finally:
            getattr(frames, "close", lambda: None)()
            self.damaged = self._source.damaged
        return kept
