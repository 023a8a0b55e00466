"""The stream record, and the checks whether a run may resume a stream."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.base.errors import AnotherWriterError, PromptError, SettingsConflictError, StoreError
from pipeline.base.redaction import redacted
from pipeline.prompts.resolving import PromptSet, ResolvedPrompt
from pipeline.storage.failures import Failure
from pipeline.tracking.settings import TrackSettings
from pipeline.tracks.store import RESTARTING, StreamStore
from pipeline.video.sources import VideoSource

logger = logging.getLogger(__name__)

FINISHED = "finished"
RUNNING = "running"
FAILED = "failed"


# Errors that say that the stream belongs to another run or other settings: they do not mark it as failed.
_NOT_ITS_OWN = (AnotherWriterError.__name__, SettingsConflictError.__name__)


@dataclass
class StreamSummary:
    """Progress of a stream.

    Args:
        stream_id, state: state is "running" or "finished".
        frames, rows: committed so far, over all runs.
        tracked: frames tracked by this run, repeated ones included.
        resumed_at: first frame this run commits, None for a fresh start.
        objects: per object id, [first frame, last visible frame, visible frames] as seen by this run.
        losses: frames or packets that the source lost, over all runs.
        warnings: in the order in which they came.
    """

    stream_id: str
    state: str = RUNNING
    frames: int = 0
    rows: int = 0
    tracked: int = 0
    resumed_at: int | None = None
    objects: dict[int, list[int]] = field(default_factory=dict)
    losses: int = 0
    warnings: list[str] = field(default_factory=list)

    def warn(self, message: str) -> None:
        """Log a warning, and keep it."""
        logger.warning("stream %s: %s", self.stream_id, message)
        self.warnings.append(message)


@dataclass(frozen=True)
class StreamIdentity:
    """The inputs that determine a stream's rows. Runs with the same identity write the same files.

    Args:
        source: the video's URI, without credentials.
        fingerprint: fingerprint of the video's content.
        settings, prompts: tracking settings and prompts.
    """

    source: str
    fingerprint: str
    settings: TrackSettings
    prompts: PromptSet

    @classmethod
    def of(cls, source: VideoSource, settings: TrackSettings, prompts: PromptSet) -> StreamIdentity:
        """The identity of a run on an opened video."""
        return cls(redacted(source.uri), source.fingerprint, settings, prompts)

    def digest(self) -> str:
        """32 hex digits; the same for the same rows. A copy of a video is the same video."""
        return self._digest(None)

    def digests(self, record: Mapping[str, Any] | None) -> frozenset[str]:
        """The digests that a snapshot of this stream may carry. Earlier versions included `max_frames`, with
        the value of this run or, from the record, that of the run before.
        """
        limits = {None, self.settings.commit.max_frames}
        if record is not None:
            limits.add(record["settings"].get("max_frames"))
        return frozenset(self._digest(limit) for limit in limits)

    def _digest(self, max_frames: int | None) -> str:
        decisive = {**self.settings.decisive(), "max_frames": max_frames}
        facts = [self.fingerprint, decisive, self.prompts.to_record()]
        text = json.dumps(facts, sort_keys=True)
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()

    def differences(self, record: Mapping[str, Any]) -> list[str]:
        """How a record's identity differs from this one, one short phrase each."""
        differing = self.settings.differences(record["settings"])
        if record.get("source_fingerprint") != self.fingerprint:
            if record.get("source") != self.source:
                differing.append(f"source was {record.get('source')!r}, now {self.source!r}")
            else:
                differing.append(f"the content of {self.source} has changed")
        if record["prompts"] != self.prompts.to_record():
            differing.append("prompts are others")
        return differing

    def to_record(self, source: VideoSource) -> dict[str, Any]:
        """The fields of the stream record that hold it."""
        return {
            "source": self.source,
            "source_fingerprint": self.fingerprint,
            "width": source.width,
            "height": source.height,
            "rate": source.rate,
            "codec": source.codec,
            "container": source.container,
            "model": self.settings.model.name,
            "settings": self.settings.to_dict(),
            "prompts": self.prompts.to_record(),
        }


