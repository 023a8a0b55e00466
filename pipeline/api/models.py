"""Request and response models of the API (pydantic); the OpenAPI schema is generated from them.

Requests reject unknown fields; responses drop them. Numbers that determine the amount of work (pixels,
objects, lengths) are limited here, before they are used.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, create_model, model_validator

from pipeline.base.redaction import redacted
from pipeline.base.setting_fields import Option, options_of
from pipeline.live.spec import LiveSettings

MAX_MASK_PIXELS = 2**24
MAX_OBJECTS = 32
MAX_POLYGON_NUMBERS = 4096
MAX_OBJECT_ID = 2**31 - 1
MAX_COUNTS = 500_000
_PIXELS = 2.0**15
_COUNTS = re.compile(r"[0-o]*")

StreamId = Annotated[
    str,
    Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$",
        min_length=1,
        max_length=128,
        description="1 to 128 of A-Z a-z 0-9 . _ -, starting with a letter or digit.",
        examples=["gate-3"],
    ),
]
ObjectId = Annotated[int, Field(ge=1, le=MAX_OBJECT_ID)]
Pixel = Annotated[float, Field(ge=-_PIXELS, le=2 * _PIXELS, allow_inf_nan=False)]
CameraUrl = Annotated[
    SecretStr,
    Field(
        min_length=8,
        max_length=2048,
        strict=False,
        description="rtsp:// or rtsps://, with user and password if the camera requires them.",
        examples=["rtsp://10.20.0.31/h264"],
        # Never returned, hence no password format.
        json_schema_extra={"format": "uri", "writeOnly": True},
    ),
]
_TRANSPORT = (
    "Transport of RTSP media. auto (default): TCP first, UDP if TCP gives no picture, then what worked last."
)
_ZONES = "The content of a zones file, see docs/zones.md."
Side = Annotated[float, Field(gt=0, le=2 * _PIXELS, allow_inf_nan=False)]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class RunLengths(_Request):
    """A mask in COCO run-length encoding."""

    size: Annotated[
        list[Annotated[int, Field(ge=1, le=32768)]],
        Field(min_length=2, max_length=2, description="Height, width."),
    ]
    counts: (
        Annotated[str, Field(min_length=1, max_length=MAX_COUNTS, pattern=r"^[0-o]+$")]
        | Annotated[
            list[Annotated[int, Field(ge=0, le=MAX_MASK_PIXELS)]], Field(min_length=1, max_length=MAX_COUNTS)
        ]
    )

    @model_validator(mode="after")
    def _not_too_large(self) -> Self:
        if self.size[0] * self.size[1] > MAX_MASK_PIXELS:
            raise ValueError(
                f"a mask of {self.size[0]} x {self.size[1]}: at most {MAX_MASK_PIXELS} pixels are allowed"
            )
        return self


class PromptedObject(_Request):
    """An object, given by exactly one of box, polygons and rle.

    The id of a tracked object corrects that object.
    """

    id: Annotated[ObjectId | None, Field(description="Default: an id that no object had before.")] = None
    category: Annotated[str | None, Field(min_length=1, max_length=100, examples=["person"])] = None
    box: Annotated[
        tuple[Pixel, Pixel, Side, Side] | None,
        Field(strict=False, description="x, y, width, height in pixels."),
    ] = None
    polygons: Annotated[
        list[Annotated[list[Pixel], Field(min_length=6, max_length=MAX_POLYGON_NUMBERS)]] | None,
        Field(min_length=1, max_length=16, description="Outlines, each x1, y1, x2, y2, ... in pixels."),
    ] = None
    rle: RunLengths | None = None

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if sum(way is not None for way in (self.box, self.polygons, self.rle)) != 1:
            raise ValueError("an object needs exactly one of box, polygons and rle")
        if any(len(outline) % 2 for outline in self.polygons or ()):
            raise ValueError("a polygon needs an even count of numbers: x, y of each point")
        return self


class Prompts(_Request):
    """Objects on the next frame to be tracked."""

    objects: Annotated[list[PromptedObject], Field(min_length=1, max_length=MAX_OBJECTS)]

    @model_validator(mode="after")
    def _each_id_once(self) -> Self:
        ids = [entry.id for entry in self.objects if entry.id is not None]
        if len(ids) != len(set(ids)):
            raise ValueError("an object id is given twice: use each once")
        return self

    def document(self) -> dict[str, Any]:
        """Return the content of a prompts file."""
        return {
            "version": 1,
            "objects": [entry.model_dump(mode="json", exclude_none=True) for entry in self.objects],
        }


OPERATORS_OWN = {
    "rotate_seconds": "determines the number of files in the output folder",
    "rotate_rows": "determines the number of files in the output folder",
    "snapshot_seconds": "determines the size of the output folder",
    "box_segmenter": "names a plugin on the machine; the service's own is used",
}
"""Settings of a live stream that requests cannot choose, and why."""


class _StreamSettings(_Request):
    """How the camera is read and tracked; omitted settings default to the service's."""

    def given(self) -> dict[str, Any]:
        """Return the settings that the request names."""
        return self.model_dump(exclude_none=True)


