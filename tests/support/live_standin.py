"""Fake hub for API tests: implements `LiveHub`'s methods in memory, without cameras, trackers or Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import cv2
import numpy as np

from pipeline.base.errors import UsageError, XmemError
from pipeline.live.recent import LiveView
from pipeline.live.spec import LivePrompts, LiveSpec


def record(frame: int, object_id: int = 1, **values: Any) -> dict[str, Any]:
    return {
        "frame_index": frame,
        "pts_seconds": frame / 10,
        "wall_time": "2026-11-23T08:00:00+00:00",
        "object_id": object_id,
        "category": "person",
        "frame_height": 48,
        "frame_width": 64,
        "area": 6,
        "bbox": [10 + frame, 12, 3, 2],
        "centroid": [11.5, 13.0],
        "score": 0.875,
        "presence": 0.75,
        "mask_rle": "o03",
    } | values


class StandInHub:
    """A hub that holds its streams in memory. `down`, `slow` and `fault` make it behave badly."""

    def __init__(self, room: int = 8) -> None:
        self.room = room
        self.specs: dict[str, LiveSpec] = {}
        self.frames: dict[str, list[list[dict[str, Any]]]] = {}
        self.paused: set[str] = set()
        self.happened: dict[str, list[dict[str, Any]]] = {}
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.down = False
        self.slow = False
        self.fault: Exception | None = None
        self.news = 0
        self.waits: list[int] = []

    async def _begin(self, stream_id: str | None = None) -> None:
        if self.slow:
            await asyncio.sleep(3600)
        if self.fault is not None:
            raise self.fault
        if self.down:
            raise XmemError("the tracker's process is gone; its camera was rtsp://root:hunter2@10.0.0.9/x")
        if stream_id is not None and stream_id not in self.specs:
            raise UsageError(f"there is no stream {stream_id!r}: GET /v1/streams lists them")

    async def add(self, spec: LiveSpec) -> dict[str, Any]:
        await self._begin()
        if spec.stream_id in self.specs:
            raise UsageError(f"there is a stream {spec.stream_id!r} already: remove it, or take another id")
        if len(self.specs) >= self.room:
            raise UsageError("it needs 65000000 bytes of device memory, 1000000 are left")
        self.specs[spec.stream_id] = spec
        self.frames[spec.stream_id] = []
        return self._status(spec.stream_id)

    async def remove(self, stream_id: str) -> None:
        await self._begin(stream_id)
        del self.specs[stream_id], self.frames[stream_id]

    async def list(self) -> list[dict[str, Any]]:
        await self._begin()
        return [self._status(name) for name in self.specs]

    async def status(self, stream_id: str) -> dict[str, Any]:
        await self._begin(stream_id)
        return self._status(stream_id)

    async def request(self, stream_id: str, content: Mapping[str, Any]) -> dict[str, Any]:
        await self._begin(stream_id)
        kept = {k: v.content if isinstance(v, LivePrompts) else v for k, v in content.items()}
        self.requests.append((stream_id, kept))
        if "pause" in content:
            (self.paused.add if content["pause"] else self.paused.discard)(stream_id)
        if "zones" in content:
            self.specs[stream_id] = self.specs[stream_id].with_zones(content["zones"])
        if "camera" in content:
            self.specs[stream_id] = self.specs[stream_id].with_camera(content["camera"])
        return {"done": True}

    async def view(self, stream_id: str, read: Callable[..., Any], /, *arguments: Any, **options: Any) -> Any:
        await self._begin(stream_id)
        answers: dict[Callable[..., Any], Callable[..., Any]] = {
            LiveView.tracks: self._tracks,
            LiveView.events: self._events,
            LiveView.wait: self._wait,
            LiveView.jpeg: self._jpeg,
            LiveView.memory: self._memory,
            LiveView.thumbnail: self._thumbnail,
        }
        return await answers[read](stream_id, *arguments, **options)

    async def _tracks(self, stream_id: str, since: int | None, limit: int) -> Any:
        rows = [row for rows in self.frames[stream_id] for row in rows]
        return [r for r in rows if since is None or r["frame_index"] > since][:limit]

    async def _events(self, stream_id: str, limit: int) -> Any:
        return self.happened.get(stream_id, [])[:limit]

    async def _memory(self, stream_id: str) -> dict[str, Any]:
        entry = {"time": 0, "age": 4, "kind": "permanent", "elements": 12, "objects": [1], "given": [1]}
        return {
            "frame_index": 4,
            "time": 4,
            "objects": [{"id": 1, "category": "bag"}],
            "frames": [entry | {"pinned": True, "use": 0.5}],
        }

    async def _thumbnail(self, stream_id: str, moment: int) -> bytes | None:
        return await self._jpeg(stream_id, False, 64, 80) if moment == 0 else None

    async def _wait(self, stream_id: str, after_seq: int, timeout: float) -> dict[str, Any] | None:
        self.waits.append(after_seq)
        deadline = asyncio.get_running_loop().time() + timeout
        while asyncio.get_running_loop().time() < deadline:
            if stream_id not in self.specs:
                raise UsageError(f"there is no stream {stream_id!r}")
            newest = len(self.frames[stream_id]) - 1
            if newest > after_seq:
                return {"seq": newest, "frame_index": newest, "records": self.frames[stream_id][newest]}
            await asyncio.sleep(0.01)
        return None

    async def _jpeg(self, stream_id: str, overlay: bool, max_side: int, quality: int) -> bytes:
        image: Any = np.full((48, 64, 3), 40, np.uint8)
        shift = len(self.frames[stream_id])
        colour = (60, 200, 90) if overlay else (60, 90, 200)
        cv2.rectangle(image, (10 + shift % 40, 12), (22 + shift % 40, 40), colour, -1)
        scale = min(max_side, 640) / 64
        image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_NEAREST)
        return bytes(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1])

    async def capacity(self) -> dict[str, Any]:
        await self._begin()
        return {"streams": len(self.specs), "max_streams": self.room, "device": "cpu"}

    def publish(self, stream_id: str, *records: dict[str, Any]) -> None:
        """Publish a tracked frame."""
        frame = len(self.frames[stream_id])
        self.frames[stream_id].append([{**r, "frame_index": frame} for r in (records or (record(frame),))])

    def _status(self, stream_id: str) -> dict[str, Any]:
        spec = self.specs[stream_id]
        tracked = len(self.frames[stream_id])
        seen = self.frames[stream_id][-1] if tracked else []
        return {
            "id": stream_id,
            "state": "paused" if stream_id in self.paused else "running",
            "cause": None,
            "url": spec.shown_url,
            "since": "2026-11-23T08:00:00+00:00",
            "next_frame": tracked,
            "ledger": {
                "received": tracked + 7,
                "tracked": tracked,
                "dropped": {"late": 4, "queue full": 1},
                "corrupt": {"damaged": 1},
                "in_flight": 1,
            },
            "rates": {"received_fps": 25.0, "tracked_fps": 12.5},
            "lag_seconds": {"p50": 0.08, "p99": 0.31},
            "objects": [
                {"id": r["object_id"], **{k: r[k] for k in ("category", "score", "presence", "area", "bbox")}}
                for r in seen
            ],
            "detector": spec.detector,
            "zones_file": spec.zones_here.to_json() if spec.zones_here else {},
            "recent_events": self.happened.get(stream_id, [])[:5],
            "settings": spec.settings.to_dict(),
        }
