"""Replay: a file's stream tracked once more up to a frame, to look at its state there. Nothing is written.

It goes on from the newest snapshot before the frame, and makes the prompts, removals and edits of the memory
of the frames in between, as a run that resumes there does. So the state is that with which the rows of the
frame were made, on the same machine to the last bit.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from pipeline.base.closeable import Closing
from pipeline.base.errors import StoreError, UsageError
from pipeline.base.records import EVENTS_SCHEMA, TRACKS_SCHEMA
from pipeline.storage.files import Files
from pipeline.tracking.files.carry_over import stream_identity
from pipeline.tracking.files.stream_tracker import StepInput, StreamTracker
from pipeline.tracking.settings import BACKWARD, FORWARD, TrackSettings
from pipeline.tracking.snapshots.memory_edit import planned_edits
from pipeline.tracking.snapshots.stream import Snapshot
from pipeline.tracking.stream_record import RUNNING, StreamIdentity
from pipeline.tracks.layout import list_snapshots, load_record, snapshot_name
from pipeline.tracks.store import StreamStore
from pipeline.video.sources import VideoSource
from xmem_core import TrackerState, VideoSegmenter

logger = logging.getLogger(__name__)

# No chunk ends while a replay lasts: it commits nothing.
_ONE_CHUNK = 10**9


class Replay(Closing):
    """A stream of a file, replayed. Use it as a context manager.

    Args:
        files: the output folder of the stream.
        stream_id: its id.
        frame: first frame of interest.
        source: the tracked video, opened; closed with the replay.
        segmenter: of the model and the memory settings that the stream was tracked with.
        settings: the stream's, resolved by `TrackSettings.of_segmenter`.
        storage_options: of the file system of the output folder.

    Raises:
        UsageError: there is no such stream, or it has no forward pass. StoreError: it cannot be read.
    """

    def __init__(
        self,
        files: Files,
        stream_id: str,
        frame: int,
        source: VideoSource,
        segmenter: VideoSegmenter,
        settings: TrackSettings,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="xmem-replay-")
        self._segmenter = segmenter
        try:
            old, record = stream_identity(files, stream_id), load_record(files, stream_id)
            if old is None or record is None:
                raise UsageError(f"{files.root} holds no stream {stream_id!r}")
            settings = settings.as_begun(record["settings"])
            if settings.direction == BACKWARD:
                raise UsageError(f"stream {stream_id!r} was tracked backward only: it cannot be replayed")
            # The backward pass of `both` reads nothing of the forward one, nor the other way round.
            commit = replace(
                settings.commit, chunk_frames=_ONE_CHUNK, max_frames=None, sinks=(), keep_state=False
            )
            chosen = replace(settings, direction=FORWARD, commit=commit)
            new = StreamIdentity.of(source, chosen, old.prompts)
            store = StreamStore(self._folder.name, stream_id)
            snapshot = _snapshot(files, stream_id, frame, old.digests(record))
            start = 0 if snapshot is None else snapshot.next_frame
            store.write_record(
                {
                    "state": RUNNING,
                    **new.to_record(source),
                    "resolved_prompts": record.get("resolved_prompts", {}),
                    "frames": start,
                    "rows": 0,
                    "losses": 0,
                }
            )
            original = StreamStore(files.root, stream_id, storage_options)
            for planned in planned_edits(original, start, original.committed().next_frame):
                number = sum(logged.frame == planned.frame for logged in store.edit_log.list())
                store.edit_log.add(planned.frame, number, {"edit": planned.edit.to_json()})
            store.object_copies.take(original.object_copies)
            if start:
                # A snapshot counts only if the frames before it are committed.
                store.commit(0, start - 1, TRACKS_SCHEMA.empty_table(), EVENTS_SCHEMA.empty_table())
            blob = None if snapshot is None else replace(snapshot, run=new.digest()).to_bytes()
            self._stream = StreamTracker(source, store, segmenter, chosen, old.prompts, snapshot=blob)
        except BaseException:
            source.close()
            self._folder.cleanup()
            raise

    @property
    def position(self) -> int:
        """The frame that is tracked next."""
        return self._stream.next_frame

    def to(self, frame: int) -> StepInput:
        """Go on to a frame, at `position` or later: the step that is made on it, not made yet.

        Raises:
            UsageError: the frame is over, or the video ends before it. SourceError: it cannot be read.
        """
        if frame < self.position:
            raise UsageError(f"frame {frame} is over: the replay is at frame {self.position}")
        for step in self._steps():
            if self.position == frame:
                return step
            self._stream.accept(self._segmenter.step(step.state, step.image, step.prompt))
        raise UsageError(f"the video has no frame {frame}: it ends at frame {self.position - 1}")

    def after(self, frame: int) -> TrackerState:
        """The state after a frame, at `position` - 1 or later: not changed by the prompts of the next one.

        It is the replay's own: copy it to change it. Raises as `to`.
        """
        if frame < self.position - 1:
            raise UsageError(f"frame {frame} is over: the replay is at frame {self.position}")
        if frame >= self.position:
            step = self.to(frame)
            self._stream.accept(self._segmenter.step(step.state, step.image, step.prompt))
        return self._stream.state

    def _steps(self) -> Iterator[StepInput]:
        while (step := self._stream.next_input()) is not None:
            yield step

    def close(self) -> None:
        """Stop; nothing of it stays."""
        try:
            self._stream.close()
        finally:
            self._folder.cleanup()


def _snapshot(files: Files, stream_id: str, frame: int, runs: frozenset[str]) -> Snapshot | None:
    """The newest usable snapshot not after a frame."""
    for start in reversed([f for f in list_snapshots(files, stream_id) if f <= frame]):
        with suppress(FileNotFoundError):  # a run at work has just removed it
            try:
                snapshot = Snapshot.from_bytes(files.read(snapshot_name(stream_id, start)))
            except ValueError as error:
                logger.warning("stream %s: snapshot of frame %d is not usable: %s", stream_id, start, error)
                continue
            if snapshot.run in runs:
                return snapshot
    return None


def check_model(stream_id: str, fingerprint: str, settings: TrackSettings) -> None:
    """Raise StoreError if a stream was tracked with another model than the one that was opened."""
    if settings.model_fingerprint and settings.model_fingerprint != fingerprint:
        raise StoreError(
            f"stream {stream_id!r} was tracked with another version of {settings.model.name}: its memory can "
            "be read with that one only"
        )
