"""Opening and resuming a stream: its record, committed rows and newest usable snapshot."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any

from pipeline.base.errors import PromptError, SettingsConflictError
from pipeline.detect.lifecycle.object_finder import ObjectFinder
from pipeline.detect.loading import load_detector
from pipeline.detect.protocol import Detector
from pipeline.detect.settings import FinderSettings
from pipeline.prompts.box_segmenters import BoxSegmenter
from pipeline.prompts.resolving import PromptSet
from pipeline.tracking.frame_prompts import FramePrompts
from pipeline.tracking.settings import TrackSettings
from pipeline.tracking.snapshots.object_states import read_object
from pipeline.tracking.snapshots.stream import Snapshot
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
    """A file's stream whose stored record matches this run.

    Args:
        committed: number of committed frames.
        prompts: the prompts, as given or from the record.
        identity: source, settings and prompts, which determine the rows.
        runs: digests that valid snapshots of it may carry.
        record: the stream record of this run.
        outdated: whether the stored record must be replaced when this run resumes.
        detector: the detector, loaded early to check that it can be; None without one.
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
    """The state that a stream resumes from; without a snapshot, a new state without objects.

    Args:
        finder: None without a detector.
        next_frame, previous_pts_seconds, previous_size, categories, rows, losses: as in `Snapshot`.
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
    """Open a file's stream in its output folder, which may already hold rows of it.

    Args:
        given: prompts; None: the prompts of the record.
        frame_prompts: filled with the resolved prompts of the record.
        summary: filled with the stream's progress; its state is "finished" if nothing is left to do.
        extra: user data for the record; None: the data of the record.
        restart: first remove everything the folder holds of the stream.

    Raises:
        SettingsConflictError: the folder holds it with other settings, prompts or another video.
        PromptError: there is nothing to track. UsageError: there is no such detector.
        StoreError: the folder cannot be read or written, or holds a damaged record.
    """
    chosen = settings.detector
    detector = None
    if chosen.name is not None:
        detector = load_detector(chosen.name, device=settings.model.device, classes=chosen.finder.classes)
    prompts = given
    if restart:
        # Errors in the first frame's prompts, and in states, must be found before anything is removed.
        prompts = _something(prompts, settings)
        frame_prompts.try_first(source, prompts)
        for _, entry in prompts.states:
            if entry.state is not None:
                read_object(entry.state, store, settings.model_fingerprint)
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
        settings = settings.as_begun(stored["settings"])
        frame_prompts.name = settings.commit.box_segmenter
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
    """Whether all requested frames are committed; if so, sets their number in the summary.

    Args:
        record: the stream record.
        limit: `max_frames` of this run.
    """
    committed, before = summary.frames, record["settings"].get("max_frames")
    # The rows are authoritative: a record that claims more frames than they hold is ignored.
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
    """Restore the snapshot that was handed over, else the newest usable one, else start from frame 0.

    Args:
        boxes: returns the box segmenter for a detector's boxes; called only with a detector.
        handed_over: result of `StreamTracker.export`; ignored if it belongs to another stream, or lies
            beyond the committed frames.

    Raises:
        StoreError: the folder cannot be read.
    """
    loaded = [opened.detector] if opened.detector is not None else []

    def finder() -> ObjectFinder | None:
        ids = opened.prompts.object_ids
        chosen = settings.detector
        return new_finder(
            chosen.name,
            chosen.finder,
            boxes,
            ids,
            device=settings.model.device,
            detector=loaded.pop() if loaded else None,
            aside=segmenter.aside,
        )

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
    *,
    device: str = "cpu",
    detector: Detector | None = None,
    aside: Executor | None = None,
) -> ObjectFinder | None:
    """A finder in its initial state, with its own detector; None without a detector.

    Args:
        name: name of the detector; see `load_detector`.
        boxes: returns the box segmenter for the detector's boxes.
        used_ids: object ids that prompts use, now or later.
        device: device of detectors with a network.
        detector: an unused detector of that name, if one is loaded already.
        aside: a thread that may search a part of what `people` looks at, see `VideoSegmenter.aside`.
    """
    if name is None:
        return None
    detector = detector or load_detector(name, device=device, classes=settings.classes)
    if name == "people":
        from pipeline.detect.people import PeopleDetector

        if isinstance(detector, PeopleDetector):
            detector.aside = aside
    return ObjectFinder(detector, settings, boxes(), used_ids)


def restored_state(
    snapshot: Snapshot, segmenter: VideoSegmenter, finder: ObjectFinder | None
) -> TrackerState:
    """Restore the tracker's state, and the finder's if the snapshot has one.

    Raises:
        ValueError: the snapshot is damaged or of another format.
    """
    if finder is not None and snapshot.finder is not None:
        finder.from_bytes(snapshot.finder)
    return TrackerState.from_bytes(snapshot.tracker, device=segmenter.device)


def _something(prompts: PromptSet | None, settings: TrackSettings) -> PromptSet:
    """The prompts, empty with a detector alone; PromptError if there is nothing to track."""
    if settings.detector.name is not None:
        return prompts or PromptSet()
    if prompts is None or prompts.is_empty():
        raise PromptError("nothing to track: give masks, boxes, a prompts file or a detector")
    return prompts
