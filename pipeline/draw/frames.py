"""Frames of a video together with the mask records of its tracks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from pipeline.base.errors import UsageError
from pipeline.base.records import Frame, MaskRecord
from pipeline.video.sources import VideoSource

Tracks = Mapping[int, Sequence[MaskRecord]] | Callable[[int], Sequence[MaskRecord]]
"""The records of a frame by frame index: a mapping or a function."""


def frames_with_tracks(source: VideoSource, tracks: Tracks, first: int, last: int | None) -> Iterator[Frame]:
    """Yield frames first..last; knowing the frame before `first` lets the source seek."""
    if first < 0 or (last is not None and last < first):
        raise UsageError(f"frames {first}..{last}: must be 0 <= first <= last")
    before = _lookup(tracks, first - 1) if first else ()
    pts = next((record.pts_seconds for record in before), None)
    for frame in source.frames(first, previous_pts_seconds=pts):
        if last is not None and frame.frame_index > last:
            return
        yield frame


def _lookup(tracks: Tracks, frame_index: int) -> Sequence[MaskRecord]:
    return tracks.get(frame_index, ()) if isinstance(tracks, Mapping) else tracks(frame_index)


def records_of(tracks: Tracks, frame: Frame) -> Sequence[MaskRecord]:
    """Return the records of a frame; UsageError if their masks have another size than the frame."""
    records = _lookup(tracks, frame.frame_index)
    for record in records:
        if (record.frame_height, record.frame_width) != frame.size:
            height, width = frame.size
            raise UsageError(
                f"frame {frame.frame_index}: the mask of object {record.object_id} is {record.frame_width}x"
                f"{record.frame_height}, the video's frame {width}x{height}; give the video that was tracked"
            )
    return records
