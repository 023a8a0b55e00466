"""Video sources: video files, image folders, and plugins by URI scheme.

How a video file is read, and why:

* Decoding from the start with ONE thread defines the frames of a file, their numbers and its losses: FFmpeg's
  output is then the same for the same bytes, damaged or not. With several threads it conceals damage
  differently from run to run.
* With several threads, or after a seek, decoding is guarded (see `pipeline.video.decoding`). At the first
  sign of damage the file is decoded from the start with one thread; delivered frames are skipped.
* `frames(start)` seeks only if it knows the presentation time of frame `start - 1` (given by the caller, or
  delivered by this source before) and the packet index agrees: if an earlier packet had yielded no frame, or
  two, the numbers would not match. Otherwise the frames before `start` are decoded and dropped, without
  conversion to RGB. After a seek each frame's time is compared with the index; at the first difference
  decoding starts over from the beginning.

Colours: FFmpeg's conversion to RGB, with the matrix and range that the stream declares; without a declaration
BT.601 and limited range, as in ffmpeg and OpenCV. No tone mapping, no deinterlacing; pixels are taken as
square.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, Protocol, Self

from pipeline.base.joined_uris import joined_parts
from pipeline.base.picture_size import MAX_PIXELS
from pipeline.base.records import Event, Frame
from pipeline.storage.locations import BLOCK_BYTES, locate, scheme_of
from pipeline.video.image_folder import ImageFolder
from pipeline.video.joined_video import JoinedVideo
from pipeline.video.plugin_video import PluginVideo, find_plugin
from pipeline.video.torchcodec_decoding import AV
from pipeline.video.video_file import VideoFile


class VideoSource(Protocol):
    """An opened video. Use it as a context manager; iterate `frames()` as often as needed.

    Attributes:
        uri: as given to `open_source`.
        width, height: of the first frame, upright, in pixels; later frames may differ.
        rate: average frames per second, None if unknown.
        frame_count: an estimate of the number of frames, None if unknown.
        container, codec: FFmpeg's names; "images" and the suffix for a folder of images.
        fingerprint: changes when the input does.
        damaged: whether any sign of damage was found; resuming after it must decode from the start.
        trailing_losses: losses after the last frame; set once `frames()` is exhausted.
    """

    uri: str
    width: int
    height: int
    rate: float | None
    frame_count: int | None
    container: str
    codec: str
    fingerprint: str
    damaged: bool
    trailing_losses: tuple[Event, ...]

    def frames(self, start: int = 0, *, previous_pts_seconds: float | None = None) -> Iterator[Frame]:
        """Yield frames with `frame_index` >= `start`, numbered and decoded as from the start.

        `previous_pts_seconds` is the `pts_seconds` that frame `start - 1` had when it was tracked. With it a
        resume can seek; without it the frames before `start` are decoded again. Raises SourceError.
        """
        ...

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_source(
    uri: str,
    *,
    threads: int = 0,
    storage_options: Mapping[str, Any] | None = None,
    block_size: int = BLOCK_BYTES,
    max_pixels: int = MAX_PIXELS,
    decoder: str = AV,
    device: str = "cpu",
) -> VideoSource:
    """Open a video and decode its first frame.

    Args:
        uri: a path or fsspec URI of a video file or a folder of images, a URI whose scheme a plugin
            reads, or several files as one, see `pipeline.base.joined_uris.joined_uri`.
        threads: number of decoding threads; 0 lets FFmpeg choose. Frames are the same with any number.
        storage_options: options for the fsspec file system.
        block_size: largest range read of a remote file, in bytes; three times as much may be kept in memory.
        max_pixels: larger pictures are not decoded. A video that begins with such pictures, and a folder that
            has such an image, are refused; later in a video they count as lost. Plugins have limits of their
            own.
        decoder: what decodes the images of video files: av, or torchcodec, see
            `pipeline.video.torchcodec_decoding`. Numbers, times and losses are PyAV's with both.
        device: device that torchcodec decodes on and leaves the images on.

    Raises:
        UsageError: there is no such decoder, or it cannot be used here.
        NoSuchSourceError: there is no such file or folder.
        PictureTooLargeError: the pictures are larger than `max_pixels`.
        NotAVideoError: the file could be read but is not a video, or has no decodable frame.
        SourceError: the input cannot be read now.
    """
    options: dict[str, Any] = {
        "threads": threads,
        "block_size": block_size,
        "max_pixels": max_pixels,
        "decoder": decoder,
        "device": device,
    }
    if (parts := joined_parts(uri)) is not None:

        def open_file(part: str) -> VideoFile:
            location = locate(part, storage_options)
            return VideoFile(location, **options)

        return JoinedVideo(uri, parts, open_file, storage_options)
    if plugin := find_plugin(scheme_of(uri)):
        return PluginVideo(uri, plugin)
    location = locate(uri, storage_options)
    if location.is_folder():
        return ImageFolder(location, max_pixels=max_pixels)
    return VideoFile(location, **options)
