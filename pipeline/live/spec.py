"""LiveSpec: a user's description of a live stream: camera, prompts, settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, get_args

from pipeline.base.errors import PromptError, UsageError
from pipeline.base.redaction import redacted
from pipeline.base.setting_fields import MAX_SIZE, MIN_SIZE, check, from_flat, options_of, recorded, setting
from pipeline.base.stream_ids import validate_stream_id
from pipeline.detect.settings import FinderSettings
from pipeline.live.camera.options import Transport
from pipeline.live.camera.queue import QueuePolicy
from pipeline.prompts.resolving import PromptObject, PromptSet
from pipeline.zones.config import ZoneSet, parse_zones

JPEG_SIDES = (16, 8192)
"""Limits of the longer side of a stream's JPEG pictures, in pixels; pictures are never enlarged."""
JPEG_QUALITIES = (1, 100)


@dataclass(frozen=True, slots=True)
class LiveSettings:
    """Settings of one live stream. Raises UsageError for invalid values.

    Args:
        size: shorter side of the network's input, in pixels. Default: the service's.
        fps: guaranteed frames per second. The stream is admitted only if there is capacity for this rate with
            `max_objects` objects, takes precedence over streams without a rate, and is not tracked faster.
            The rate is an average: up to two seconds of frames that were missed while other streams were
            tracked are made up for. Default: as many frames as the guaranteed rates leave time for; such
            streams take turns.
        policy: what to do with frames that arrive faster than they are tracked: "latest" drops the oldest,
            "every" makes the camera wait, as far as it does.
        transport: transport of RTSP media; "auto": TCP first, UDP if TCP gives no picture, then whichever
            worked last.
        max_lag_seconds: with "latest", frames that would be older than this once tracked are dropped.
        queue_frames: maximum number of decoded frames that wait.
        rotate_seconds, rotate_rows: rows are committed as a file after this time, or this number of rows.
        snapshot_seconds: time between snapshots of the state. One follows a request after about a second,
            and what the detector started or corrected after 10 seconds.
        finder: when detected objects are started and given up, in received frames. Its `max_objects` includes
            objects from prompts.
        box_segmenter: box segmenter that turns boxes into masks.
        expected_height, expected_width: size of the camera's frames, for admission before the first frame
            arrives.
    """

    size: int | None = setting(None, least=MIN_SIZE, most=MAX_SIZE)
    fps: float | None = setting(None, above=0, most=1000)
    policy: QueuePolicy = setting("latest", choices=get_args(QueuePolicy))
    transport: Transport = setting("auto", choices=get_args(Transport))
    max_lag_seconds: float = setting(1.0, above=0, most=3600)
    queue_frames: int = setting(4, least=1, most=1000)
    rotate_seconds: float = setting(5.0, above=0, most=3600)
    rotate_rows: int = setting(20_000, least=1, most=1_000_000)
    snapshot_seconds: float = setting(30.0, above=0, most=86400)
    finder: FinderSettings = field(default_factory=FinderSettings)
    box_segmenter: str = setting("xmem-click")
    expected_height: int = setting(720, least=1, most=8192)
    expected_width: int = setting(1280, least=1, most=8192)

    def __post_init__(self) -> None:
        check(self)

    def to_dict(self) -> dict[str, Any]:
        """Return a flat, JSON-ready dict that `from_dict` accepts."""
        return recorded(self, options_of(LiveSettings))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LiveSettings:
        """Make settings from JSON; UsageError for unknown names and values that are not allowed."""
        return cls().with_options(values)

    def with_options(self, values: Mapping[str, Any]) -> LiveSettings:
        """Return these settings with some replaced by their flat names, as in `to_dict`.

        Raises:
            UsageError: a name is unknown, or a value not allowed.
        """
        return from_flat(self, values)