def checked(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The record, if it has the fields that `StreamIdentity` needs; StoreError otherwise."""
    for name in ("settings", "prompts"):
        if not isinstance(record.get(name), dict):
            raise StoreError(
                f"the stream record in {where} has no {name}: restore it from a copy, or start this stream "
                "over with --restart"
            )
    return dict(record)


def prompts_of(record: Mapping[str, Any], where: str) -> PromptSet:
    """The prompts that a record holds."""
    try:
        return PromptSet.from_record(record["prompts"])
    except PromptError as error:
        raise StoreError(
            f"the stream record in {where} is damaged ({error}): restore it from a copy, or start this "
            "stream over with --restart"
        ) from error


class ResolvedPrompts:
    """Masks that were made from boxes, by frame. Stored as run lengths, since raw masks may take megabytes.

    Only frames with boxes are stored; masks and polygons resolve to the same pixels every time.
    """

    def __init__(self) -> None:
        self._frames: dict[str, Any] = {}

    def load(self, stored: Any) -> None:
        """Restore from the output of `to_record`."""
        self._frames = dict(stored) if isinstance(stored, dict) else {}

    def get(self, frame_index: int) -> ResolvedPrompt | None:
        """The masks of a frame, None if they have not been made yet."""
        stored = self._frames.get(str(frame_index))
        if stored is None:
            return None
        try:
            return ResolvedPrompt.from_record(stored)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise StoreError(
                f"the stream record's masks of frame {frame_index} are damaged ({error}): restore the record "
                "from a copy, or start this stream over with --restart"
            ) from error

    def has(self, frame_index: int) -> bool:
        """Whether a frame's masks are kept."""
        return str(frame_index) in self._frames

    def put(self, frame_index: int, resolved: ResolvedPrompt) -> None:
        """Keep the masks of a frame."""
        self._frames[str(frame_index)] = resolved.to_record()

    @property
    def ellipses(self) -> int:
        """Number of boxes that were replaced by an ellipse."""
        return sum(
            len(frame.get("ellipses", ())) for frame in self._frames.values() if isinstance(frame, dict)
        )

    def to_record(self) -> dict[str, Any]:
        """JSON-ready content; `load` restores it."""
        return dict(sorted(self._frames.items(), key=lambda item: int(item[0])))


def mark_failed(store: StreamStore, failure: Failure) -> bool:
    """Mark a stream as failed in its record, with the cause, so that it no longer counts as running.

    A later run may still resume it. Only the record of an unfinished stream is changed. Nothing is raised,
    so that the original failure gets reported.

    Returns:
        whether the record now says that the stream failed.
    """
    if failure.kind in _NOT_ITS_OWN:
        return False
    try:
        record = store.read_record()
        if record is None or record.get("state") not in (RUNNING, FAILED):
            return False
        cause = {"kind": failure.kind, "message": redacted(failure.message)}
        store.write_record({**record, "state": FAILED, "cause": cause})
        return True
    except StoreError as error:
        logger.warning("stream %s: its record does not say that it failed: %s", store.stream_id, error)
        return False


class StreamRecord:
    """Writes a run's stream record, and detects when another run has replaced it."""

    def __init__(
        self,
        store: StreamStore,
        source: VideoSource,
        identity: StreamIdentity,
        resolved: ResolvedPrompts,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        self._store = store
        self._source = source
        self._identity = identity
        self._resolved = resolved
        self._extra = extra

    def begin(self, summary: StreamSummary) -> None:
        """Write it for the first time, replacing the record of a stream without rows."""
        self._store.write_record(self._content(RUNNING, summary))

    def update(self, state: str, summary: StreamSummary) -> None:
        """Replace it. Raises AnotherWriterError as `check_ours` does."""
        self.check_ours()
        self._store.write_record(self._content(state, summary))

    def check_ours(self) -> None:
        """Raises AnotherWriterError if the stored record no longer has this run's identity."""
        where = f"stream {self._store.stream_id} in {self._store.root}"
        record = self._store.read_record()
        if record is None or record.get("state") == RESTARTING:
            raise AnotherWriterError(f"{where} is being started over by another run; this one stops")
        differing = self._identity.differences(checked(record, self._store.root))
        if differing:
            raise AnotherWriterError(
                f"another run has begun {where} with other settings: {'; '.join(differing)}; this one stops "
                "(give it another --stream-id or --out)"
            )

    def _content(self, state: str, summary: StreamSummary) -> dict[str, Any]:
        return {
            "state": state,
            **self._identity.to_record(self._source),
            "resolved_prompts": self._resolved.to_record(),
            "frames": summary.frames,
            "rows": summary.rows,
            "losses": summary.losses,
            **({"extra": dict(self._extra)} if self._extra else {}),
        }