def _field(option: Option) -> tuple[Any, Any]:
    """A setting as an optional field, with the same limits as everywhere."""
    limits = option.limits
    kind: Any = Literal[limits.choices] if limits.choices else option.kind
    finite: Any = {"allow_inf_nan": False} if option.kind is float else {}
    bounds = Field(ge=limits.least, gt=limits.above, le=limits.most, description=option.help, **finite)
    return Annotated[kind | None, bounds], None


if TYPE_CHECKING:
    StreamSettings = _StreamSettings
else:
    StreamSettings = create_model(
        "StreamSettings",
        __base__=_StreamSettings,
        __doc__=_StreamSettings.__doc__,
        **{o.name: _field(o) for o in options_of(LiveSettings) if o.name not in OPERATORS_OWN},
    )


class NewStream(_Request):
    """A camera to follow, and how to find objects on it: prompts, a detector, or both.

    With `"detector": null` and no prompts the stream runs without objects until prompts are given.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"id": "gate-3", "url": "rtsp://10.20.0.31/h264", "detector": "motion"},
                {
                    "url": "rtsp://10.20.0.31/h264",
                    "prompts": {"objects": [{"category": "car", "box": [120, 80, 200, 140]}]},
                    "settings": {"policy": "latest", "max_lag_seconds": 2.0},
                },
            ]
        }
    )

    url: CameraUrl
    id: Annotated[StreamId | None, Field(description="Default: derived from the URL.")] = None
    prompts: Prompts | None = None
    detector: Annotated[
        str | None,
        # Whether the name is allowed is the service's decision; names of files follow a colon.
        Field(
            pattern=r"^[a-z0-9][a-z0-9_-]{0,63}(:[^\x00-\x1f\x7f]+)?$", max_length=1000, examples=["motion"]
        ),
    ] = None
    settings: StreamSettings = StreamSettings()
    zones: Annotated[dict[str, Any] | None, Field(description=_ZONES)] = None

    @model_validator(mode="after")
    def _something_to_follow(self) -> Self:
        # null is a decision: the objects will be given later.
        if self.prompts is None and "detector" not in self.model_fields_set:
            raise ValueError(
                'nothing to follow: give prompts, a detector ("motion"), or both, or "detector": null if '
                "objects will be given later"
            )
        return self


class Renaming(_Request):
    """A tracked object and its category from the next frame on."""

    id: ObjectId
    category: Annotated[str, Field(min_length=1, max_length=100, examples=["person"])]


class ClickPoint(_Request):
    """A click on a pixel of the newest frame."""

    x: Annotated[int, Field(ge=0, lt=32768)]
    y: Annotated[int, Field(ge=0, lt=32768)]
    positive: Annotated[bool, Field(description="Whether the pixel belongs to the object.")] = True


_Coordinate = Annotated[float, Field(ge=0, lt=32768)]

_Point = Annotated[tuple[_Coordinate, _Coordinate], Field(strict=False)]
"""x and y. Strict tuples would refuse the lists of JSON."""


class Stroke(_Request):
    """A scribble: points of a line drawn on the newest frame."""

    points: Annotated[list[_Point], Field(min_length=1, max_length=2000)]
    positive: Annotated[bool, Field(description="Whether the line lies on the object.")] = True


class Clicks(_Request):
    """Clicks, in their order, and strokes on the newest frame; at least one is positive."""

    clicks: Annotated[list[ClickPoint], Field(max_length=200)] = []
    strokes: Annotated[list[Stroke], Field(max_length=50)] = []

    @model_validator(mode="after")
    def _any(self) -> Self:
        if not self.clicks and not self.strokes:
            raise ValueError("give clicks or strokes")
        return self


_Time = Annotated[int, Field(ge=0, lt=2**53)]


class CopiedObject(_Request):
    """An object that another stream of the service's output folder remembers in its newest snapshot."""

    object: Annotated[ObjectId, Field(description="Its id there.")]
    stream: Annotated[str, Field(max_length=128, description="The other stream.")]


