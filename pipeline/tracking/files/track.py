"""`track`: tracks a whole video in one call."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import torch

from pipeline.base.errors import SourceError, XmemError
from pipeline.base.joined_uris import joined_uri
from pipeline.prompts.resolving import PromptSet
from pipeline.storage.failures import Failure
from pipeline.tracking.files.executor import Begun, Executor, OnFrame, begun_with
from pipeline.tracking.files.stream_tracker import StreamSummary, StreamTracker
from pipeline.tracking.segmenters import check_device, open_segmenter
from pipeline.tracking.settings import TrackOptions, TrackSettings
from pipeline.tracking.stream_record import mark_failed
from pipeline.tracks.sinks import Sinks
from pipeline.tracks.store import StreamStore, generate_stream_id
from pipeline.video.sources import open_source


def track(
    video: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    prompts: PromptSet | None = None,
    *,
    stream_id: str | None = None,
    settings: TrackSettings | None = None,
    restart: bool = False,
    storage_options: Mapping[str, Any] | None = None,
    out_storage_options: Mapping[str, Any] | None = None,
    on_open: OnFrame | None = None,
    on_frame: OnFrame | None = None,
    **options: Unpack[TrackOptions],
) -> StreamSummary:
    """Track a video's objects and write their mask tracks.

    Called again with the same arguments, it resumes where it was interrupted. Finished streams are unchanged.

    Args:
        video: path or fsspec URI of a video or a folder of images; or several video files, in order, that
            are the pieces of one recording.
        out: path or fsspec URI of the output folder, which may hold other streams.
        prompts: what to track; may be left out when resuming, or with a detector.
        stream_id: id of the stream. Default: made from the video's name and location.
        settings: model, memory, detector and commits; see `pipeline.tracking.settings.TrackSettings`.
        restart: first remove everything the folder holds of this stream, once all arguments are checked.
        storage_options, out_storage_options: passed to the fsspec file systems of video and output.
        on_open, on_frame: called with the stream once it is open, and after every frame.
        options: single settings by name, which override `settings`: model, size, device, dtype, threads,
            compile, memory, detector, detect_every, chunk_frames, sinks, ...; see `TrackOptions` for all.

    Returns:
        the stream's summary.

    Raises:
        XmemError: one of `pipeline.base.errors`; committed rows are kept.
    """
    uri = joined_uri([video] if isinstance(video, str | os.PathLike) else video)
    chosen = (settings or TrackSettings()).with_options(options)
    check_device(chosen.model.device)
    store = StreamStore(out, stream_id or generate_stream_id(uri), out_storage_options)
    try:
        source = open_source(
            uri,
            threads=0,
            storage_options=storage_options,
            max_pixels=chosen.commit.max_pixels,
            decoder=chosen.commit.decoder,
            device=chosen.model.device,
        )
    except SourceError as error:
        mark_failed(store, Failure.of(error))
        raise
    try:
        also = Sinks.load(chosen.commit.sinks)
        model = (Begun() if restart else begun_with(store)).keep(chosen.model)
        segmenter = open_segmenter(model, chosen.memory)
        chosen = chosen.of_segmenter(segmenter, model.threads or torch.get_num_threads())
        executor = Executor(segmenter, chosen.threads)
    except BaseException:
        source.close()
        raise
    try:
        with StreamTracker(source, store, segmenter, chosen, prompts, restart=restart, sinks=also) as stream:
            if on_open is not None:
                on_open(stream)
            return executor.run(stream, on_frame)
    except XmemError as error:
        mark_failed(store, Failure.of(error))
        raise
