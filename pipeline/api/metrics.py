"""Prometheus metrics of the hub.

They are built for each scrape from the hub's status, in a separate registry: counters always match the
ledger, several replicas count nothing twice, and removed streams disappear.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from pipeline.base.redaction import redacted

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
STATES = ("starting", "running", "paused", "waiting", "failed", "stopped")

_STREAM = ("stream_id",)


def metrics_text(streams: Iterable[Mapping[str, Any]], capacity: Mapping[str, Any] | None = None) -> bytes:
    """The exposition text for the results of `LiveHub.list()` and `LiveHub.capacity()`."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Snapshot([(_label(status["id"]), status) for status in streams], capacity or {}))
    return generate_latest(registry)


class _Snapshot(Collector):
    def __init__(self, streams: Sequence[tuple[str, Mapping[str, Any]]], capacity: Mapping[str, Any]) -> None:
        self._streams = streams
        self._capacity = capacity

    def collect(self) -> Iterator[Metric]:
        yield from _frames(self._streams)
        yield from _states(self._streams)
        yield from _speed(self._streams)
        yield from _zones(self._streams)
        for key, value in sorted(self._capacity.items()):
            if _is_number(value) and key.isidentifier() and key.isascii():
                name = key if key.startswith("xmem_") else f"xmem_capacity_{key}"
                yield GaugeMetricFamily(name, f"Tracker: {key.replace('_', ' ')}", value=float(value))


def _frames(streams: Iterable[tuple[str, Mapping[str, Any]]]) -> Iterator[Metric]:
    received = CounterMetricFamily("xmem_frames_received", "Frames received from the camera", labels=_STREAM)
    tracked = CounterMetricFamily("xmem_frames_tracked", "Frames tracked", labels=_STREAM)
    by_reason = (*_STREAM, "reason")
    dropped = CounterMetricFamily("xmem_frames_dropped", "Intact frames not tracked", labels=by_reason)
    corrupt = CounterMetricFamily("xmem_frames_corrupt", "Damaged frames", labels=by_reason)
    flying = GaugeMetricFamily("xmem_frames_in_flight", "Frames between camera and tracker", labels=_STREAM)
    for name, status in streams:
        ledger = status.get("ledger") or {}
        settled = int(ledger.get("tracked", 0))
        received.add_metric([name], int(ledger.get("received", 0)))
        tracked.add_metric([name], settled)
        for family, key in ((dropped, "dropped"), (corrupt, "corrupt")):
            for reason, count in sorted((ledger.get(key) or {}).items()):
                family.add_metric([name, _label(reason)], count)
                settled += int(count)
        flying.add_metric([name], int(ledger.get("received", 0)) - settled)
    yield from (received, tracked, dropped, corrupt, flying)


def _states(streams: Iterable[tuple[str, Mapping[str, Any]]]) -> Iterator[Metric]:
    state = GaugeMetricFamily(
        "xmem_stream_state", "1 for the current state of the stream", labels=(*_STREAM, "state")
    )
    objects = GaugeMetricFamily("xmem_objects", "Objects tracked", labels=_STREAM)
    visible = GaugeMetricFamily("xmem_objects_visible", "Objects visible", labels=_STREAM)
    kinds = GaugeMetricFamily(
        "xmem_objects_visible_by_category",
        "Objects visible, by category of those tracked; empty: without one",
        labels=(*_STREAM, "category"),
    )
    following = GaugeMetricFamily("xmem_next_frame", "frame_index of the next frame", labels=_STREAM)
    failures = GaugeMetricFamily("xmem_failures", "Consecutive failures", labels=_STREAM)
    for name, status in streams:
        for known in STATES:
            state.add_metric([name, known], float(status.get("state") == known))
        seen = status.get("objects") or []
        objects.add_metric([name], len(seen))
        visible.add_metric([name], sum(1 for entry in seen if entry.get("area")))
        of_kind: Counter[str] = Counter()
        for entry in seen:
            of_kind[_label(entry.get("category") or "")] += bool(entry.get("area"))
        for category, count in sorted(of_kind.items()):
            kinds.add_metric([name, category], count)
        following.add_metric([name], status.get("next_frame") or 0)
        failures.add_metric([name], status.get("failures") or 0)
    yield from (state, objects, visible, kinds, following, failures)


def _speed(streams: Iterable[tuple[str, Mapping[str, Any]]]) -> Iterator[Metric]:
    received = GaugeMetricFamily("xmem_received_fps", "Recent frames received per second", labels=_STREAM)
    tracked = GaugeMetricFamily("xmem_tracked_fps", "Recent frames tracked per second", labels=_STREAM)
    frame = GaugeMetricFamily("xmem_frame_seconds", "Recent tracking time per frame", labels=_STREAM)
    lag = GaugeMetricFamily(
        "xmem_lag_seconds", "Recent time from capture to tracks", labels=(*_STREAM, "quantile")
    )
    for name, status in streams:
        rates = status.get("rates") or status
        for family, key in ((received, "received_fps"), (tracked, "tracked_fps")):
            if _is_number(rates.get(key)):
                family.add_metric([name], rates[key])
        if _is_number(status.get("ms_per_frame")):
            frame.add_metric([name], status["ms_per_frame"] / 1000)
        late = status.get("lag_seconds") or {}
        for key, quantile in (("p50", "0.5"), ("p99", "0.99")):
            if _is_number(late.get(key)):
                lag.add_metric([name, quantile], late[key])
    yield from (received, tracked, frame, lag)


def _zones(streams: Iterable[tuple[str, Mapping[str, Any]]]) -> Iterator[Metric]:
    labels = (*_STREAM, "zone")
    inside = GaugeMetricFamily("xmem_zone_objects", "Objects that are in a zone", labels=labels)
    entered = CounterMetricFamily("xmem_zone_entered", "Visits of a zone that began", labels=labels)
    left = CounterMetricFamily("xmem_zone_left", "Visits of a zone that ended", labels=labels)
    crossed = CounterMetricFamily(
        "xmem_line_crossed", "Crossings of a line", labels=(*_STREAM, "line", "direction")
    )
    for name, status in streams:
        found = status.get("zones") or {}
        for zone in found.get("zones", ()):
            for family, key in ((inside, "inside"), (entered, "entered"), (left, "left")):
                family.add_metric([name, _label(zone["name"])], zone[key])
        for line in found.get("lines", ()):
            for direction in ("left_to_right", "right_to_left"):
                crossed.add_metric([name, _label(line["name"]), direction], line[direction])
    yield from (inside, entered, left, crossed)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _label(text: Any) -> str:
    return redacted(str(text))