class MemoryChange(_Request):
    """An edit of what the stream remembers; times are those of `GET .../memory`."""

    forget: Annotated[
        list[_Time] | None, Field(min_length=2, max_length=2, description="First and last time, inclusive.")
    ] = None
    object: Annotated[
        ObjectId | None,
        Field(
            description="With forget: only this object forgets, the others go on reading. With copy: id of "
            "the new object; left out: one that was never used."
        ),
    ] = None
    pin: Annotated[_Time | None, Field(description="Time of a frame that is to stay whole.")] = None
    unpin: _Time | None = None
    copy_: Annotated[
        CopiedObject | None,
        Field(alias="copy", description="An object to start, out of sight; it is sought from then on."),
    ] = None
    category: Annotated[
        str | None,
        Field(min_length=1, max_length=100, description="With copy. Default: the category it has there."),
    ] = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if sum(edit is not None for edit in (self.forget, self.pin, self.unpin, self.copy_)) != 1:
            raise ValueError("give exactly one of forget, pin, unpin and copy")
        if self.object is not None and self.forget is None and self.copy_ is None:
            raise ValueError("object goes with forget and copy")
        if self.category is not None and self.copy_ is None:
            raise ValueError("category goes with copy")
        if self.forget is not None and self.forget[0] > self.forget[1]:
            raise ValueError("forget: the first time must not be after the last")
        return self