@dataclass(frozen=True)
class LivePrompts:
    """Prompts for the next frame of a live stream, parsed and checked. Build it with `LivePrompts.of`.

    Args:
        content: the given content of a prompts file; JSON-ready.
        objects: the objects in it, in the same order.
        unnamed: positions in `objects` of those given without an id. Their ids here are placeholders; the
            request assigns free ones.
    """

    content: Mapping[str, Any] = field(repr=False)
    objects: tuple[PromptObject, ...]
    unnamed: tuple[int, ...] = ()

    @classmethod
    def of(cls, given: LivePrompts | Mapping[str, Any]) -> LivePrompts:
        """Parse the content of a prompts file; already parsed prompts are returned unchanged.

        Raises:
            PromptError: the prompts are invalid, name frames other than 0, contain removals (a separate
                request), or are empty.
        """
        if isinstance(given, LivePrompts):
            return given
        if not isinstance(given, Mapping):
            raise PromptError(f"prompts are a {type(given).__name__}: give the content of a prompts file")
        prompts = PromptSet.from_record({"version": 1, **given})
        if any(frame != 0 for frame in prompts.frames):
            raise PromptError(
                f"prompts name frame {max(prompts.frames)}: prompts of a live stream are for its next frame, "
                "leave the frame out"
            )
        if prompts.removals:
            raise PromptError('prompts contain removals: on a live stream request them as {"remove": [ids]}')
        if prompts.is_empty():
            raise PromptError("prompts without objects: give at least one")
        if prompts.states:
            raise PromptError(
                "prompts name another stream's state: on a live stream copy an object with a change of the "
                'memory, {"copy": {"object": id, "stream": id}}'
            )
        unnamed = tuple(i for i, entry in enumerate(given["objects"]) if "id" not in entry)
        return cls(given, prompts.at(0), unnamed)


@dataclass(frozen=True)
class LiveSpec:
    """One live stream. Without prompts and detector it runs without objects until prompts are given.

    Args:
        stream_id: an id that `validate_stream_id` accepts.
        url: URL of the camera; hidden in the repr, as it may contain credentials.
        prompts: the content of a prompts file, all of frame 0: applied to the stream's first frame.
        detector: name of a detector, see `pipeline.detect.protocol`.
        zones: the content of a zones file; it must have entries for this stream.

    Attributes:
        zones_here: the entries of `zones` for this stream.
        parsed_prompts: `prompts`, parsed once and kept with the spec.

    Raises:
        UsageError: a value is invalid.
    """

    stream_id: str
    url: str = field(repr=False)
    prompts: Mapping[str, Any] | None = field(default=None, repr=False)
    detector: str | None = None
    settings: LiveSettings = field(default_factory=LiveSettings)
    zones: Mapping[str, Any] | None = field(default=None, repr=False)
    parsed_prompts: LivePrompts | None = field(default=None, init=False, repr=False, compare=False)
    zones_here: ZoneSet = field(default_factory=ZoneSet, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        validate_stream_id(self.stream_id)
        if not isinstance(self.url, str) or "://" not in self.url or "\0" in self.url:
            raise UsageError(f"{self.url!r} is not a live stream: give a URL such as rtsp://camera/stream")
        if self.prompts is not None:
            object.__setattr__(self, "parsed_prompts", LivePrompts.of(self.prompts))
        if self.zones is not None:
            parsed = parse_zones(self.zones)
            parsed.check_streams([self.stream_id])
            object.__setattr__(self, "zones_here", parsed.of_stream(self.stream_id))

    def with_camera(self, change: Mapping[str, Any]) -> LiveSpec:
        """Return this stream with another URL, another transport, or both.

        Args:
            change: {"url": ..., "transport": ...} or one of them. A URL replaces the whole old one, including
                user and password.

        Raises:
            UsageError: the change has another form, or a value is not allowed.
        """
        unknown = sorted(set(map(str, change)) - {"url", "transport"}) if isinstance(change, Mapping) else []
        if not isinstance(change, Mapping) or unknown or not change:
            raise UsageError('a change of the camera is {"url": ..., "transport": ...}, or one of them')
        settings = self.settings
        if "transport" in change:
            settings = replace(settings, transport=change["transport"])
        return replace(self, url=change.get("url", self.url), settings=settings)

    def with_zones(self, zones: Mapping[str, Any]) -> LiveSpec:
        """This stream with other zones; {}: none. UsageError for zones that are wrong."""
        return replace(self, zones=zones or None)

    @property
    def shown_url(self) -> str:
        """The URL without credentials."""
        return redacted(self.url)
