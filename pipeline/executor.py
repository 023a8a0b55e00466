"""Owns a segmenter and advances one or many streams with it; and `track`, a whole video in one call."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Unpack

import torch

from pipeline.base.errors import SourceError, UsageError, XmemError
from pipeline.prompts.resolving import PromptSet
from pipeline.settings import AUTO, DTYPES, ModelSettings, TrackOptions, TrackSettings
from pipeline.storage.failures import Failure
from pipeline.stream import StreamSummary, StreamTracker
from pipeline.stream_record import mark_failed
from pipeline.tracks.sinks import Sinks
from pipeline.tracks.store import StreamStore, generate_stream_id
from pipeline.video.sources import open_source
from xmem_core import MemoryConfig, VideoSegmenter, load_model
from xmem_core.weights import MODEL_NAMES, WeightsError

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
        """One frame further on every stream; returns those that go on.

        Raises what the first stream that fails raises. The others lose nothing by it: they go on with the
        next call, without the failed one, which raises the same again.
        """
        inputs = [(stream, step) for stream in streams if (step := stream.next_input()) is not None]
        results = self.segmenter.step_many([(s.state, s.image, s.prompt) for _, s in inputs])
        failure: Exception | None = None
        for (stream, _), result in zip(inputs, results, strict=True):
            try:
                stream.accept(result)
            except Exception as error:
                # All states have moved on by a frame; each stream must hear of it.
                failure = failure or error
        if failure is not None:
            raise failure
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
    settings: TrackSettings | None = None,
    restart: bool = False,
    storage_options: Mapping[str, Any] | None = None,
    out_storage_options: Mapping[str, Any] | None = None,
    on_open: OnFrame | None = None,
    on_frame: OnFrame | None = None,
    **options: Unpack[TrackOptions],
) -> StreamSummary:
    """Track a video's objects and write their mask tracks.

    Called again with the same arguments it goes on where it was interrupted; finished, it changes nothing.

    Args:
        video: path or fsspec URI of a video or a folder of images.
        out: path or fsspec URI of the output folder, which may hold other streams.
        prompts: what to track; may be left out when going on, and with a detector.
        stream_id: default: made from the video's name and location.
        settings: model, memory, detector and commits; see `pipeline.settings.TrackSettings`.
        restart: remove what the folder holds of this stream first; not before everything else is in order.
        storage_options, out_storage_options: for the fsspec file systems of video and output.
        on_open, on_frame: called with the stream once it is open, and after every frame.
        options: single settings by name, in place of those of `settings`: model, size, device, dtype,
            threads, memory, detector, detect_every, chunk_frames, sinks, ...; all are in `TrackOptions`.

    Returns:
        the stream's summary.

    Raises:
        XmemError: one of `pipeline.base.errors`; what was committed stays.
    """
    uri = os.fspath(video)
    chosen = (settings or TrackSettings()).with_options(options)
    check_device(chosen.model.device)
    store = StreamStore(out, stream_id or generate_stream_id(uri), out_storage_options)
    try:
        source = open_source(
            uri, threads=0, storage_options=storage_options, max_pixels=chosen.commit.max_pixels
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


def open_segmenter(model: ModelSettings | None = None, memory: MemoryConfig | None = None) -> VideoSegmenter:
    """A segmenter as `track` makes it.

    dtype "auto": bfloat16 on a CPU that computes with it, for all but the published models, which keep the
    precision they were published for; else float32.

    Raises:
        UsageError: one of the arguments is wrong. XmemError: a published model cannot be fetched.
    """
    model = model or ModelSettings()
    check_device(model.device)
    if model.threads is not None:
        torch.set_num_threads(model.threads)
    try:
        network = load_model(model.name, model.device)
    except WeightsError as error:
        raise weights_failure(model.name, error) from error
    side = None if model.full_size else model.size or network.config.default_size
    dtype = model.dtype
    if dtype == AUTO:
        fast = network.config.key_backbone != "resnet50" and torch.device(model.device).type == "cpu"
        dtype = "bfloat16" if fast and has_bfloat16() else "float32"
    return VideoSegmenter(network, memory, size=side, dtype=getattr(torch, dtype))


def has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 itself; where it doesn't, that is slower than float32."""
    try:
        found: Mapping[str, object] = torch.cpu.get_capabilities()
    except (AttributeError, RuntimeError):  # an older torch, or a CPU it can't tell about
        return False
    return any(bool(found.get(name)) for name in ("avx512_bf16", "amx_bf16"))


def weights_failure(model: str, error: WeightsError) -> XmemError:
    """The error to report: a name or file that was given is a request, a known model's absence a failure."""
    return XmemError(str(error)) if model in MODEL_NAMES else UsageError(str(error))


def check_device(device: str) -> None:
    """Raises UsageError if torch cannot compute on a device; it would fail late, and in torch's words."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"device {device!r} cannot be used here: {reason}; cpu always can") from error


@dataclass(frozen=True)
class Begun:
    """What a later run of a stream keeps of its first unless told otherwise; None: not begun yet."""

    threads: int | None = None
    dtype: str | None = None

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Begun:
        """That of a stream record's settings."""
        threads, dtype = settings.get("threads"), settings.get("dtype")
        return cls(
            threads if type(threads) is int and threads > 0 else None, dtype if dtype in DTYPES else None
        )

    def keep(self, model: ModelSettings, *, threads: bool = False) -> ModelSettings:
        """The model's settings for such a stream: of those left open, what it was begun with.

        Args:
            threads: keep the stream's number of threads even if the settings name another.
        """
        dtype = self.dtype if model.dtype == AUTO and self.dtype is not None else model.dtype
        number = self.threads or model.threads if threads else model.threads or self.threads
        return replace(model, dtype=dtype, threads=number)


def begun_with(store: StreamStore) -> Begun:
    """The thread count and the precision that a stream was begun with."""
    settings = (store.read_record() or {}).get("settings")
    return Begun.of(settings) if isinstance(settings, dict) else Begun()