class StreamChange(_Request):
    """One change: prompts, removals, a name, a pause, or another camera (`url`, `transport` or both).

    A change that was answered survives every restart. With another camera the stream keeps its objects, frame
    numbers and counts.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"prompts": {"objects": [{"id": 7, "category": "bag", "box": [40, 60, 32, 20]}]}},
                {"remove": [3, 4]},
                {"rename": {"id": 7, "category": "suitcase"}},
                {"memory": {"forget": [40, 55], "object": 7}},
                {"memory": {"copy": {"stream": "gate", "object": 3}}},
                {"pause": True},
                {"url": "rtsp://10.20.0.32/h264"},
                {"transport": "tcp"},
                {"zones": {"zones": [{"name": "door", "polygon": [[10, 10], [90, 10], [90, 80], [10, 80]]}]}},
            ]
        }
    )

    prompts: Prompts | None = None
    remove: Annotated[list[ObjectId] | None, Field(min_length=1, max_length=1000)] = None
    rename: Renaming | None = None
    memory: MemoryChange | None = None
    pause: bool | None = None
    url: Annotated[
        CameraUrl | None,
        Field(description="New URL of the camera, complete, with user and password if required."),
    ] = None
    transport: Annotated[Literal["tcp", "udp", "auto"] | None, Field(description=_TRANSPORT)] = None
    zones: Annotated[dict[str, Any] | None, Field(description=_ZONES + " {}: none.")] = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        camera = self.url or self.transport
        changes = self.prompts, self.remove, self.rename, self.memory, self.pause, self.zones, camera
        if sum(change is not None for change in changes) != 1:
            raise ValueError(
                "give exactly one of prompts, remove, rename, memory, pause, zones and a camera (url, "
                "transport or both): each is applied as a whole"
            )
        return self

    def change(self) -> dict[str, Any]:
        """Return the change as `LiveHub.request` takes it."""
        if self.prompts is not None:
            return {"prompts": self.prompts.document()}
        if self.zones is not None:
            return {"zones": self.zones}
        if self.url is not None or self.transport is not None:
            url = {} if self.url is None else {"url": self.url.get_secret_value()}
            return {"camera": url | ({} if self.transport is None else {"transport": self.transport})}
        if self.memory is not None:
            return {"memory": self.memory.model_dump(exclude_none=True, by_alias=True)}
        if self.rename is not None:
            return {"rename": self.rename.model_dump()}
        return {"remove": list(self.remove)} if self.remove is not None else {"pause": self.pause}


class _Answer(BaseModel):
    model_config = ConfigDict(extra="ignore")


class LedgerView(_Answer):
    """Counts of all frames: received = tracked + dropped + corrupt + in flight."""

    received: int = 0
    tracked: int = 0
    dropped: dict[str, int] = {}
    corrupt: dict[str, int] = {}
    in_flight: int = 0


class Rates(_Answer):
    """Recent frames per second."""

    received_fps: float = 0.0
    tracked_fps: float = 0.0


class Lag(_Answer):
    """Recent time from a frame's capture to its tracks, in seconds."""

    p50: float | None = None
    p99: float | None = None


class ObjectView(_Answer):
    """Most recent state of one object."""

    id: int
    category: str | None = None
    score: float = 0.0
    presence: float | None = Field(None, description="Probability that the mask is on its object.")
    area: int = 0
    bbox: list[int] | None = Field(None, description="x, y, width, height in pixels; null when out of sight.")


class Rejected(_Answer):
    """A request that could not be applied to its frame."""

    seq: int
    cause: str


class Requests(_Answer):
    """Numbers of the newest and the newest applied request, and the rejected ones."""

    last: int = 0
    applied: int = 0
    rejected: list[Rejected] = []


class ZoneCounts(_Answer):
    """Objects in a zone, and visits that began and ended."""

    name: str
    inside: int = 0
    entered: int = 0
    left: int = 0


class LineCounts(_Answer):
    """Crossings of a line, as seen by somebody who goes from its start to its end."""

    name: str
    left_to_right: int = 0
    right_to_left: int = 0


class ZonesView(_Answer):
    """Counts of a stream's zones and lines."""

    zones: list[ZoneCounts] = []
    lines: list[LineCounts] = []


class EventView(_Answer):
    """An event of a stream."""

    kind: str = Field(examples=["object_added"])
    name: str | None = Field(None, description="The reason; of zones, the name of the zone, line or rule.")
    frame_index: int = 0
    pts_seconds: float | None = None
    wall_time: datetime | float | str | None = None
    object_id: int | None = None
    detail: dict[str, Any] = {}


class EventList(_Answer):
    stream_id: str
    events: list[EventView]


class Outline(_Answer):
    """A mask that clicks give, and the smallest box around it."""

    rle: dict[str, Any] = Field(description="As in a prompt: size (height, width) and counts.")
    area: int
    bbox: list[int] = Field(description="x, y, width, height in pixels.")


