"""What a live stream is asked to be: its camera, what to track on it, and the settings it may choose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from pipeline.errors import PromptError, UsageError
from pipeline.live_options import Transport
from pipeline.live_queue import QueuePolicy
from pipeline.prompts import PromptSet
from pipeline.redact import redacted
from pipeline.settings import MIN_SIZE
from pipeline.stream_ids import validate_stream_id

_MOST = {
    "fps": 1000,
    "max_lag_seconds": 3600,
    "queue_frames": 1000,
    "rotate_seconds": 3600,
    "rotate_rows": 1_000_000,
    "snapshot_seconds": 86400,
    "max_objects": 64,
    "detect_every": 100_000,
    "detect_confirmations": 1000,
    "out_of_sight_frames": 10_000_000,
    "expected_height": 8192,
    "expected_width": 8192,
}
_NUMBERS = {"fps", "max_lag_seconds", "rotate_seconds", "snapshot_seconds"}
_TEXTS = {"policy": ("latest", "every"), "transport": ("tcp", "udp", "auto")}


@dataclass(frozen=True, slots=True)
class LiveSettings:
    """Settings of one live stream; UsageError for values that make no sense.

    Args:
        size: shorter side that the network sees, pixels; None: the hub's.
        fps: frames per second that are promised: the stream is admitted only if there is room for them, comes
            before streams without a promise, and no more are tracked. On average: frames that were missed
            while others were tracked are caught up with, up to two seconds of them. None: every frame that
            there is time for after those that are promised; streams of that kind take turns.
        policy: of frames that come faster than they are tracked, see `LiveOptions`.
        transport: of RTSP's media, see `LiveOptions`.
        max_lag_seconds: with "latest", frames that would be older once they are tracked are dropped.
        queue_frames: decoded frames that may wait.
        rotate_seconds, rotate_rows: rows are committed as a file after so long, or so many.
        snapshot_seconds: from one snapshot of the state to the next; sooner where objects come or go.
        max_objects: at the same time, those of prompts and detector together.
        detect_every, detect_confirmations, out_of_sight_frames: see `TrackSettings`; in frames received.
        box_segmenter: who turns boxes into masks.
        expected_height, expected_width: of the camera's frames, for admission before the first one is here.
    """

    size: int | None = None
    fps: float | None = None
    policy: QueuePolicy = "latest"
    transport: Transport = "auto"
    max_lag_seconds: float = 1.0
    queue_frames: int = 4
    rotate_seconds: float = 5.0
    rotate_rows: int = 20_000
    snapshot_seconds: float = 30.0
    max_objects: int = 8
    detect_every: int = 5
    detect_confirmations: int = 3
    out_of_sight_frames: int = 250
    box_segmenter: str = "grabcut"
    expected_height: int = 720
    expected_width: int = 1280

    def __post_init__(self) -> None:
        for name, most in _MOST.items():
            value = getattr(self, name)
            if value is None and name == "fps":
                continue
            kind = int | float if name in _NUMBERS else int
            if isinstance(value, bool) or not isinstance(value, kind) or not 0 < value <= most:
                whole = "" if name in _NUMBERS else "whole "
                raise UsageError(f"{name}={value!r} is not allowed: a {whole}number above 0, up to {most}")
        for name, allowed in _TEXTS.items():
            if getattr(self, name) not in allowed:
                raise UsageError(f"{name}={getattr(self, name)!r} is not allowed: {' or '.join(allowed)}")
        if self.size is not None and (
            isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < MIN_SIZE
        ):
            raise UsageError(f"size={self.size!r} is not allowed: a whole number from {MIN_SIZE} pixels on")

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict that `from_dict` takes back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LiveSettings:
        """From JSON; UsageError for what is unknown or not allowed."""
        known = [f.name for f in fields(cls)]
        unknown = sorted(set(map(str, values)) - set(known))
        if unknown:
            raise UsageError(f"unknown setting {unknown[0]!r}; there are {', '.join(known)}")
        return cls(**values)


@dataclass(frozen=True)
class LiveSpec:
    """One live stream. With neither prompts nor a detector it is followed until somebody gives prompts.

    Args:
        stream_id: as `validate_stream_id` allows.
        url: of the camera; may hold credentials, so it is in no repr.
        prompts: the content of a prompts file, all of frame 0: applied to the first frame there is.
        detector: who finds objects, see `pipeline.detectors`.

    Raises:
        UsageError: something about it is wrong.
    """

    stream_id: str
    url: str = field(repr=False)
    prompts: Mapping[str, Any] | None = field(default=None, repr=False)
    detector: str | None = None
    settings: LiveSettings = field(default_factory=LiveSettings)

    def __post_init__(self) -> None:
        validate_stream_id(self.stream_id)
        if not isinstance(self.url, str) or "://" not in self.url or "\0" in self.url:
            raise UsageError(f"{self.url!r} is no live stream: give a URL such as rtsp://camera/stream")
        if self.prompts is not None:
            checked_prompts(self.prompts)

    def with_camera(self, change: Mapping[str, Any]) -> LiveSpec:
        """This stream from another URL, over another transport, or both.

        Args:
            change: {"url": ..., "transport": ...} or one of them. A URL replaces the whole old one, with its
                user and password.

        Raises:
            UsageError: it is something else, or a value is not allowed.
        """
        unknown = sorted(set(map(str, change)) - {"url", "transport"}) if isinstance(change, Mapping) else []
        if not isinstance(change, Mapping) or unknown or not change:
            raise UsageError('a change of the camera is {"url": ..., "transport": ...}, or one of them')
        settings = self.settings
        if "transport" in change:
            settings = replace(settings, transport=change["transport"])
        return replace(self, url=change.get("url", self.url), settings=settings)

    @property
    def shown_url(self) -> str:
        """The URL without credentials."""
        return redacted(self.url)


def checked_prompts(content: Mapping[str, Any]) -> PromptSet:
    """The objects of a prompts file's content, for the next frame of a live stream.

    Raises:
        PromptError: it is wrong; names frames other than 0, or removals, which are requests of their own; or
            there is nothing in it.
    """
    if not isinstance(content, Mapping):
        raise PromptError(f"prompts are a {type(content).__name__}: give the content of a prompts file")
    prompts = PromptSet.from_record({"version": 1, **content})
    if any(frame != 0 for frame in prompts.frames):
        raise PromptError(
            f"prompts name frame {max(prompts.frames)}: a live stream's prompts are for its next frame, "
            "leave the frame out"
        )
    if prompts.removals:
        raise PromptError('prompts hold removals: on a live stream ask for them as {"remove": [ids]}')
    if prompts.is_empty():
        raise PromptError("prompts without objects: give at least one")
    return prompts
