"""Messages between the scheduler and a tracker process: small plain data, never pixels.

A chunk is identified by its stream and frames; the worker that tracks it decodes it. The progress of a stream
is kept only in the store; every answer repeats it.

Of a stream with a backward pass, chunks and answers count the frames of that pass first; frame N of the video
is then N + `StreamStatus.offset`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Unpack

from pipeline.storage.failures import Failure
from pipeline.tracking.settings import TrackOptions, TrackSettings

Outcome = Literal["tracked", "finished", "refused", "unknown", "failed"]


@dataclass(frozen=True)
class WorkerSettings:
    """Settings shared by all streams of one batch.

    Args:
        out: the output folder, a path or any fsspec URI.
        tracking: settings of tracking. A stream that was begun with another number of threads, or (if the
            dtype is "auto") in another precision, keeps its own.
        probe: name of a file that the batch has created in `out`. A worker that does not see it has another
            folder there, see `pipeline.distributed.worker.Worker.facts`.
        storage_options, out_storage_options: options for the fsspec file systems of videos and output; hidden
            in the repr, as they may contain credentials.
    """

    out: str
    tracking: TrackSettings = field(default_factory=TrackSettings)
    storage_options: Mapping[str, Any] | None = field(default=None, repr=False)
    out_storage_options: Mapping[str, Any] | None = field(default=None, repr=False)
    probe: str | None = None

    @classmethod
    def of(
        cls,
        out: str,
        *,
        storage_options: Mapping[str, Any] | None = None,
        out_storage_options: Mapping[str, Any] | None = None,
        **options: Unpack[TrackOptions],
    ) -> WorkerSettings:
        """Make settings with options of tracking by their flat names, see
        `pipeline.tracking.settings.TrackSettings.of`."""
        return cls(out, TrackSettings.of(**options), storage_options, out_storage_options)


@dataclass(frozen=True, slots=True)
class StreamSpec:
    """One video to track.

    Args:
        stream_id: an id that `validate_stream_id` accepts.
        uri: the video; hidden in the repr, as it may contain credentials.
        prompts_uri: a prompts file (.json) or an index PNG of the first frame's masks (.png).
        prompts: the content of a prompts file, instead of its URI.
        restart: start the stream over.
        extra: further columns of the user about the video; stored in the stream record.
        direction: where it is tracked from its prompts; None: as the settings say.

    With neither prompts nor a detector the stream must exist already.
    """

    stream_id: str
    uri: str = field(repr=False)
    prompts_uri: str | None = field(default=None, repr=False)
    prompts: Mapping[str, Any] | None = field(default=None, repr=False)
    restart: bool = False
    extra: Mapping[str, Any] | None = field(default=None, repr=False)
    direction: str | None = None


@dataclass(frozen=True, slots=True)
class StreamStatus:
    """Status of a stream after it was opened.

    Args:
        next_frame: the first frame without committed rows; chunks continue there.
        ellipses: number of boxes so far for which an ellipse was used as mask.
        finished: the stream is finished.
        height, width: size of the source's frames, in pixels.
        frame_count: number of frames to track: the source's, if known, but at most `max_frames`; those of the
            backward pass are counted, too.
        offset: number by which frames of the forward pass are counted higher; 0 without a backward pass.
        objects: largest number of objects in its prompts.
        state_bytes: predicted largest device memory of its state. States of open streams add up.
        workspace_bytes: predicted device memory of its steps, in addition. The streams of a worker take
            turns, or share a batch that is made in parts if memory is short, so only the largest counts.
        failure: why it could not be opened; the other values are meaningless then.
    """

    stream_id: str
    next_frame: int = 0
    rows: int = 0
    losses: int = 0
    ellipses: int = 0
    finished: bool = False
    height: int = 0
    width: int = 0
    frame_count: int | None = None
    offset: int = 0
    objects: int = 0
    state_bytes: int = 0
    workspace_bytes: int = 0
    warnings: tuple[str, ...] = ()
    failure: Failure | None = None


@dataclass(frozen=True, slots=True)
class ChunkReport:
    """Result of tracking a chunk.

    Args:
        outcome: "tracked": the frames are tracked and their rows are being written to the store, in order.
            "finished": the video has ended, and everything is committed. "refused": another chunk is expected
            (`next_frame` says where it begins), and nothing was done. "unknown": the stream is not open here,
            and nothing was done. "failed": see `failure`; the stream is closed here.
        next_frame: the next frame to track.
        frames: frames tracked by this call, repeated ones included.
        rows, losses, ellipses: totals of all frames before `next_frame`; for a failed stream, of the
            committed frames.
        seconds: duration of this call.
        warnings: warnings since the last report.
    """

    stream_id: str
    outcome: Outcome
    next_frame: int = 0
    frames: int = 0
    rows: int = 0
    losses: int = 0
    ellipses: int = 0
    seconds: float = 0.0
    warnings: tuple[str, ...] = ()
    failure: Failure | None = None