class Options(_Answer):
    """What requests to this service may ask for."""

    detectors: list[str] = Field(description="Detectors that a stream may name.")
    networks: list[str] = Field(description="Networks that cameras may be in; none: no camera is allowed.")
    ports: list[int] = Field(description="Ports that cameras may have.")
    max_streams: int
    streams: dict[str, Any] = Field(description="Settings of streams that name none.")


class StreamView(_Answer):
    """Status of a stream."""

    id: str
    state: str = Field(
        examples=["running"], description="starting, running, paused, waiting, failed or stopped."
    )
    cause: str | None = Field(None, description="Why the stream is waiting or failed.")
    url: str | None = Field(None, description="Without user, password and signatures.")
    since: datetime | float | str | None = None
    next_frame: int = 0
    ledger: LedgerView = LedgerView()
    rates: Rates = Rates()
    lag_seconds: Lag = Lag()
    objects: list[ObjectView] = []
    zones: ZonesView = ZonesView()
    zones_file: dict[str, Any] = Field({}, description="The content of a zones file with all of its zones.")
    recent_events: list[EventView] = Field([], description="The newest events, newest first.")
    settings: dict[str, Any] = {}

    detector: str | None = None
    width: int = 0
    height: int = 0
    committed_frames: int | None = Field(None, description="Frames whose rows can be queried.")
    ms_per_frame: float | None = None
    failures: int = Field(0, description="Consecutive failures.")
    requests: Requests = Requests()

    @classmethod
    def of(cls, status: Mapping[str, Any]) -> StreamView:
        """Make a view of the hub's status; removes credentials from it."""
        return cls.model_validate(clean(dict(status)))


class StreamList(_Answer):
    streams: list[StreamView]


class TrackRow(_Answer):
    """One object on one frame, as in the tracks table."""

    model_config = ConfigDict(extra="allow")

    frame_index: int
    object_id: int
    area: int = 0
    score: float = 0.0
    presence: float | None = Field(None, description="Probability that the mask is on its object.")
    category: str | None = None
    pts_seconds: float | None = None
    wall_time: datetime | float | str | None = None
    mask_rle: str | None = None


class TrackList(_Answer):
    stream_id: str
    tracks: list[TrackRow]


class MemoryFrame(_Answer):
    """What is remembered of one frame in one region of the memory."""

    time: int = Field(
        description="Frames tracked since the first prompt; edits name it. Negative: of another stream."
    )
    age: int | None = Field(description="Frames tracked since; null if copied from another stream.")
    kind: Literal["working", "permanent", "long_term", "copied"]
    elements: int
    objects: list[int] = Field(description="Objects that may read it.")
    given: list[int] = Field(description="Objects that were prompted on it.")
    pinned: bool
    use: float


class MemoryObject(_Answer):
    id: int
    category: str | None = None


class MemoryView(_Answer):
    """What a stream remembers after a frame."""

    stream_id: str
    frame_index: int
    time: int
    objects: list[MemoryObject]
    frames: list[MemoryFrame]


class Ticket(_Answer):
    """For URLs of a stream's `live`, `preview.mjpeg` and `frame.jpg`: `?ticket=...`."""

    ticket: str
    seconds: int


class Problem(_Answer):
    """Why a request was refused."""

    code: str = Field(examples=["not_found"])
    message: str = Field(examples=["there is no stream 'gate-4'"])
    request_id: str = Field(examples=["4f1c2ab90d3e5f67"])


def clean(value: Any) -> Any:
    """Return JSON-ready values with credentials removed from every text, keys included; no NaN, no bytes."""
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, Mapping):
        # A mask's counts may happen to look like a parameter with a secret.
        return {redacted(str(k)): v if _is_counts(k, v) else clean(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [clean(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, datetime):
        return value.isoformat()
    if hasattr(value, "item"):  # a numpy scalar
        return clean(value.item())
    return redacted(str(value))


def _is_counts(key: Any, value: Any) -> bool:
    return key == "mask_rle" and isinstance(value, str) and _COUNTS.fullmatch(value) is not None
