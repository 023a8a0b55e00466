"""Opening and resuming a stream: its record, committed rows and newest usable snapshot."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.base.errors import PromptError, SettingsConflictError
from pipeline.detect.lifecycle import ObjectFinder
from pipeline.detect.loading import load_detector
from pipeline.detect.protocol import Detector
from pipeline.detect.settings import FinderSettings
from pipeline.prompts.box_segmenters import BoxSegmenter
from pipeline.prompts.resolving import PromptSet
from pipeline.tracking.frame_prompts import FramePrompts
from pipeline.tracking.settings import TrackSettings
from pipeline.tracking.snapshot import Snapshot
from pipeline.tracking.stream_record import (
    FINISHED,
    RUNNING,
    StreamIdentity,
    StreamRecord,
    StreamSummary,
    checked,
    prompts_of,
)
from pipeline.tracks.store import CommittedRange, StreamStore
from pipeline.video.sources import VideoSource
from xmem_core import TrackerState, VideoSegmenter

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OpenedStream:
    """A file's stream whose record fits.

    Args:
        committed: frames below this have rows.
        prompts: what is tracked, as given or as the record says.
        identity: what decides its rows.
        runs: digests that its snapshots may carry.
        record: of this run.
        outdated: whether the stored record says what is no longer so, once this run goes on.
        detector: that was loaded to see whether it can be; None without one.
    """

    committed: int
    prompts: PromptSet
    identity: StreamIdentity
    runs: frozenset[str]
    record: StreamRecord
    outdated: bool
    detector: Detector | None


@dataclass(frozen=True)
class Resumed:
    """What a stream goes on from; without a snapshot a new state, and no objects.

    Args:
        finder: None without a detector.
        next_frame, previous_pts_seconds, previous_size, categories, rows, losses: a `Snapshot`'s.
    """

    state: TrackerState
    finder: ObjectFinder | None
    next_frame: int = 0
    previous_pts_seconds: float | None = None
    previous_size: tuple[int, int] | None = None
    categories: Mapping[int, str | None] = field(default_factory=dict)
    rows: int = 0
    losses: int = 0


def open_stream(
    source: VideoSource,
    store: StreamStore,
    settings: TrackSettings,
    given: PromptSet | None,
    frame_prompts: FramePrompts,
    summary: StreamSummary,
    *,
    extra: Mapping[str, Any] | None = None,
    restart: bool = False,
) -> OpenedStream:
    """Open a file's stream in its output folder, where there may be rows of it.

    Args:
        given: prompts; None: those of the record.
        frame_prompts: gets what the record holds of them.
        summary: gets how the stream stands; its state is "finished" if nothing is left to do.
        extra: for the record; None: what the record says.
        restart: remove first what the folder holds of the stream.

    Raises:
        SettingsConflictError: the folder holds it with other settings, prompts or another video.
        PromptError: there is nothing to track. UsageError: there is no such detector.
        StoreError: the folder cannot be read or written, or holds a damaged record.
    """
    detector = None if settings.detector.name is None else load_detector(settings.detector.name)
    prompts = given
    if restart:
        # Whatever is wrong with the first frame's prompts is found before anything is removed.
        frame_prompts.try_first(source, _something(prompts, settings))
        store.restart()
        # Not listed again: a writer that is being stopped may be about to take back its last chunk.
        committed = CommittedRange(0, 0)
    else:
        store.prepare()
        committed = store.committed()
    stored = store.read_record()
    if stored is not None:
        stored = checked(stored, store.root)
        prompts = prompts_of(stored, store.root) if prompts is None else prompts
    elif committed.files:
        raise SettingsConflictError(
            f"{store.root} holds rows of stream {store.stream_id} but no record of its "
            "settings: restart it (--restart), or give another --stream-id or --out"
        )
    prompts = _something(prompts, settings)
    identity = StreamIdentity.of(source, settings, prompts)
    recorded = (stored or {}).get("extra")
    extra = recorded if extra is None else extra
    record = StreamRecord(store, source, identity, frame_prompts.resolved, extra)
    differing = [] if stored is None else identity.differences(stored)
    if differing and committed.files:
        raise SettingsConflictError(
            f"stream {store.stream_id} in {store.root} was tracked with other settings: "
            f"{'; '.join(differing)}; use the same, "
            "another --stream-id or --out, or start over (--restart)"
        )
    summary.frames = committed.next_frame
    outdated, limit = False, settings.commit.max_frames
    if stored is None or differing:
        record.begin(summary)
    else:
        frame_prompts.resolved.load(stored.get("resolved_prompts"))
        outdated = stored.get("state") != RUNNING or stored["settings"].get("max_frames") != limit
        if _has_all(store, stored, limit, summary):
            summary.state = FINISHED
            if extra != recorded:
                record.update(FINISHED, summary)
    return OpenedStream(
        committed.next_frame, prompts, identity, identity.digests(stored), record, outdated, detector
    )


def _has_all(
    store: StreamStore, record: Mapping[str, Any], limit: int | None, summary: StreamSummary
) -> bool:
    """Whether all frames that are asked for have rows; then the summary says how many.

    Args:
        record: of the stream.
        limit: `max_frames` of this run.
    """
    committed, before = summary.frames, record["settings"].get("max_frames")
    # The rows are the truth: a record that claims more than they hold is not believed.
    if record.get("state") == FINISHED and record.get("frames") == committed:
        at_its_end = before is None or committed < before
        if not at_its_end and (limit is None or limit > committed):
            return False
        summary.rows = int(record.get("rows", 0))
        summary.losses = int(record.get("losses", 0))
        return True
    if limit is None or limit >= committed:
        return False
    summary.rows = sum(footer.rows for footer in store.footers(0))
    summary.warn(f"{committed} frames have rows, more than max_frames={limit}: nothing to do")
    return True


def resume(
    opened: OpenedStream,
    store: StreamStore,
    settings: TrackSettings,
    segmenter: VideoSegmenter,
    boxes: Callable[[], BoxSegmenter],
    handed_over: bytes | None,
) -> Resumed:
    """Take the snapshot that was handed over, else the newest usable one, or start from the first frame.

    Args:
        boxes: gives what makes masks of a detector's boxes; called where there is a detector.
        handed_over: `StreamTracker.export`'s; passed over if it is not of this stream, or of frames that have
            no rows.

    Raises:
        StoreError: the folder cannot be read.
    """
    loaded = [opened.detector] if opened.detector is not None else []

    def finder() -> ObjectFinder | None:
        ids = opened.prompts.object_ids
        chosen = settings.detector
        return new_finder(chosen.name, chosen.finder, boxes, ids, loaded.pop() if loaded else None)

    def validated(blob: bytes) -> Resumed:
        snapshot = Snapshot.from_bytes(blob)
        if snapshot.run not in opened.runs:
            raise ValueError("it was taken with other settings, prompts or another video")
        if snapshot.next_frame > opened.committed:
            raise ValueError(
                f"it is of frame {snapshot.next_frame}, and frames up to {opened.committed - 1} have rows"
            )
        found = finder()
        if found is not None and snapshot.finder is None:
            raise ValueError("it holds no detector's memory")
        return Resumed(
            restored_state(snapshot, segmenter, found),
            found,
            snapshot.next_frame,
            snapshot.previous_pts_seconds,
            snapshot.previous_size,
            dict(snapshot.categories),
            snapshot.rows,
            snapshot.losses,
        )

    if handed_over is not None:
        try:
            return validated(handed_over)
        except ValueError as error:
            logger.warning(
                "stream %s: the state that was handed over is not usable, rebuilding it: %s",
                store.stream_id,
                error,
            )
    stored = store.load_snapshot(opened.committed, validated)
    return Resumed(segmenter.new_state(), finder()) if stored is None else stored[1]


def new_finder(
    name: str | None,
    settings: FinderSettings,
    boxes: Callable[[], BoxSegmenter],
    used_ids: Iterable[int] = (),
    detector: Detector | None = None,
) -> ObjectFinder | None:
    """A finder that remembers nothing, with a detector of its own; None without a detector.

    Args:
        name: of the detector; see `load_detector`.
        boxes: gives what makes masks of its boxes.
        used_ids: that prompts use, now or later.
        detector: a new one of that name, if there is one already.
    """
    if name is None:
        return None
    return ObjectFinder(detector or load_detector(name), settings, boxes(), used_ids)


def restored_state(
    snapshot: Snapshot, segmenter: VideoSegmenter, finder: ObjectFinder | None
) -> TrackerState:
    """The tracker's state in a snapshot. The finder goes on as it was there, if it was.

    Raises:
        ValueError: either is damaged or foreign.
    """
    if finder is not None and snapshot.finder is not None:
        finder.from_bytes(snapshot.finder)
    return TrackerState.from_bytes(snapshot.tracker, device=segmenter.device)


def _something(prompts: PromptSet | None, settings: TrackSettings) -> PromptSet:
    """The prompts, if there is anything to track."""
    if settings.detector.name is not None:
        return prompts or PromptSet()
    if prompts is None or prompts.is_empty():
        raise PromptError("nothing to track: give masks, boxes, a prompts file or a detector")
    return prompts
