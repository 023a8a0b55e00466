"""Renders a tracked video: overlay video, contact sheet, or both."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from typing import Any

from pipeline.base.errors import UsageError
from pipeline.base.picture_size import MAX_PIXELS
from pipeline.draw.contact_sheet import contact_sheet
from pipeline.draw.look import Layer, Look, parse_colour
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
    overlay: str = "davis",
    opacity: float | None = None,
    outlines: bool | None = None,
    ids: bool | None = None,
    objects: Collection[int] | None = None,
    colours: Mapping[int, str] | None = None,
    layer: str | os.PathLike[str] | None = None,
    layer_place: str = "behind",
    sheet: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
    storage_options: Mapping[str, Any] | None = None,
    max_pixels: int = MAX_PIXELS,
    out_storage_options: Mapping[str, Any] | None = None,
) -> int:
    """Write a tracked video with its masks drawn over it, as far as it is tracked; return the number of
    frames.

    Args:
        video: the video that was tracked; path or fsspec URI, as for `pipeline.tracking.files.track.track`.
        out: output folder of the tracking.
        output: video file to write; .mp4, .mov, .m4v, .mkv or .webm.
        stream_id: stream to draw; default: the video's own, or the folder's only one.
        first, last: frames to write, inclusive.
        overlay: davis (masks tinted), fade (the rest darker), light (a faint tint), popup (all but the
            objects is grey), or layered.
        opacity: of the tint, of the grey (popup) or of the layer, 0 to 1. Default: 0.5; light 0.1; popup and
            layered 1.
        outlines, ids: whether to draw outlines, and ids with categories. Default: except with popup and
            layered.
        objects: ids of the objects to draw; default: all.
        colours: `#rrggbb` by id, where it is not the one of the id.
        layer: picture with an alpha channel for layered, scaled to the frames: a path or fsspec URI.
        layer_place: behind the objects, or before them.
        sheet: contact sheet (PNG) of the same frames to write.
        progress: called with the number of frames written and the total number.
        storage_options, out_storage_options: options for the fsspec file systems of the two videos and the
            layer, and of `out`.
        max_pixels: larger pictures are not decoded; see `pipeline.video.sources.open_source`.

    Raises UsageError (no such stream, frames or look, not the video that was tracked), SourceError,
    StoreError.
    """
    look = Look(
        overlay,
        opacity,
        outlines,
        ids,
        objects,
        {i: parse_colour(text) for i, text in (colours or {}).items()},
        None if layer is None else Layer.read(os.fspath(layer), storage_options),
        layer_place,
    )
    uri, target = os.fspath(video), os.fspath(output)
    reader = open_tracks(uri, out, stream_id, out_storage_options)
    tracked = reader.next_frame
    if not 0 <= first < tracked:
        raise UsageError(f"first frame {first}: {reader.stream_id} is tracked up to frame {tracked - 1}")
    end = tracked - 1 if last is None else min(last, tracked - 1)
    report = None if progress is None else lambda done: progress(done, end - first + 1)
    some: dict[str, Any] = {"first": first, "last": end, "look": look, "storage_options": storage_options}
    some["max_pixels"] = max_pixels
    count = render_video(uri, reader.at, target, progress=report, **some)
    if sheet is not None:
        contact_sheet(uri, reader.at, os.fspath(sheet), **some)
    return count
