"""Propagation: tracks a project's recipe (see `pipeline.annotate.recipe`) in a background thread.

Each recipe is tracked in a work folder of its own, an ordinary output folder:

    OUT/annotate/<stream>/work/<digest of the recipe>/

Chunks are committed there exactly once, as by `track`, but cut after `CUT_FRAMES` and where tracking pauses,
each with the state after it. A new recipe begins with what an earlier one has of it before the first frame
that differs (`pipeline.tracking.files.carry_over`), so that a correction tracks only from the last state
before it. Going back to a former recipe finds its folder again. When a stream is finished, its files, with
cut chunks joined, replace those of the stream in OUT (`pipeline.tracks.copying.replace_stream`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch

from pipeline.annotate.gauges import gauges
from pipeline.annotate.layers import (
    Found,
    Layer,
    find_rows,
    find_strips,
    read_layer,
    valid_frames,
    work_folder,
)
from pipeline.annotate.project import project_folder
from pipeline.annotate.recipe import Recipe, changed_memory, write_edits
from pipeline.annotate.strips import Strips
from pipeline.base.closeable import Closing
from pipeline.base.errors import SettingsConflictError, SourceError, UsageError, XmemError
from pipeline.storage.files import Files
from pipeline.storage.opening import open_files
from pipeline.tracking.files.carry_over import carry_over
from pipeline.tracking.files.executor import Begun, Executor
from pipeline.tracking.files.replay import Replay
from pipeline.tracking.files.stream_tracker import StreamTracker
from pipeline.tracking.segmenters import open_segmenter
from pipeline.tracking.settings import TrackSettings
from pipeline.tracks.copying import replace_stream
from pipeline.tracks.layout import load_record, remove_folder
from pipeline.tracks.store import StreamStore
from pipeline.video.sources import VideoSource, open_source
from xmem_core import MemoryConfig, VideoSegmenter

log = logging.getLogger(__name__)

KEPT_WORKS = 6
KEPT_SNAPSHOTS = 24
SNAPSHOT_BYTES = 128 * 2**20
"""More snapshots than these are kept up to so many bytes, spread over the video."""
CUT_FRAMES = 20
"""So often at least, a chunk is committed with its state: a correction tracks fewer frames again that it does
not change, as long as all snapshots are kept."""


@dataclass(frozen=True)
class PropagationStatus:
    """What the propagation does now.

    Args:
        state: idle, loading, running, paused, publishing, finished or failed.
        position: the next frame to track in the run under way; None without one.
        until: the frame before which it pauses; None: the end of the video.
        rate: frames per second of this run.
        message: what went wrong, if it failed.
    """

    state: str = "idle"
    position: int | None = None
    until: int | None = None
    rate: float | None = None
    message: str | None = None


@dataclass(frozen=True)
class _Job:
    recipe: Recipe
    until: int | None


class Propagation(Closing):
    """Tracks on request, one job at a time. Thread-safe.

    Args:
        video: URI of the video.
        fingerprint: fingerprint that it must have.
        out: the output folder.
        stream_id: the stream in it.
        settings: tracking settings.
        storage_options, out_storage_options: of the file systems of video and output.
    """

    def __init__(
        self,
        video: str,
        fingerprint: str,
        out: Files,
        stream_id: str,
        settings: TrackSettings,
        *,
        storage_options: Mapping[str, Any] | None = None,
        out_storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        self._video, self._fingerprint = video, fingerprint
        self._out, self._stream_id = out, stream_id
        self._settings = settings
        self._options, self._out_options = storage_options, out_storage_options
        self._executor: Executor | None = None
        self._memory = settings.memory  # that of the executor
        self._chosen = settings
        self._loading = threading.Lock()
        self._layers: list[Layer] = []
        self._published: Layer | None = None
        self._status = PropagationStatus()
        self._gauges: dict[str, Any] | None = None
        self._job: _Job | None = None
        self._asked: Recipe | None = None  # that of the newest job
        self._outdated: int | None = None  # the first frame of which its rows are outdated
        self._pause = threading.Event()
        self._closing = False
        self._changed = threading.Condition()
        self._find_layers()
        self._thread = threading.Thread(target=self._loop, name="xmem-annotate", daemon=True)
        self._thread.start()

    # --- for requests ----------------------------------------------------------------------------

    @property
    def status(self) -> PropagationStatus:
        return self._status

    def start(self, recipe: Recipe, until: int | None = None) -> None:
        """Track the recipe from where rows of them end, up to the frame before `until`, or to the end.

        Raises:
            UsageError: there is nothing to track.
        """
        if recipe.prompts.is_empty():
            raise UsageError("there is nothing to track: point at an object first")
        with self._changed:
            self._pause.set()  # what runs now makes way
            self._job = _Job(recipe, until)
            self._asked, self._outdated = recipe, None
            self._changed.notify_all()

    def pause(self) -> None:
        """Pause after the frame that is being tracked, and commit what is tracked."""
        with self._changed:
            self._job = None
            self._pause.set()

    def keep_to(self, recipe: Recipe) -> None:
        """Pause where rows that are being tracked are not those of the given recipe any more.

        Rows of frames before the first change are tracked on: they are valid for both.
        """
        with self._changed:
            if self._asked is not None:
                self._outdated = self._asked.first_change(recipe)

    def rows(self, recipe: Recipe, frame_index: int) -> Found | None:
        """The rows of a frame, see `find_rows`; None if no layer has any."""
        return find_rows(self._all_layers(), recipe, frame_index)

    def strips(self, recipe: Recipe) -> Strips:
        """Where objects are seen, see `find_strips`."""
        return find_strips(self._all_layers(), recipe)

    def tracked(self, recipe: Recipe) -> int:
        """Number of frames, from 0 on, that are tracked with the given recipe."""
        return max((valid_frames(layer, recipe) for layer in self._all_layers()), default=0)

    @property
    def gauges(self) -> dict[str, Any] | None:
        """How full the memory is after the frame tracked last, see `gauges`; None before the first."""
        return self._gauges

    def segmenter(self, recipe: Recipe) -> VideoSegmenter:
        """The segmenter with the memory settings of a recipe."""
        return self._load(recipe)[0].segmenter

    def replay(self, recipe: Recipe, frame: int) -> Replay:
        """A replay of the recipe up to a frame.

        Raises:
            UsageError: the frame before it is not tracked yet.
        """
        layer = max(self._all_layers(), key=lambda layer: valid_frames(layer, recipe), default=None)
        if layer is None or valid_frames(layer, recipe) < frame:
            raise UsageError(f"frame {frame} is not tracked with the present prompts yet: propagate first")
        executor, settings = self._load(recipe)
        source = self._opened_video()
        return Replay(
            layer.files, self._stream_id, frame, source, executor.segmenter, settings, self._out_options
        )

    def available(self) -> int:
        """Number of frames that have rows of any recipe."""
        return max((layer.available for layer in self._all_layers()), default=0)

    def is_published(self, recipe: Recipe) -> bool:
        """Whether the stream in the output folder is finished and has the rows of the given recipe."""
        return self._published is not None and self._published.recipe.equals(recipe)

    def close(self) -> None:
        """Stop the thread; what is tracked is committed first."""
        with self._changed:
            self._closing = True
            self._job = None
            self._pause.set()
            self._changed.notify_all()
        self._thread.join()

    # --- layers ----------------------------------------------------------------------------------

    def _all_layers(self) -> list[Layer]:
        return [*self._layers, *([self._published] if self._published is not None else [])]

    def _work_files(self, name: str) -> Files:
        return open_files(f"{self._out.root.rstrip('/')}/{name}", self._out_options)

    def _find_layers(self) -> None:
        works = f"{project_folder(self._stream_id)}/work"
        found = [
            read_layer(self._work_files(f"{works}/{name}"), self._stream_id)
            for name in self._out.folders(works)
        ]
        layers = [layer for layer in found if layer is not None]
        self._layers = sorted(layers, key=lambda layer: -layer.available)
        self._find_published()

    def _find_published(self) -> None:
        self._published = None
        layer = read_layer(self._out, self._stream_id)
        record = None if layer is None else load_record(self._out, self._stream_id)
        if record is not None and record.get("source_fingerprint") == self._fingerprint:
            self._published = layer if record.get("state") == "finished" else None

    def _layer_for(self, recipe: Recipe, settings: TrackSettings) -> Layer:
        """The layer in which the recipe is tracked, begun from the one that has most of it."""
        folder = work_folder(self._stream_id, recipe, self._settings)
        files = self._work_files(folder)
        known = [layer for layer in self._layers if layer.files.root == files.root]
        best = max(self._all_layers(), key=lambda layer: valid_frames(layer, recipe), default=None)
        if best is not None and best not in known and self._fits(best, settings):
            own = valid_frames(known[0], recipe) if known else 0
            # Replacing a folder that has rows already is worthwhile only for more than it has.
            if min(valid_frames(best, recipe), best.committed) > own:
                remove_folder(self._out, folder)
                # Before any row that depends on them.
                write_edits(files, self._stream_id, recipe.edits)
                change = best.recipe.first_change(recipe)
                kept = carry_over(best.files, files, self._stream_id, recipe.prompts, change)
                log.info("%s: %d frames carried over", self._stream_id, kept)
                known = []
        write_edits(files, self._stream_id, recipe.edits)
        layer = known[0] if known else Layer(files, self._stream_id, recipe)
        others = [other for other in self._layers if other.files.root != files.root]
        self._layers = [layer, *others]
        for gone in self._layers[KEPT_WORKS:]:
            remove_folder(self._out, gone.files.root.removeprefix(self._out.root).strip("/"))
        self._layers = self._layers[:KEPT_WORKS]
        return layer

    def _fits(self, layer: Layer, settings: TrackSettings) -> bool:
        """Whether a layer's rows come from these settings and the video of this run."""
        record = load_record(layer.files, self._stream_id)
        return (
            record is not None
            and record.get("source_fingerprint") == self._fingerprint
            and not settings.differences(record["settings"])
        )

    # --- the thread ------------------------------------------------------------------------------

    def _loop(self) -> None:
        stream: StreamTracker | None = None
        layer: Layer | None = None
        while True:
            with self._changed:
                while self._job is None and not self._closing:
                    self._changed.wait()
                if self._closing:
                    break
                job, self._job = self._job, None
                self._pause.clear()
            assert job is not None
            try:
                self._status = PropagationStatus("loading", until=job.until)
                if stream is None or layer is None or not layer.recipe.equals(job.recipe):
                    stream, before = None, stream
                    if before is not None:
                        before.close()
                    stream, layer = self._opened(job.recipe)
                if self._track(stream, layer, job):
                    stream.close()
                    stream = None
                    self._publish(layer)
            except Exception as error:
                if not isinstance(error, XmemError):
                    log.exception("propagation of %s failed", self._stream_id)
                with suppress(XmemError):
                    if stream is not None:
                        stream.close()
                stream = None
                text = str(error).splitlines()[0] if str(error) else type(error).__name__
                self._status = PropagationStatus("failed", message=text)
        if stream is not None:
            with suppress(XmemError):
                stream.close()

    def _opened(self, recipe: Recipe) -> tuple[StreamTracker, Layer]:
        executor, settings = self._load(recipe)
        source = self._opened_video()
        try:
            layer = self._layer_for(recipe, settings)
            for retry in (False, True):
                store = StreamStore(
                    layer.files.root,
                    self._stream_id,
                    self._out_options,
                    snapshots=KEPT_SNAPSHOTS,
                    spread=SNAPSHOT_BYTES,
                )
                try:
                    stream = StreamTracker(source, store, executor.segmenter, settings, recipe.prompts)
                except SettingsConflictError as error:
                    if retry:
                        raise
                    # Of another version or precision of the model: the work starts over.
                    log.info("%s: %s", self._stream_id, error)
                    store.restart()
                    write_edits(layer.files, self._stream_id, recipe.edits)
                    source = self._opened_video()
                    continue
                layer.reload()
                return stream, layer
            raise AssertionError("unreachable")
        except BaseException:
            source.close()
            raise

    def _load(self, recipe: Recipe) -> tuple[Executor, TrackSettings]:
        """The executor with the memory settings of a recipe, and all its settings."""
        with self._loading:
            executor, settings = self._loaded(changed_memory(self._settings.memory, recipe.memory))
        return executor, replace(settings, direction=recipe.direction)

    def _loaded(self, memory: MemoryConfig) -> tuple[Executor, TrackSettings]:
        if self._executor is not None and self._memory == memory:
            return self._executor, self._chosen
        begun = Begun()
        for layer in self._all_layers():
            record = load_record(layer.files, self._stream_id)
            if record is not None:
                begun = Begun.of(record["settings"])
                break
        model = begun.keep(self._settings.model)
        segmenter = open_segmenter(model, memory)
        chosen = self._settings.of_segmenter(segmenter, model.threads or torch.get_num_threads())
        # A correction goes on from the chunk before it.
        self._chosen = replace(chosen, commit=replace(chosen.commit, snapshot_chunks=1))
        self._memory = memory
        self._executor = Executor(segmenter, chosen.threads)
        return self._executor, self._chosen

    def _opened_video(self) -> VideoSource:
        source = open_source(
            self._video,
            threads=0,
            storage_options=self._options,
            max_pixels=self._settings.commit.max_pixels,
            decoder=self._settings.commit.decoder,
            device=self._settings.model.device,
        )
        if source.fingerprint != self._fingerprint:
            source.close()
            raise SourceError(
                f"{self._video} has changed since it was first annotated: bring back the former file, or "
                "annotate this one as another stream (--stream-id)"
            )
        return source

    def _track(self, stream: StreamTracker, layer: Layer, job: _Job) -> bool:
        """Track until the end (True), or until the job is paused, replaced or done (False)."""
        assert self._executor is not None
        begun, tracked = time.monotonic(), stream.summary.tracked
        committed = stream.summary.frames
        while True:
            # Rows follow, and positions count, in the forward pass.
            backward = stream.goes_backward
            position = None if stream.ended else 0 if backward else stream.next_frame
            seconds = time.monotonic() - begun
            rate = (stream.summary.tracked - tracked) / seconds if seconds > 0.2 else None
            self._status = PropagationStatus("running", position, job.until, rate)
            done = not backward and job.until is not None and position is not None and position >= job.until
            outdated = self._outdated is not None and position is not None and position >= self._outdated
            if self._pause.is_set() or done or outdated:
                # What is shown as tracked is then there again, also if this process is killed.
                stream.commit_here()
                layer.reload()
                self._status = PropagationStatus("paused", position, job.until, rate)
                return False
            if not backward and position is not None and position % CUT_FRAMES == 0:
                stream.commit_here()
            running = self._executor.advance([stream])
            if position is not None:  # a stream that was finished before has no state
                self._gauges = gauges(stream.state)
            if stream.summary.frames != committed:
                committed = stream.summary.frames
                layer.reload()
            if not running:
                layer.reload()
                return True
            if not stream.goes_backward and (stream.latest or stream.next_frame > layer.committed):
                layer.add(stream.next_frame - 1, stream.latest)

    def _publish(self, layer: Layer) -> None:
        self._status = PropagationStatus("publishing")
        replace_stream(
            layer.files, self._out, self._stream_id, chunk_frames=self._settings.commit.chunk_frames
        )
        self._find_published()
        self._status = PropagationStatus("finished")
