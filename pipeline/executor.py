"""Owns a segmenter and advances one or many streams with it; and `track`, a whole video in one call."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.errors import UsageError, XmemError
from pipeline.prompts import PromptSet
from pipeline.settings import AUTO, DTYPES, MIN_SIZE, TrackSettings, dtype_name
from pipeline.sinks import Sinks
from pipeline.sources import open_source
from pipeline.store import StreamStore, generate_stream_id
from pipeline.stream import StreamSummary, StreamTracker
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
    detector: str | None = None,
    detect_every: int = 5,
    max_objects: int = 8,
    out_of_sight_frames: int = 250,
    sinks: Sequence[str] = (),
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
        prompts: what to track; may be left out when going on, and with a detector.
        stream_id: default: made from the video's name and location.
        model: see `xmem_core.load_model`.
        size: shorter side the network sees; default: the model's own.
        full_size: let the network see frames as they are.
        device, dtype, threads: where and how the network runs. Threads default to those the stream was begun
            with, else to torch's. dtype "auto": what the stream was begun with, else see `open_segmenter`.
        memory: memory settings.
        chunk_frames, snapshot_chunks, max_frames, box_segmenter: see `TrackSettings`.
        detector, detect_every, max_objects, out_of_sight_frames: see `TrackSettings`.
        sinks: names of sinks that get the rows too, see `pipeline.sinks`.
        restart: remove what the folder holds of this stream first; not before everything else is in order.
        storage_options, out_storage_options: for the fsspec file systems of video and output.
        on_open, on_frame: called with the stream once it is open, and after every frame.

    Returns:
        the stream's summary.

    Raises:
        XmemError: one of `pipeline.errors`; what was committed stays.
    """
    uri = os.fspath(video)
    _check(device, dtype, threads, size)
    source = open_source(uri, threads=0, storage_options=storage_options)
    try:
        store = StreamStore(out, stream_id or generate_stream_id(uri), out_storage_options)
        also = Sinks.load(sinks)
        begun = Begun() if restart else begun_with(store)
        if dtype == AUTO:
            dtype = begun.dtype or AUTO
        segmenter = open_segmenter(
            model, memory, size=size, full_size=full_size, device=device, dtype=dtype, threads=threads
        )
        settings = TrackSettings(
            model=model,
            model_fingerprint=segmenter.fingerprint,
            memory=segmenter.memory_config,
            size=segmenter.size,
            dtype=dtype_name(segmenter),
            threads=threads or begun.threads or torch.get_num_threads(),
            chunk_frames=chunk_frames,
            snapshot_chunks=snapshot_chunks,
            max_frames=max_frames,
            box_segmenter=box_segmenter,
            detector=detector,
            detect_every=detect_every,
            max_objects=max_objects,
            out_of_sight_frames=out_of_sight_frames,
        )
        executor = Executor(segmenter, settings.threads)
    except BaseException:
        source.close()
        raise
    with StreamTracker(source, store, segmenter, settings, prompts, restart=restart, sinks=also) as stream:
        if on_open is not None:
            on_open(stream)
        return executor.run(stream, on_frame)


def open_segmenter(
    model: str,
    memory: MemoryConfig | None = None,
    *,
    size: int | None = None,
    full_size: bool = False,
    device: str = "cpu",
    dtype: str = "float32",
    threads: int | None = None,
) -> VideoSegmenter:
    """A segmenter as `track` makes it; the arguments are the same.

    dtype "auto": bfloat16 on a CPU that computes with it, for all but the published models, which keep the
    precision they were published for; else float32.

    Raises:
        UsageError: one of the arguments is wrong. XmemError: a published model cannot be fetched.
    """
    _check(device, dtype, threads, size)
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        network = load_model(model, device)
    except WeightsError as error:
        raise weights_failure(model, error) from error
    side = None if full_size else size or network.config.default_size
    if dtype == AUTO:
        fast = network.config.key_backbone != "resnet50" and torch.device(device).type == "cpu"
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


def _check(device: str, dtype: str, threads: int | None, size: int | None) -> None:
    """What would otherwise fail late, and in torch's words."""
    if size is not None and size < MIN_SIZE:
        raise UsageError(f"size={size} is not allowed: at least {MIN_SIZE} pixels")
    if dtype not in (AUTO, *DTYPES):
        raise UsageError(f"dtype {dtype!r} is not allowed: choose one of {', '.join((AUTO, *DTYPES))}")
    if threads is not None and threads < 1:
        raise UsageError(f"threads {threads} is not allowed: at least 1")
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


def begun_with(store: StreamStore) -> Begun:
    """The thread count and the precision that a stream was begun with."""
    settings = (store.read_record() or {}).get("settings")
    if not isinstance(settings, dict):
        return Begun()
    threads, dtype = settings.get("threads"), settings.get("dtype")
    return Begun(
        threads if type(threads) is int and threads > 0 else None, dtype if dtype in DTYPES else None
    )
