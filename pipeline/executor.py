"""Owns a segmenter and advances one or many streams with it; and `track`, a whole video in one call."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from pipeline.errors import UsageError
from pipeline.prompts import PromptSet
from pipeline.settings import DTYPES, TrackSettings
from pipeline.sources import open_source
from pipeline.store import StreamStore, generate_stream_id
from pipeline.stream import StreamSummary, StreamTracker
from xmem_core import MemoryConfig, VideoSegmenter, load_model

logger = logging.getLogger(__name__)

OnFrame = Callable[[StreamTracker], None]


class Executor:
    """Runs streams on one device in this process.

    Args:
        segmenter: shared by all streams.
        threads: CPU threads of the network, for the whole process.
    """

    def __init__(self, segmenter: VideoSegmenter, threads: int | None = None) -> None:
        self.segmenter = segmenter
        if threads is not None:
            torch.set_num_threads(threads)

    def advance(self, streams: Sequence[StreamTracker]) -> list[StreamTracker]:
        """One frame further on every stream; returns those that go on."""
        inputs = [(stream, step) for stream in streams if (step := stream.next_input()) is not None]
        results = self.segmenter.step_many([(s.state, s.image, s.prompt) for _, s in inputs])
        for (stream, _), result in zip(inputs, results, strict=True):
            stream.accept(result)
        return [stream for stream, _ in inputs]

    def run(self, stream: StreamTracker, on_frame: OnFrame | None = None) -> StreamSummary:
        """One stream to its end."""
        while self.advance([stream]):
            if on_frame is not None:
                on_frame(stream)
        return stream.summary


def track(
    video: str | os.PathLike[str],
    out: str | os.PathLike[str],
    prompts: PromptSet | None = None,
    *,
    stream_id: str | None = None,
    model: str = "xmem-lite",
    size: int | None = None,
    full_size: bool = False,
    device: str = "cpu",
    dtype: str = "float32",
    threads: int | None = None,
    memory: MemoryConfig | None = None,
    chunk_frames: int = 100,
    snapshot_chunks: int = 4,
    max_frames: int | None = None,
    box_segmenter: str = "grabcut",
    restart: bool = False,
    storage_options: Mapping[str, Any] | None = None,
    out_storage_options: Mapping[str, Any] | None = None,
    on_open: OnFrame | None = None,
    on_frame: OnFrame | None = None,
) -> StreamSummary:
    """Track a video's objects and write their mask tracks.

    Called again with the same arguments it goes on where it was interrupted; finished, it changes nothing.

    Args:
        video: path or fsspec URI of a video or a folder of images.
        out: path or fsspec URI of the output folder, which may hold other streams.
        prompts: what to track; may be left out when going on.
        stream_id: default: made from the video's name and location.
        model: see `xmem_core.load_model`.
        size: shorter side the network sees; default: the model's own.
        full_size: let the network see frames as they are.
        device, dtype, threads: where and how the network runs. Threads default to those the stream was begun
            with, else to torch's.
        memory: memory settings.
        chunk_frames, snapshot_chunks, max_frames, box_segmenter: see `TrackSettings`.
        restart: remove what the folder holds of this stream first.
        storage_options, out_storage_options: for the fsspec file systems of video and output.
        on_open, on_frame: called with the stream once it is open, and after every frame.

    Returns:
        the stream's summary.

    Raises:
        XmemError: one of `pipeline.errors`; what was committed stays.
    """
    uri = os.fspath(video)
    _check(device, dtype, threads)
    source = open_source(uri, threads=0, storage_options=storage_options)
    try:
        store = StreamStore(out, stream_id or generate_stream_id(uri), out_storage_options)
        if restart:
            store.restart()
        network = load_model(model, device)
        segmenter = VideoSegmenter(
            network,
            memory,
            size=None if full_size else size or network.config.default_size,
            dtype=getattr(torch, dtype),
        )
        settings = TrackSettings(
            model=model,
            model_fingerprint=segmenter.fingerprint,
            memory=segmenter.memory_config,
            size=segmenter.size,
            dtype=dtype,
            threads=threads or _threads_of(store) or torch.get_num_threads(),
            chunk_frames=chunk_frames,
            snapshot_chunks=snapshot_chunks,
            max_frames=max_frames,
            box_segmenter=box_segmenter,
        )
        executor = Executor(segmenter, settings.threads)
    except BaseException:
        source.close()
        raise
    with StreamTracker(source, store, segmenter, settings, prompts) as stream:
        if on_open is not None:
            on_open(stream)
        return executor.run(stream, on_frame)


def _check(device: str, dtype: str, threads: int | None) -> None:
    """What would otherwise fail late, and in torch's words."""
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is not allowed: choose one of {', '.join(DTYPES)}")
    if threads is not None and threads < 1:
        raise UsageError(f"threads {threads} is not allowed: at least 1")
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"device {device!r} cannot be used here: {reason}; cpu always can") from error


def _threads_of(store: StreamStore) -> int | None:
    """The thread count that the stream was begun with."""
    record = store.read_record() or {}
    threads = record.get("settings", {}).get("threads")
    return threads if isinstance(threads, int) else None
