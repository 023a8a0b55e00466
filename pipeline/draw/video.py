"""Rendering: masks drawn over a video, as a contact sheet, or over a single image.

`overlay` draws and does no file access. Outputs are written completely or not at all: first under another
name next to their final one. Videos are H.264 if FFmpeg has x264, otherwise MPEG-4; VP9 in .webm.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import av
import cv2
import numpy as np

from pipeline.base.errors import UsageError, one_line
from pipeline.base.picture_size import MAX_PIXELS
from pipeline.base.records import Frame
from pipeline.draw.frames import Tracks, frames_with_tracks, records_of
from pipeline.draw.look import Image, Look
from pipeline.draw.output_file import finished_file, unwritable
from pipeline.draw.overlay import overlay
from pipeline.storage.locations import scheme_of
from pipeline.video.sources import VideoSource, open_source

log = logging.getLogger(__name__)


TIME_BASE = Fraction(1, 60_000)
"""Exact for all common frame rates, and the finest time base of MPEG-4."""
RATE_IF_UNKNOWN = 25.0
_SUFFIXES = {
    ".mp4": "libx264",
    ".m4v": "libx264",
    ".mov": "libx264",
    ".mkv": "libx264",
    ".webm": "libvpx-vp9",
}
_OPTIONS = {
    "libx264": {"crf": "20", "preset": "veryfast", "g": "60"},
    "libvpx-vp9": {"crf": "28", "b": "0", "deadline": "realtime", "cpu-used": "7"},
    "mpeg4": {"flags": "+qscale", "global_quality": "354"},
}
_BT709 = 1
_LIMITED = 1


def render_video(
    uri: str,
    tracks: Tracks,
    output: str,
    *,
    first: int = 0,
    last: int | None = None,
    look: Look | None = None,
    progress: Callable[[int], None] | None = None,
    storage_options: Mapping[str, Any] | None = None,
    max_pixels: int = MAX_PIXELS,
) -> int:
    """Write a video with its tracks drawn over it; return the number of frames.

    Timing follows the source, frame by frame, starting at 0. A source without timestamps is shown at its
    frame rate, or at 25 frames per second. Odd sizes get one more row or column; frames whose size differs
    from the first are scaled to it.

    Args:
        uri: the video, as for `open_source`.
        tracks: mask records of each frame.
        output: path or fsspec URI; .mp4, .mov, .m4v, .mkv or .webm.
        first, last: frames to write, inclusive; to the end if `last` is None.
        look: as for `overlay`.
        progress: called with the number of frames written so far.

    Raises UsageError (the tracks don't fit the video, an unknown suffix), SourceError, StoreError.
    """
    suffix = Path(output).suffix.lower()
    if suffix not in _SUFFIXES:
        raise UsageError(
            f"{output}: cannot write {suffix or 'a file without suffix'}; use one of {', '.join(_SUFFIXES)}"
        )
    if scheme_of(output) == "file" and scheme_of(uri) == "file" and _same_file(uri, output):
        raise UsageError(f"{output} is the video itself; choose another output")
    written = 0
    with open_source(uri, storage_options=storage_options, max_pixels=max_pixels) as source:
        frames = frames_with_tracks(source, tracks, first, last)
        opening = next(frames, None)
        if opening is None:
            raise UsageError(f"{uri} has no frames {first}..{'' if last is None else last}; choose others")
        with (
            finished_file(output, storage_options) as path,
            _Writer(path, source, opening, output) as writer,
        ):
            for frame in itertools.chain([opening], frames):
                writer.write(overlay(frame.image, records_of(tracks, frame), look), frame.pts_seconds)
                written += 1
                if progress is not None:
                    progress(written)
    return written


class _Writer:
    """Encodes RGB images with their times into a video file; a context manager that finishes the file."""

    def __init__(self, path: Path, source: VideoSource, opening: Frame, shown_as: str) -> None:
        self._shown_as = shown_as
        self._start = opening.pts_seconds
        self._step = max(1, round(1 / (source.rate or RATE_IF_UNKNOWN) / TIME_BASE))
        self._last_pts = -self._step
        height, width = opening.size
        self._height, self._width = height + height % 2, width + width % 2
        codec = _encoder(path.suffix.lower())
        try:
            self._container = cast(Any, av.open(str(path), "w"))
            self._stream: Any = self._container.add_stream(codec, options=_OPTIONS[codec])
            self._stream.width, self._stream.height, self._stream.pix_fmt = (
                self._width,
                self._height,
                "yuv420p",
            )
            context = self._stream.codec_context
            context.time_base = TIME_BASE
            context.framerate = Fraction(source.rate or RATE_IF_UNKNOWN).limit_denominator(1001)
            context.colorspace = context.color_primaries = context.color_trc = _BT709
            context.color_range = _LIMITED
        except Exception as error:
            raise unwritable(shown_as, error) from error
        self._reformatter = av.video.reformatter.VideoReformatter()

    def write(self, image: Image, pts_seconds: float | None) -> None:
        if image.shape[:2] != (self._height, self._width):
            image = self._fitted(image)
        rgb = av.VideoFrame.from_ndarray(image, format="rgb24")
        frame = self._reformatter.reformat(
            rgb, format="yuv420p", dst_colorspace=_BT709, dst_color_range=_LIMITED, threads=1
        )
        pts = self._last_pts + self._step
        if pts_seconds is not None and self._start is not None:
            pts = max(self._last_pts + 1, round((pts_seconds - self._start) / TIME_BASE))
        frame.pts, frame.time_base = pts, TIME_BASE
        self._last_pts = pts
        self._mux(frame)

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if error is None:
            self._mux(None)
        try:
            self._container.close()
        except Exception as failed:
            if error is None:
                raise unwritable(self._shown_as, failed) from failed

    def _mux(self, frame: Any) -> None:
        try:
            self._container.mux(self._stream.encode(frame))
        except Exception as error:
            raise unwritable(self._shown_as, error) from error

    def _fitted(self, image: Image) -> Image:
        below, right = self._height - image.shape[0], self._width - image.shape[1]
        if below in (0, 1) and right in (0, 1):
            return np.asarray(cv2.copyMakeBorder(image, 0, below, 0, right, cv2.BORDER_REPLICATE), np.uint8)
        return np.asarray(
            cv2.resize(image, (self._width, self._height), interpolation=cv2.INTER_AREA), np.uint8
        )


def _encoder(suffix: str) -> str:
    wanted = _SUFFIXES[suffix]
    try:
        av.Codec(wanted, "w")
    except Exception as error:
        log.info("FFmpeg has no %s (%s); using mpeg4", wanted, one_line(error))
        return "mpeg4"
    return wanted


def _same_file(one: str, other: str) -> bool:
    with suppress(OSError):
        return os.path.samefile(one.removeprefix("file://"), other.removeprefix("file://"))
    return False
