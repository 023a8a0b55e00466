"""Pictures of tracks: masks laid over the video as a new video, as a contact sheet, or over a single image.

`overlay` is the drawing itself and knows nothing of files. Outputs appear whole or not at all: they are
written beside their place under another name first. Videos are H.264 where FFmpeg has x264, else MPEG-4; VP9
in .webm.
"""

from __future__ import annotations

import colorsys
import itertools
import logging
import math
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import av
import cv2
import fsspec
import numpy as np
from numpy.typing import NDArray

from pipeline.base.errors import SourceError, StoreError, UsageError, XmemError, one_line
from pipeline.base.picture_size import MAX_PIXELS
from pipeline.base.records import Frame, MaskRecord
from pipeline.storage.locations import scheme_of
from pipeline.tracks.masks import rle_to_mask
from pipeline.tracks.reader import open_tracks
from pipeline.video.sources import VideoSource, open_source

log = logging.getLogger(__name__)

Image = NDArray[np.uint8]
Tracks = Mapping[int, Sequence[MaskRecord]] | Callable[[int], Sequence[MaskRecord]]
"""The records of a frame by its index: a mapping, or a function."""

TIME_BASE = Fraction(1, 60_000)
"""Exact for all common rates, and the finest that MPEG-4 can count in."""
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


def object_color(object_id: int) -> tuple[int, int, int]:
    """The RGB colour of an object id: always the same, far from those of the ids next to it."""
    hue = object_id * 0.61803398875 % 1.0  # the golden ratio spreads any number of hues evenly
    band = object_id // 12 % 3
    red, green, blue = colorsys.hsv_to_rgb(hue, (0.85, 0.6, 1.0)[band], (1.0, 0.95, 0.75)[band])
    return round(red * 255), round(green * 255), round(blue * 255)


