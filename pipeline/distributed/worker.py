"""Worker: a tracker process with one model and several open streams, tracking chunks on request.

Does not import Ray; `pipeline.distributed.actors` puts it into an actor. After any crash, a worker has no
open streams, and opening a stream reads its progress from the store.
"""

from __future__ import annotations

import gc
import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch

from pipeline.base.errors import StoreError, UsageError, XmemError
from pipeline.base.records import FrameChunk
from pipeline.base.redaction import redacted_trace
from pipeline.distributed.messages import ChunkReport, Outcome, StreamSpec, StreamStatus, WorkerSettings
from pipeline.prompts.resolving import PromptSet, load_mask_png, load_prompts
from pipeline.storage.failures import Failure
from pipeline.storage.opening import open_files
from pipeline.tracking.files.executor import Begun, begun_with, step_inputs
from pipeline.tracking.files.stream_tracker import StepInput, StreamTracker
from pipeline.tracking.look_ahead import threads_of_step
from pipeline.tracking.memory_plan import (
    device_bytes,
    predict_ahead_bytes,
    predict_state_bytes,
    predict_workspace_bytes,
)
from pipeline.tracking.segmenters import open_segmenter
from pipeline.tracking.settings import AUTO, TrackSettings, dtype_name
from pipeline.tracks.sinks import Sinks
from pipeline.tracks.store import StreamStore
from pipeline.video.sources import open_source
from xmem_core import StepResult

logger = logging.getLogger(__name__)

_READERS = 16
# How long frames wait for those of other streams: about as long as a step of one stream takes on a GPU.
_WAIT_SECONDS = 0.005
# Device faults that persist after the call. Older releases of torch identify them only by their message.
_BREAKING: tuple[type[BaseException], ...] = tuple(filter(None, [getattr(torch, "AcceleratorError", None)]))


@dataclass
class _Open:
    stream: StreamTracker
    told: int = 0  # number of warnings already reported

    def news(self) -> tuple[str, ...]:
        new = tuple(self.stream.summary.warnings[self.told :])
        self.told += len(new)
        return new


@dataclass(frozen=True)
class _Chunk:
    """A chunk under way; `before` frames of its stream were tracked when it began."""

    held: _Open
    chunk: FrameChunk
    begun: float
    before: int


