"""Contact sheets: a grid of frames with their objects."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np

from pipeline.base.errors import StoreError, UsageError
from pipeline.base.picture_size import MAX_PIXELS
from pipeline.base.records import Frame
from pipeline.draw.frames import Tracks, frames_with_tracks, records_of
from pipeline.draw.look import Image, Look
from pipeline.draw.output_file import finished_file
from pipeline.draw.overlay import overlay
from pipeline.video.sources import VideoSource, open_source


def contact_sheet(
    uri: str,
    tracks: Tracks,
    output: str,
    frames: Sequence[int] | int = 12,
    columns: int = 4,
    *,
    first: int = 0,
    last: int | None = None,
    tile_width: int = 320,
    look: Look | None = None,
    storage_options: Mapping[str, Any] | None = None,
    max_pixels: int = MAX_PIXELS,
) -> None:
    """Write a PNG with overlays of some frames, in rows from left to right.

    Args:
        uri, tracks, first, last, look: as for `render_video`.
        output: path or fsspec URI of the PNG.
        frames: the frame numbers, or the number of frames, spread evenly over first..last.
        columns: tiles per row.
        tile_width: width of a tile in pixels.

    Raises as `render_video` does.
    """
    if columns < 1 or tile_width < 16:
        raise UsageError(f"columns={columns}, tile_width={tile_width}: need at least 1 column and 16 pixels")
    with open_source(uri, storage_options=storage_options, max_pixels=max_pixels) as source:
        wanted = (
            _spread(source, tracks, frames, first, last) if isinstance(frames, int) else sorted(set(frames))
        )
        if not wanted or wanted[0] < 0:
            raise UsageError(f"frames={frames!r}: must be at least one frame number, none below 0")
        chosen = set(wanted)
        tiles = [
            _tile(frame, overlay(frame.image, records_of(tracks, frame), look), tile_width)
            for frame in frames_with_tracks(source, tracks, wanted[0], wanted[-1])
            if frame.frame_index in chosen
        ]
    if not tiles:
        raise UsageError(f"{uri} has none of the frames {wanted[0]}..{wanted[-1]}; choose others")
    done, png = cv2.imencode(".png", cv2.cvtColor(_grid(tiles, columns), cv2.COLOR_RGB2BGR))
    if not done:
        raise StoreError(f"{output}: the contact sheet could not be encoded; choose smaller tiles")
    with finished_file(output, storage_options) as path:
        path.write_bytes(png.tobytes())


def _spread(source: VideoSource, tracks: Tracks, count: int, first: int, last: int | None) -> list[int]:
    if last is None and isinstance(tracks, Mapping) and tracks:
        last = max(tracks)
    if last is None:
        last = max(first, (source.frame_count or 1) - 1)
    return sorted({round(x) for x in np.linspace(first, last, max(0, count))})


def _tile(frame: Frame, drawn: Image, tile_width: int) -> Image:
    height, width = frame.size
    size = (tile_width, max(1, round(height * tile_width / width)))
    tile = np.asarray(cv2.resize(drawn, size, interpolation=cv2.INTER_AREA), np.uint8)
    text = f"{frame.frame_index}"
    if frame.pts_seconds is not None:
        text += f"  {frame.pts_seconds:.2f} s"
    scale = tile_width / 700
    at = (round(tile_width * 0.02), size[1] - round(tile_width * 0.02))
    for shift, ink in ((1, (0, 0, 0)), (0, (255, 255, 255))):
        place = (at[0] + shift, at[1] + shift)
        cv2.putText(tile, text, place, cv2.FONT_HERSHEY_SIMPLEX, scale, ink, 1, cv2.LINE_AA)
    return tile


def _grid(tiles: Sequence[Image], columns: int, gap: int = 4) -> Image:
    columns = min(columns, len(tiles))
    height, width = max(t.shape[0] for t in tiles), tiles[0].shape[1]
    rows = math.ceil(len(tiles) / columns)
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for i, tile in enumerate(tiles):
        y, x = i // columns * (height + gap), i % columns * (width + gap)
        sheet[y : y + tile.shape[0], x : x + width] = tile
    return sheet
