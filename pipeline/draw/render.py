"""Renders a tracked video: overlay video, contact sheet, or both."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from pipeline.base.errors import UsageError
from pipeline.base.picture_size import MAX_PIXELS
from pipeline.draw.contact_sheet import contact_sheet
from pipeline.draw.video import render_video
from pipeline.tracks.reader import open_tracks


def render(
    video: str | os.PathLike[str],
    out: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    stream_id: str | None = None,
    first: int = 0,
    last: int | None = None,
    alpha: float = 0.5,
    sheet: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
    storage_options: Mapping[str, Any] | None = None,
    max_pixels: int = MAX_PIXELS,
    out_storage_options: Mapping[str, Any] | None = None,
) -> int:
    """Write a tracked video with its masks drawn over it, as far as it is tracked; return the number of
    frames.

    Args:
        video: the video that was tracked; path or fsspec URI, as for `pipeline.tracking.track.track`.
        out: output folder of the tracking.
        output: video file to write; .mp4, .mov, .m4v, .mkv or .webm.
        stream_id: stream to draw; default: the video's own, or the folder's only one.
        first, last: frames to write, inclusive.
        alpha: opacity of the masks, 0 to 1.
        sheet: contact sheet (PNG) of the same frames to write.
        progress: called with the number of frames written and the total number.
        storage_options, out_storage_options: options for the fsspec file systems of the two videos, and of
            `out`.
        max_pixels: larger pictures are not decoded; see `pipeline.video.sources.open_source`.

    Raises UsageError (no such stream or frames, not the video that was tracked), SourceError, StoreError.
    """
    uri, target = os.fspath(video), os.fspath(output)
    reader = open_tracks(uri, out, stream_id, out_storage_options)
    tracked = reader.next_frame
    if not 0 <= first < tracked:
        raise UsageError(f"first frame {first}: {reader.stream_id} is tracked up to frame {tracked - 1}")
    end = tracked - 1 if last is None else min(last, tracked - 1)
    report = None if progress is None else lambda done: progress(done, end - first + 1)
    some: dict[str, Any] = {"first": first, "last": end, "alpha": alpha, "storage_options": storage_options}
    some["max_pixels"] = max_pixels
    count = render_video(uri, reader.at, target, progress=report, **some)
    if sheet is not None:
        contact_sheet(uri, reader.at, os.fspath(sheet), **some)
    return count