class Worker:
    """Tracks chunks of several streams on one device: one at a time, on a GPU also together.

    Errors of a single stream are not raised but returned as a `Failure`; the other streams continue.

    Args:
        settings: settings of all streams.

    Raises:
        UsageError: the settings are invalid. XmemError: the model cannot be loaded.
    """

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self._tracking = settings.tracking
        self._sinks = Sinks.load(self._tracking.commit.sinks)
        self._segmenter = open_segmenter(self._tracking.model, self._tracking.memory)
        self._segmenters = {dtype_name(self._segmenter): self._segmenter}
        self._threads = self._tracking.model.threads or torch.get_num_threads()
        self._streams: dict[str, _Open] = {}
        # After an illegal access or a failed assertion on a GPU, every later call of any stream fails.
        self.broken = False

    def facts(self) -> dict[str, Any]:
        """Facts of this process: host, pid, device, the device's memory and the weights' size, in bytes.

        `output_fault` is the reason why rows written here would not reach the batch's output folder; None if
        they would, according to the settings' `probe`.
        """
        return {
            "host": socket.gethostname(),
            "output_fault": self._output_fault(),
            "pid": os.getpid(),
            "device": str(self._segmenter.device),
            "device_bytes": device_bytes(self._segmenter.device),
            "weights_bytes": self._segmenter.weights_bytes,
            "streams": sorted(self._streams),
        }

    def _output_fault(self) -> str | None:
        probe, out = self._settings.probe, self._settings.out
        if probe is None:
            return None
        try:
            if open_files(out, self._settings.out_storage_options).exists(probe):
                return None
        except StoreError as error:
            return f"cannot use {out}: {error}"
        return (
            f"has another folder at {out}: give --out a folder that all machines share under the same path, "
            "or a URI such as s3://bucket/folder"
        )

    def conflicts(
        self, stream_ids: Sequence[str], directions: Mapping[str, str] | None = None
    ) -> list[tuple[str, str]]:
        """Return which of these streams have rows with other settings, and which settings differ.

        Args:
            directions: directions of single streams that differ from the settings', by id.
        """
        wanted = [(directions or {}).get(stream_id) for stream_id in stream_ids]
        with ThreadPoolExecutor(_READERS) as pool:
            found = zip(stream_ids, pool.map(self._differences, stream_ids, wanted), strict=True)
            return [(stream_id, "; ".join(differing)) for stream_id, differing in found if differing]

    def _differences(self, stream_id: str, direction: str | None) -> list[str]:
        try:
            store = StreamStore(self._settings.out, stream_id, self._settings.out_storage_options)
            settings = (store.read_record() or {}).get("settings")
            if not isinstance(settings, dict):
                return []
            begun = Begun.of(settings)
            model = begun.keep(self._tracking.model, threads=True)
            asked = _directed(self._tracking, direction).of_segmenter(
                self._segmenter, model.threads or self._threads
            )
            if model.dtype != AUTO:
                asked = replace(asked, model=replace(asked.model, dtype=model.dtype))
            differing = asked.differences(settings)
            return differing if differing and store.committed(newest_only=True).files else []
        except StoreError:
            return []  # opening it reports the error

    def open(self, spec: StreamSpec, state: bytes | None = None) -> StreamStatus:
        """Open a stream at the progress found in the store; a stream that is already open is not changed.

        Args:
            state: result of `release` of this or another worker. Optional: without it the state is rebuilt.
        """
        held = self._streams.get(spec.stream_id)
        try:
            if held is None:
                held = _Open(self._begin(spec, state))
                self._streams[spec.stream_id] = held
            return self._status(held)
        except Exception as error:
            self.close(spec.stream_id)
            return StreamStatus(spec.stream_id, failure=self._failure(spec.stream_id, error))

    def track(self, chunk: FrameChunk) -> ChunkReport:
        """Track a chunk, up to its last frame or the end of the video."""
        return self.track_many([chunk])[0]

    def track_many(self, chunks: Sequence[FrameChunk]) -> list[ChunkReport]:
        """Track chunks of several streams: on a GPU frame by frame together, else one after another.

        Each is reported as `track` does; all reports come when all chunks are done.
        """
        reports: dict[int, ChunkReport] = {}
        running: dict[int, _Chunk] = {}
        for i, chunk in enumerate(chunks):
            begun = self._begin_chunk(chunk)
            if isinstance(begun, ChunkReport):
                reports[i] = begun
            else:
                running[i] = begun
        if self._segmenter.batches_streams:
            self._track_together(running, reports)
        else:
            for i, one in running.items():
                while i not in reports:
                    self._track_frame({i: one}, reports)
        return [reports[i] for i in range(len(chunks))]

    def _begin_chunk(self, chunk: FrameChunk) -> _Chunk | ChunkReport:
        held = self._streams.get(chunk.stream_id)
        if held is None:
            return ChunkReport(chunk.stream_id, "unknown")
        stream = held.stream
        running = _Chunk(held, chunk, time.monotonic(), stream.summary.tracked)
        try:
            if stream.ended:
                return self._end_chunk(running, "finished")
            if chunk.first != _position(stream):
                return self._end_chunk(running, "refused")
            if (chunk.last + 1) % stream.settings.commit.chunk_frames:
                raise UsageError(
                    f"a chunk that ends at frame {chunk.last} is not allowed: rows are committed by "
                    f"{stream.settings.commit.chunk_frames} frames"
                )
        except Exception as error:
            return self._fail_chunk(running, error)
        return running

    def _end_chunk(self, running: _Chunk, outcome: Outcome) -> ChunkReport:
        stream, stream_id = running.held.stream, running.chunk.stream_id
        report = ChunkReport(
            stream_id,
            outcome,
            next_frame=_position(stream),
            frames=stream.summary.tracked - running.before,
            rows=stream.rows,
            losses=stream.summary.losses,
            ellipses=stream.ellipses,
            seconds=time.monotonic() - running.begun,
            warnings=running.held.news(),
        )
        if outcome == "finished":
            self.close(stream_id)
        return report

    def _fail_chunk(self, running: _Chunk, error: Exception) -> ChunkReport:
        stream, stream_id = running.held.stream, running.chunk.stream_id
        failure = self._failure(stream_id, error)
        self.close(stream_id)  # flushes what can be written, so that the numbers match the store
        return ChunkReport(
            stream_id,
            "failed",
            next_frame=_offset(stream) + stream.summary.frames,
            frames=stream.summary.tracked - running.before,
            rows=stream.summary.rows,
            losses=stream.summary.losses,
            ellipses=stream.ellipses,
            seconds=time.monotonic() - running.begun,
            failure=failure,
        )

    def _track_together(self, running: Mapping[int, _Chunk], reports: dict[int, ChunkReport]) -> None:
        """Track chunks to their ends, a frame of each stream that has one at a time."""
        while left := {i: chunk for i, chunk in running.items() if i not in reports}:
            end = time.monotonic() + _WAIT_SECONDS
            ready = {}
            for i, chunk in left.items():
                if chunk.held.stream.settles_within(max(0.0, end - time.monotonic())):
                    ready[i] = chunk
            # None is decoded: wait for the first one.
            self._track_frame(ready or dict([next(iter(left.items()))]), reports)

    def _track_frame(self, running: Mapping[int, _Chunk], reports: dict[int, ChunkReport]) -> None:
        """Track one frame of each stream; a chunk that ends there, or fails, is reported."""
        inputs: dict[int, StepInput] = {}
        for i, chunk in running.items():
            stream = chunk.held.stream
            torch.set_num_threads(threads_of_step(self._segmenter, stream.settings.threads))
            try:
                # Only the next frame shows whether the chunk is complete, and whether a pass or the video
                # ends here.
                if not stream.settle():
                    reports[i] = self._end_chunk(chunk, "finished")
                elif stream.next_frame + _before(stream) > chunk.chunk.last:
                    reports[i] = self._end_chunk(chunk, "tracked")
                elif (step := stream.next_input()) is not None:
                    inputs[i] = step
            except Exception as error:
                reports[i] = self._fail_chunk(chunk, error)
        for i, outcome in self._stepped({i: (running[i].held.stream, step) for i, step in inputs.items()}):
            try:
                if isinstance(outcome, Exception):
                    raise outcome
                running[i].held.stream.accept(outcome)
            except Exception as error:
                reports[i] = self._fail_chunk(running[i], error)

    def _stepped(
        self, inputs: Mapping[int, tuple[StreamTracker, StepInput]]
    ) -> Iterator[tuple[int, StepResult | Exception]]:
        """Step the streams, those of one precision together; of each its result or its error."""
        by_dtype: dict[str, list[int]] = {}
        for i, (stream, _) in inputs.items():
            by_dtype.setdefault(stream.settings.model.dtype, []).append(i)
        for dtype, members in by_dtype.items():
            outcomes = step_inputs(self._segmenters[dtype], [inputs[i][1] for i in members])
            yield from zip(members, outcomes, strict=True)

    def release(self, stream_id: str, to_store: bool = True) -> bytes | None:
        """Close a stream between two chunks, so that another worker may continue it.

        Args:
            to_store: keep its state in the store; otherwise it is returned.

        Returns:
            The state for `open`; None if it is in the store, or if the stream is not open here, has ended or
            failed.
                Then it is rebuilt from the committed data.
        """
        held = self._streams.get(stream_id)
        if held is None:
            return None
        try:
            if held.stream.ended:
                return None
            if to_store:
                held.stream.save()
                return None
            return held.stream.export()
        except Exception as error:
            logger.warning("stream %s: released without its state: %s", stream_id, error)
            return None
        finally:
            self.close(stream_id)

    def close(self, stream_id: str) -> None:
        """Close a stream and free its memory. Committed rows are kept."""
        held = self._streams.pop(stream_id, None)
        if held is None:
            return
        try:
            held.stream.close()
        except Exception as error:
            logger.warning("stream %s: closing it failed: %s", stream_id, error)

    def close_all(self) -> None:
        """Close every stream."""
        for stream_id in list(self._streams):
            self.close(stream_id)

    def _begin(self, spec: StreamSpec, state: bytes | None) -> StreamTracker:
        options = self._settings
        store = StreamStore(options.out, spec.stream_id, options.out_storage_options)
        prompts = self._prompts(spec)
        begun = Begun() if spec.restart else begun_with(store)
        # A stream keeps the number of threads it was begun with, and with "auto" the precision, even if it
        # was begun on another kind of CPU.
        model = begun.keep(self._tracking.model, threads=True)
        if model.dtype == AUTO:
            model = replace(model, dtype=dtype_name(self._segmenter))
        if model.dtype not in self._segmenters:
            self._segmenters[model.dtype] = open_segmenter(model, self._tracking.memory)
        segmenter = self._segmenters[model.dtype]
        tracking = _directed(self._tracking, spec.direction)
        settings = tracking.of_segmenter(segmenter, model.threads or self._threads)
        source = open_source(
            spec.uri,
            threads=0,
            storage_options=options.storage_options,
            max_pixels=options.tracking.commit.max_pixels,
            decoder=options.tracking.commit.decoder,
            device=tracking.model.device,
        )
        return StreamTracker(
            source,
            store,
            segmenter,
            settings,
            prompts,
            restart=spec.restart,
            snapshot=state,
            sinks=self._sinks,
            extra=spec.extra,
        )

    def _prompts(self, spec: StreamSpec) -> PromptSet | None:
        if spec.prompts is not None:
            return PromptSet.from_record(spec.prompts)
        if spec.prompts_uri is None:
            return None
        if spec.prompts_uri.split("?")[0].lower().endswith(".png"):
            return load_mask_png(
                spec.prompts_uri,
                storage_options=self._settings.storage_options,
                max_pixels=self._settings.tracking.commit.max_pixels,
            )
        return load_prompts(spec.prompts_uri, self._settings.storage_options)

    def _status(self, held: _Open) -> StreamStatus:
        stream = held.stream
        source, segmenter = stream.source, self._segmenter
        dtype = stream.settings.model.dtype
        side = stream.network_shorter_side
        sizes = (source.height, source.width, stream.most_objects, side, dtype)
        ahead = 0
        if stream.looks_ahead:
            ahead = predict_ahead_bytes(segmenter.config, source.height, source.width, side, dtype)
        status = StreamStatus(
            stream.store.stream_id,
            next_frame=_position(stream),
            rows=stream.summary.rows,
            losses=stream.summary.losses,
            ellipses=stream.ellipses,
            finished=stream.ended,
            height=source.height,
            width=source.width,
            frame_count=None if stream.frame_count is None else _offset(stream) + stream.frame_count,
            offset=_offset(stream),
            objects=stream.most_objects,
            state_bytes=ahead
            + predict_state_bytes(
                segmenter.config,
                segmenter.memory_config,
                *sizes,
                frames=source.frame_count,
                copied=stream.copied_elements,
            ),
            workspace_bytes=predict_workspace_bytes(
                segmenter.config,
                segmenter.memory_config,
                *sizes,
                device=segmenter.device.type,
                frames=source.frame_count,
                copied=stream.copied_elements,
            ),
            warnings=held.news(),
        )
        if stream.ended:
            self.close(stream.store.stream_id)
        return status

    def _failure(self, stream_id: str, error: Exception) -> Failure:
        if isinstance(error, XmemError):
            logger.warning("stream %s: %s", stream_id, error)
        else:
            # A bug here or in a library, so the traceback is logged.
            logger.error("stream %s: %s", stream_id, redacted_trace(error))
        if isinstance(error, _BREAKING):
            self.broken = True
        if isinstance(error, torch.OutOfMemoryError):
            gc.collect()
            torch.cuda.empty_cache()
        return Failure.of(error)


def _directed(settings: TrackSettings, direction: str | None) -> TrackSettings:
    return settings if direction is None else replace(settings, direction=direction)


def _offset(stream: StreamTracker) -> int:
    """Number by which frames are counted higher in the forward pass; 0 without a backward pass.

    A multiple of the chunk length, so that chunks of both passes begin and end where rows are committed.
    """
    size = stream.settings.commit.chunk_frames
    return -(-stream.backward_frames // size) * size


def _before(stream: StreamTracker) -> int:
    return 0 if stream.goes_backward else _offset(stream)


def _position(stream: StreamTracker) -> int:
    """The stream's position, as chunks and reports count it."""
    return stream.position + _before(stream)