def overlay(image: Image, records: Sequence[MaskRecord], alpha: float = 0.5) -> Image:
    """A copy of an image with masks, outlines and labels (id and category) drawn over it.

    Args:
        image: H x W x 3 uint8 RGB.
        records: of that frame; objects out of sight are left out.
        alpha: how opaque the masks are, 0 to 1.

    Raises UsageError if a mask is of another size than the image, or damaged.
    """
    if not 0 <= alpha <= 1:
        raise UsageError(f"alpha={alpha}: must be between 0 (outlines only) and 1 (opaque)")
    drawn = np.array(image, dtype=np.uint8, order="C")
    visible = [r for r in records if r.mask_rle is not None and r.area > 0]
    thickness = max(1, round(min(drawn.shape[:2]) / 320))
    for record in visible:
        _draw_mask(drawn, record, alpha, thickness)
    for record in visible:
        _draw_label(drawn, record)
    return drawn


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
    """Write a tracked video with its tracks laid over it, as far as it is tracked; return how many frames.

    Args:
        video: the video that was tracked; path or fsspec URI, as for `pipeline.tracking.track.track`.
        out: its output folder.
        output: the video to write; .mp4, .mov, .m4v, .mkv or .webm.
        stream_id: which stream; default: the video's own, or the only one there.
        first, last: the frames to write, inclusive.
        alpha: how opaque the masks are, 0 to 1.
        sheet: write a contact sheet (PNG) of the same frames, too.
        progress: called with the frames written so far, and how many there will be.
        storage_options, out_storage_options: for the fsspec file systems of the two videos, and of `out`.
        max_pixels: larger pictures are not decoded, see `pipeline.video.sources.open_source`.

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


def render_video(
    uri: str,
    tracks: Tracks,
    output: str,
    *,
    first: int = 0,
    last: int | None = None,
    alpha: float = 0.5,
    progress: Callable[[int], None] | None = None,
    storage_options: Mapping[str, Any] | None = None,
    max_pixels: int = MAX_PIXELS,
) -> int:
    """Write the video with its tracks laid over it; return how many frames that are.

    Time runs as in the source, frame by frame, from 0 at the first frame written. A source without timestamps
    is shown at its rate, or at 25 frames per second. Odd sizes get one more row or column; frames of another
    size than the first are scaled to it.

    Args:
        uri: the video, as for `open_source`.
        tracks: the records of each frame.
        output: path or fsspec URI; .mp4, .mov, .m4v, .mkv or .webm.
        first, last: the frames to write, inclusive; to the end if `last` is None.
        alpha: as for `overlay`.
        progress: called with the number of frames written so far.

    Raises UsageError (the tracks don't fit the video, an unknown suffix), SourceError, StoreError.
    """
    suffix = Path(output).suffix.lower()
    if suffix not in _SUFFIXES:
        raise UsageError(
            f"{output}: cannot write {suffix or 'a file without suffix'}; use one of {', '.join(_SUFFIXES)}"
        )
    if scheme_of(output) == "file" and scheme_of(uri) == "file" and _same_file(uri, output):
        raise UsageError(f"{output}: is the video itself; choose another output")
    written = 0
    with open_source(uri, storage_options=storage_options, max_pixels=max_pixels) as source:
        frames = _frames(source, tracks, first, last)
        opening = next(frames, None)
        if opening is None:
            raise UsageError(f"{uri}: has no frames {first}..{'' if last is None else last}; choose others")
        with (
            _finished_file(output, storage_options) as path,
            _Writer(path, source, opening, output) as writer,
        ):
            for frame in itertools.chain([opening], frames):
                writer.write(overlay(frame.image, _records(tracks, frame), alpha), frame.pts_seconds)
                written += 1
                if progress is not None:
                    progress(written)
    return written


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
    alpha: float = 0.5,
    storage_options: Mapping[str, Any] | None = None,
    max_pixels: int = MAX_PIXELS,
) -> None:
    """Write a PNG with overlays of some frames, in rows from left to right.

    Args:
        uri, tracks, first, last, alpha: as for `render_video`.
        output: path or fsspec URI of the PNG.
        frames: which frames; or how many, spread evenly over first..last.
        columns: tiles in a row.
        tile_width: pixels of a tile.

    Raises as `render_video` does.
    """
    if columns < 1 or tile_width < 16:
        raise UsageError(f"columns={columns}, tile_width={tile_width}: need at least 1 column and 16 pixels")
    with open_source(uri, storage_options=storage_options, max_pixels=max_pixels) as source:
        wanted = (
            _spread(source, tracks, frames, first, last) if isinstance(frames, int) else sorted(set(frames))
        )
        if not wanted or wanted[0] < 0:
            raise UsageError(f"frames={frames!r}: need at least one frame number, none below 0")
        chosen = set(wanted)
        tiles = [
            _tile(frame, overlay(frame.image, _records(tracks, frame), alpha), tile_width)
            for frame in _frames(source, tracks, wanted[0], wanted[-1])
            if frame.frame_index in chosen
        ]
    if not tiles:
        raise UsageError(f"{uri}: has none of the frames {wanted[0]}..{wanted[-1]}; choose others")
    done, png = cv2.imencode(".png", cv2.cvtColor(_grid(tiles, columns), cv2.COLOR_RGB2BGR))
    if not done:
        raise StoreError(f"{output}: the contact sheet could not be encoded; choose smaller tiles")
    with _finished_file(output, storage_options) as path:
        path.write_bytes(png.tobytes())


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
            raise _unwritable(shown_as, error) from error
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
                raise _unwritable(self._shown_as, failed) from failed

    def _mux(self, frame: Any) -> None:
        try:
            self._container.mux(self._stream.encode(frame))
        except Exception as error:
            raise _unwritable(self._shown_as, error) from error

    def _fitted(self, image: Image) -> Image:
        below, right = self._height - image.shape[0], self._width - image.shape[1]
        if below in (0, 1) and right in (0, 1):
            return np.asarray(cv2.copyMakeBorder(image, 0, below, 0, right, cv2.BORDER_REPLICATE), np.uint8)
        return np.asarray(
            cv2.resize(image, (self._width, self._height), interpolation=cv2.INTER_AREA), np.uint8
        )


def _frames(source: VideoSource, tracks: Tracks, first: int, last: int | None) -> Iterator[Frame]:
    """Frames first..last; what is known of the frame before `first` lets the source seek."""
    if first < 0 or (last is not None and last < first):
        raise UsageError(f"frames {first}..{last}: need 0 <= first <= last")
    before = _lookup(tracks, first - 1) if first else ()
    pts = next((record.pts_seconds for record in before), None)
    for frame in source.frames(first, previous_pts_seconds=pts):
        if last is not None and frame.frame_index > last:
            return
        yield frame


def _lookup(tracks: Tracks, frame_index: int) -> Sequence[MaskRecord]:
    return tracks.get(frame_index, ()) if isinstance(tracks, Mapping) else tracks(frame_index)


def _records(tracks: Tracks, frame: Frame) -> Sequence[MaskRecord]:
    records = _lookup(tracks, frame.frame_index)
    for record in records:
        if (record.frame_height, record.frame_width) != frame.size:
            height, width = frame.size
            raise UsageError(
                f"frame {frame.frame_index}: the mask of object {record.object_id} is {record.frame_width}x"
                f"{record.frame_height}, the video's frame {width}x{height}; give the video that was tracked"
            )
    return records


def _spread(source: VideoSource, tracks: Tracks, count: int, first: int, last: int | None) -> list[int]:
    if last is None and isinstance(tracks, Mapping) and tracks:
        last = max(tracks)
    if last is None:
        last = max(first, (source.frame_count or 1) - 1)
    return sorted({round(x) for x in np.linspace(first, last, max(0, count))})


def _draw_mask(drawn: Image, record: MaskRecord, alpha: float, thickness: int) -> None:
    height, width = drawn.shape[:2]
    if (record.frame_height, record.frame_width) != (height, width):
        raise UsageError(
            f"frame {record.frame_index}: the mask of object {record.object_id} is {record.frame_width}x"
            f"{record.frame_height}, the image {width}x{height}; give the video that was tracked"
        )
    try:
        mask = rle_to_mask(record.mask_rle or "", height, width)
    except ValueError as error:
        raise UsageError(
            f"frame {record.frame_index}: the mask of object {record.object_id} is damaged: {one_line(error)}"
        ) from error
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not rows.size:
        return
    top, left = int(rows[0]), int(columns[0])
    inside = mask[top : int(rows[-1]) + 1, left : int(columns[-1]) + 1]
    color = object_color(record.object_id)
    patch = drawn[top : top + inside.shape[0], left : left + inside.shape[1]]
    tinted = patch[inside] * (1 - alpha) + np.array(color) * alpha
    patch[inside] = np.round(tinted).astype(np.uint8)
    outlines, _ = cv2.findContours(inside.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(drawn, outlines, -1, color, thickness, offset=(left, top))


def _draw_label(drawn: Image, record: MaskRecord) -> None:
    """The id and category in a box of the object's colour, above the object if there is room."""
    height, width = drawn.shape[:2]
    text = f"{record.object_id} {record.category}" if record.category else str(record.object_id)
    text = text.encode("ascii", "replace").decode()  # OpenCV's font has nothing else
    scale = max(0.35, min(height, width) / 900)
    weight = max(1, round(scale * 1.6))
    (text_width, text_height), below = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, weight)
    x, y = (record.bbox or (0, 0, 0, 0))[:2]
    x = max(0, min(x, width - text_width - 4))
    y = max(text_height + below + 4, min(y, height))
    color = object_color(record.object_id)
    bright = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] > 140
    cv2.rectangle(drawn, (x, y - text_height - below - 4), (x + text_width + 4, y), color, -1)
    ink = (0, 0, 0) if bright else (255, 255, 255)
    cv2.putText(drawn, text, (x + 2, y - below), cv2.FONT_HERSHEY_SIMPLEX, scale, ink, weight, cv2.LINE_AA)


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


@contextmanager
def _finished_file(output: str, storage_options: Mapping[str, Any] | None) -> Iterator[Path]:
    """A path to write to; what was written takes the output's place only if nothing was raised."""
    try:
        fs, target = fsspec.core.url_to_fs(output, **dict(storage_options or {}))
        local = "file" in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)
        folder = Path(target).parent if local else Path(os.environ.get("TMPDIR", "/tmp"))
        if local and Path(target).is_dir():
            raise IsADirectoryError(f"{target} is a folder")
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".{secrets.token_hex(6)}.partial{Path(target).suffix.lower()}"
        partial.touch(exist_ok=False)
    except Exception as error:
        raise _unwritable(output, error) from error
    try:
        yield partial
        if local:
            os.replace(partial, target)
        else:
            fs.put_file(str(partial), target)
    except XmemError:
        raise
    except OSError as error:
        raise _unwritable(output, error) from error
    finally:
        partial.unlink(missing_ok=True)


def _unwritable(output: str, error: BaseException) -> XmemError:
    if isinstance(error, SourceError | UsageError | StoreError):
        return error
    reason = getattr(error, "strerror", None) or one_line(error)
    return StoreError(f"{output}: cannot be written ({reason}); check the folder's rights and free space")
