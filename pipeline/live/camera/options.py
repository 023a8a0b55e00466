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
    """Settings of a `LiveSource`. Raises UsageError for invalid values.

    Args:
        transport: of RTSP media. "auto": TCP first, UDP if TCP gives no picture, then whichever worked last.
        open_seconds: limit for connecting, up to the stream's description.
        stall_seconds: a connection without a picture for this long is given up. Raise it for a camera that
            sends pictures less often.
        keyframe_seconds: time to wait for a keyframe after connecting; then decoding starts anyway.
        gap_seconds: silence within a connection that is reported as an event.
        first_backoff_seconds, most_backoff_seconds: delay between attempts to connect (see
            `pipeline.base.backoff`).
        stable_seconds: a connection that gave pictures for this long resets the backoff.
        policy: what to do with frames that arrive faster than they are taken: "latest" drops the oldest,
            "every" makes the camera wait, as far as it does.
        queue_frames, queue_bytes: limits of the queue of decoded frames. Bytes are those of decoded pictures.
        max_age_seconds: with "latest", frames older than this are dropped rather than delivered.
        max_jump_seconds, max_skew_seconds: see `pipeline.live.camera.clock`.
        max_pixels: larger pictures are not decoded.
        threads: decoding threads; with more than one, pictures are decoded by slices if the camera sends
            slices.
        guard: checks where the stream may come from; for URLs from people who may not choose freely.
        verify_certificate, certificate_authorities: for rtsps cameras, if there is a guard.
        ffmpeg_options: further FFmpeg options, set by the operator; not offered by the API.
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
