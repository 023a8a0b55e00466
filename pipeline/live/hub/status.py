"""Status and metrics of a live stream, readable while another thread tracks."""

from __future__ import annotations

from typing import Any

from pipeline.live.camera.ledger import LedgerCounts
from pipeline.live.hub.stream import HubStream
from pipeline.live.recent import LiveView
from pipeline.live.tracker import LiveTracker

_RECENT_EVENTS = 5


def state_of(stream: HubStream) -> str:
    """State of a stream.

    stopped: removed. failed: closed with a cause, and retried later unless the failure is permanent.
    starting: no frame yet. waiting: the camera delivers no frames. paused: frames are received but not
    tracked. running: frames are tracked.
    """
    tracker = stream.tracker
    if stream.removed:
        return "stopped"
    if tracker is None:
        return "failed" if stream.failure is not None else "starting"
    if tracker.requests.paused:
        return "paused"
    feed = str(getattr(tracker.source.status(), "state", "streaming"))
    if feed == "streaming":
        return "running" if tracker.began else "starting"
    return "waiting"


def status_of(stream: HubStream) -> dict[str, Any]:
    """Status of a stream, JSON-ready. An open stream has more fields than a closed one."""
    spec, tracker = stream.spec, stream.tracker
    state, counts = state_of(stream), _ledger(stream)
    answer: dict[str, Any] = {
        "id": spec.stream_id,
        "state": state,
        "cause": None,
        "url": spec.shown_url,
        "since": stream.since,
        "detector": spec.detector,
        "settings": spec.settings.to_dict(),
        "ledger": {**counts.to_json(), "in_flight": counts.in_flight},
        "rates": {"received_fps": 0.0, "tracked_fps": 0.0},
        "lag_seconds": {"p50": None, "p99": None},
        "ms_per_frame": stream.ms_per_frame,
        "failures": stream.failures,
        "next_frame": stream.last_frame,
        "committed_frames": None,
        "width": 0,
        "height": 0,
        "objects": [],
        "zones": {"zones": [], "lines": []},
        "zones_file": spec.zones_here.to_json() if spec.zones_here else {},
        "recent_events": stream.view.events(_RECENT_EVENTS),
        "requests": {"last": 0, "applied": 0, "rejected": []},
    }
    if tracker is None:
        if state == "failed" and stream.failure is not None:
            answer["cause"] = stream.failure.message
        return answer
    if state == "waiting":
        answer["cause"] = getattr(tracker.source.status(), "failure", None)
    return answer | _while_open(tracker, stream.view)


def metrics_of(stream: HubStream) -> dict[str, Any]:
    """Counters and gauges: numbers only, and dicts of them by reason."""
    status = status_of(stream)
    ledger = status["ledger"]
    return {
        "up": int(status["state"] in ("running", "paused")),
        "received": ledger["received"],
        "tracked": ledger["tracked"],
        "dropped": ledger["dropped"],
        "corrupt": ledger["corrupt"],
        "in_flight": ledger["in_flight"],
        "objects": len(status["objects"]),
        "failures": status["failures"],
        **status["rates"],
        "lag_p50_seconds": status["lag_seconds"]["p50"],
        "lag_p99_seconds": status["lag_seconds"]["p99"],
        "ms_per_frame": status["ms_per_frame"],
        "next_frame": status["next_frame"],
    }


def _ledger(stream: HubStream) -> LedgerCounts:
    tracker = stream.tracker
    return stream.last_ledger if tracker is None else tracker.source.ledger.counts()


def _while_open(tracker: LiveTracker, view: LiveView) -> dict[str, Any]:
    return {
        "rates": {name: round(rate, 2) for name, rate in tracker.rates().items()},
        "lag_seconds": tracker.lag_seconds(),
        "next_frame": tracker.next_frame,
        "committed_frames": tracker.record.books.frames,
        "width": tracker.source.width,
        "height": tracker.source.height,
        "objects": [
            {
                "id": r.object_id,
                "category": r.category,
                "score": round(r.score, 4),
                "presence": None if r.presence is None else round(r.presence, 4),
                "area": r.area,
                "bbox": None if r.bbox is None else list(r.bbox),
            }
            for r in view.newest()
        ],
        "zones": tracker.zones.status(),
        "requests": {
            "last": tracker.record.last_request,
            "applied": tracker.requests.applied,
            "rejected": [{"seq": r.number, "cause": r.cause} for r in list(tracker.requests.rejected)],
        },
    }
