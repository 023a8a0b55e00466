"""Explains a mask of a tracked file: the remembered frames that a pixel or an object was read from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.base.errors import StoreError, UsageError
from pipeline.storage.opening import open_files
from pipeline.tracking.files.replay import Replay, check_model
from pipeline.tracking.segmenters import open_segmenter
from pipeline.tracking.settings import TrackSettings
from pipeline.tracks.layout import load_record
from pipeline.tracks.masks import rle_to_mask
from pipeline.tracks.reader import TrackReader, chosen_stream
from pipeline.video.sources import open_source
from xmem_core import TrackerState, VideoSegmenter
from xmem_core.contents import Kind
from xmem_core.reads import ReadShare
from xmem_core.segmenter import EncodedFrame
from xmem_core.segmenter import Frame as Image


@dataclass(frozen=True)
class FrameShare:
    """The part of what was read that comes from one remembered frame.

    Args:
        frame_index: index of the frame; None: all long-term prototypes together, or all that was copied from
            another stream.
        kind: working, permanent, long_term or copied.
        share: 0 to 1.
    """

    frame_index: int | None
    kind: Kind
    share: float


@dataclass(frozen=True)
class MemoryReads:
    """From which remembered frames objects were read on one frame.

    Args:
        stream_id: id of the stream.
        frame_index: the frame on which they were read.
        objects: by id of the objects that were asked about, the shares, the largest first; they sum to 1.
            Empty where an object was not read: outside its search window, or while it was not searched for.
            Objects that start on the frame are missing.
    """

    stream_id: str
    frame_index: int
    objects: Mapping[int, tuple[FrameShare, ...]]

    def to_json(self) -> dict[str, Any]:
        """As JSON-ready values."""
        return {
            "stream_id": self.stream_id,
            "frame_index": self.frame_index,
            "objects": [
                {"id": i, "frames": [asdict(share) for share in shares]} for i, shares in self.objects.items()
            ],
        }


def memory_reads(
    out: str | os.PathLike[str],
    frame: int,
    pixel: tuple[int, int] | None = None,
    object_id: int | None = None,
    stream_id: str | None = None,
    *,
    video: str | None = None,
    device: str = "cpu",
    storage_options: Mapping[str, Any] | None = None,
    out_storage_options: Mapping[str, Any] | None = None,
) -> MemoryReads:
    """From which remembered frames objects were read when a frame was tracked.

    The stream is tracked once more from its newest snapshot before the frame; nothing is written. The weights
    are those of the readout: the softmax over the best `top_k` elements of the memory.

    Args:
        out: output folder of tracking.
        frame: index of the frame.
        pixel: (x, y) in the frame: what was read there. None: on the mask of each object, or wherever the
            object was read if it is out of sight.
        object_id: the only object to report; None: all.
        stream_id: its stream; may be left out if there is one only.
        video: the tracked video; default: the source in the stream's record.
        device: device of the network.
        storage_options, out_storage_options: for the file systems of the video and of `out`.

    Raises:
        UsageError: there is no such stream, frame, pixel or object; the stream is live or another video's.
        StoreError: the folder cannot be read. SourceError: the video cannot be read.
    """
    name = chosen_stream(out, stream_id, out_storage_options)
    files = open_files(out, out_storage_options)
    record = load_record(files, name)
    if record is None or not isinstance(record.get("settings"), dict):
        raise StoreError(f"{files.root} has no usable record of stream {name!r}")
    if record.get("live") is not None:
        raise UsageError(f"{name!r} is a live stream, whose frames are not kept: they cannot be read again")
    uri = video if video is not None else record.get("source")
    if not isinstance(uri, str):
        raise StoreError(f"the record of stream {name!r} names no video: give it (--video)")
    stored = TrackSettings.from_dict(record["settings"]).with_options({"device": device})
    source = open_source(uri, threads=0, storage_options=storage_options)
    try:
        if source.fingerprint != record.get("source_fingerprint"):
            raise UsageError(
                f"{uri} is not the video that stream {name!r} was tracked on: give that (--video)"
            )
        segmenter = open_segmenter(stored.model, stored.memory)
        settings = stored.of_segmenter(segmenter, stored.threads)
        check_model(name, segmenter.fingerprint, stored)
    except BaseException:
        source.close()
        raise
    with Replay(files, name, frame, source, segmenter, settings, out_storage_options) as replay:
        step = replay.to(frame)
        masks = masks_at(TrackReader(out, name, out_storage_options), frame)
        shares = shares_at(segmenter, step.state, step.image, frame, masks, pixel, object_id)
    return MemoryReads(name, frame, shares)


def masks_at(tracks: TrackReader, frame: int) -> dict[int, NDArray[np.bool_]]:
    """The masks of the objects in sight on a frame."""
    return {
        record.object_id: rle_to_mask(record.mask_rle, record.frame_height, record.frame_width)
        for record in tracks.at(frame)
        if record.mask_rle is not None
    }


def shares_at(
    segmenter: VideoSegmenter,
    state: TrackerState,
    image: Image | EncodedFrame,
    frame: int,
    masks: Mapping[int, NDArray[np.bool_]],
    pixel: tuple[int, int] | None,
    object_id: int | None,
) -> dict[int, tuple[FrameShare, ...]]:
    """The shares of `MemoryReads`, of a state before the step on a frame.

    Raises:
        UsageError: there is no such pixel or object.
    """
    shape = (image.frame if isinstance(image, EncodedFrame) else image).shape[:2]
    height, width = int(shape[0]), int(shape[1])
    if object_id is not None and object_id not in state.object_ids:
        known = ", ".join(map(str, state.object_ids)) or "none"
        raise UsageError(f"object {object_id} is not remembered before frame {frame}: {known} are")
    wanted = [i for i in state.object_ids if object_id in (None, i)]
    if pixel is not None:
        x, y = pixel
        if not (0 <= x < width and 0 <= y < height):
            raise UsageError(f"pixel {x},{y} is outside frame {frame}, which is {width} x {height}")
        where = np.zeros((height, width), np.bool_)
        where[y, x] = True
        found = segmenter.reads(state, image, where)
    else:
        done = image if isinstance(image, EncodedFrame) else segmenter.encode(image, state.network_size)
        found = {}
        for i in wanted:
            mask = masks.get(i)
            found[i] = segmenter.reads(state, done, mask)[i]
    shift = frame - 1 - state.time
    return {i: tuple(_named(share, shift) for share in found.get(i, ())) for i in wanted}


def _named(share: ReadShare, shift: int) -> FrameShare:
    return FrameShare(None if share.time is None else share.time + shift, share.kind, share.share)
