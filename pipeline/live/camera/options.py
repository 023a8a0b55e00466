"""Options of a live source: timeouts, reconnects, queue, allowed networks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline.base.errors import UsageError
from pipeline.base.picture_size import MAX_PIXELS
from pipeline.live.camera.queue import QueuePolicy
from pipeline.live.camera.url_guard import UrlGuard

Transport = Literal["tcp", "udp", "auto"]


@dataclass(frozen=True, slots=True)
class LiveOptions:
    """Settings of a `LiveSource`; UsageError for values that make no sense.

    Args:
        transport: of RTSP's media. "auto": TCP, UDP where TCP gives no picture, and then what worked
            last.
        open_seconds: how long connecting may take, up to the description of the stream.
        stall_seconds: without a picture for that long, a connection is given up. A camera that sends less
            than one picture in that time needs more.
        keyframe_seconds: after connecting, a keyframe is waited for that long; then decoding starts anyway.
        gap_seconds: silence within a connection that is worth an event.
        first_backoff_seconds, most_backoff_seconds: between tries to connect (see `pipeline.base.backoff`).
        stable_seconds: a connection that gave pictures for that long was a success; backoff starts anew.
        policy: what happens to frames that come faster than they are taken: "latest" drops the oldest,
            "every" lets the camera wait, as far as it does.
        queue_frames, queue_bytes: how many decoded frames may wait. Bytes are those of decoded pictures.
        max_age_seconds: with "latest", frames older than this are dropped rather than delivered.
        max_jump_seconds, max_skew_seconds: see `pipeline.live.camera.clock`.
        max_pixels: larger pictures are not decoded.
        threads: that decode; more than one split pictures into slices, where the camera allows that.
        guard: decides where the stream may come from, for URLs from people who may not choose freely.
        verify_certificate, certificate_authorities: of rtsps cameras, where there is a guard.
        ffmpeg_options: further options of FFmpeg's, from the operator; not for the API.
    """

    transport: Transport = "auto"
    open_seconds: float = 10.0
    stall_seconds: float = 5.0
    keyframe_seconds: float = 15.0
    gap_seconds: float = 2.0
    first_backoff_seconds: float = 0.5
    most_backoff_seconds: float = 15.0
    stable_seconds: float = 5.0
    policy: QueuePolicy = "latest"
    queue_frames: int = 4
    queue_bytes: int = 256 << 20
    max_age_seconds: float | None = None
    max_jump_seconds: float = 5.0
    max_skew_seconds: float = 2.0
    max_pixels: int = MAX_PIXELS
    threads: int = 1
    guard: UrlGuard | None = None
    verify_certificate: bool = True
    certificate_authorities: str | None = None
    ffmpeg_options: Mapping[str, str] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        _one_of("transport", self.transport, ("tcp", "udp", "auto"))
        _one_of("policy", self.policy, ("latest", "every"))
        for name in (
            "open_seconds",
            "stall_seconds",
            "keyframe_seconds",
            "gap_seconds",
            "first_backoff_seconds",
            "stable_seconds",
            "max_jump_seconds",
            "max_skew_seconds",
            "queue_frames",
            "queue_bytes",
            "max_pixels",
            "threads",
        ):
            _positive(name, getattr(self, name))
        if self.max_age_seconds is not None:
            _positive("max_age_seconds", self.max_age_seconds)
        if self.most_backoff_seconds < self.first_backoff_seconds:
            raise UsageError(
                f"most_backoff_seconds={self.most_backoff_seconds}: "
                f"must be at least first_backoff_seconds={self.first_backoff_seconds}"
            )


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UsageError(f"{name}={value!r}: must be {', '.join(allowed[:-1])} or {allowed[-1]}")


def _positive(name: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise UsageError(f"{name}={value}: must be a positive number")
