"""Live views over HTTP: MJPEG previews and the WebSocket of mask records.

Results are not queued: a slow client skips to the newest frame and does not delay other clients.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

from fastapi import WebSocket
from starlette.websockets import WebSocketDisconnect

from pipeline.api import models
from pipeline.api.service import RefusedError, Service, status_of
from pipeline.base.errors import XmemError
from pipeline.live.recent import LiveView

BOUNDARY = "xmem-frame"
_RECORDS_WAIT_SECONDS = 2.0
_HEARTBEAT_SECONDS = 10.0


async def pictures(
    service: Service,
    stream_id: str,
    overlay: bool,
    max_side: int,
    quality: int,
    fps: float,
    frames: int | None,
    picture: bytes,
) -> AsyncIterator[bytes]:
    """Parts of a multipart response. A slow client delays only its own; each part is the newest frame."""
    sent = 0
    last: bytes | None = None
    repeated = time.monotonic()
    while True:
        begun = time.monotonic()
        # An unchanged frame is sent again only occasionally, to detect clients that are gone.
        if picture != last or begun - repeated > _HEARTBEAT_SECONDS or frames is not None:
            head = f"--{BOUNDARY}\r\nContent-Type: image/jpeg\r\nContent-Length: {len(picture)}\r\n\r\n"
            yield head.encode() + picture + b"\r\n"
            sent, last, repeated = sent + 1, picture, begun
        if frames is not None and sent >= frames:
            return
        await asyncio.sleep(max(0.0, 1 / fps - (time.monotonic() - begun)))
        try:
            picture = await service.about(
                stream_id, service.hub.view(stream_id, LiveView.jpeg, overlay, max_side, quality)
            )
        except (XmemError, RefusedError):
            return  # the stream, or its tracker, is gone; browsers reconnect


async def follow(service: Service, websocket: WebSocket, stream_id: str) -> None:
    """Send the newest frame's records as they come, until the client leaves or the stream ends.

    Each message is sent before the next is requested, so slow clients get the newest frame and no backlog.
    """
    try:
        await service.known(stream_id)
    except (XmemError, RefusedError) as error:
        status, _ = status_of(error)
        await websocket.close(
            1013 if status == 503 else 1008, "no such stream" if status == 404 else "unavailable"
        )
        return
    try:
        service.refuse_if_crowded()
    except RefusedError:
        await websocket.close(1013, "too many viewers")
        return
    with service.viewing():
        await websocket.accept()
        sender = asyncio.ensure_future(_send_records(service, websocket, stream_id))
        reader = asyncio.ensure_future(_read_until_gone(websocket))
        try:
            await asyncio.wait({sender, reader}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (sender, reader):
                task.cancel()
        await asyncio.wait({sender, reader})
        for task in (sender, reader):
            fault = None if task.cancelled() else task.exception()
            if fault is not None and not isinstance(fault, WebSocketDisconnect | RuntimeError):
                raise fault


async def _send_records(service: Service, websocket: WebSocket, stream_id: str) -> None:
    after = -1
    spoken = time.monotonic()
    while True:
        try:
            wait = _RECORDS_WAIT_SECONDS
            news = await service.about(
                stream_id,
                service.hub.view(stream_id, LiveView.wait, after, wait),
                seconds=wait + service.settings.hub_seconds,
            )
        except (XmemError, RefusedError) as error:
            gone = status_of(error)[0] == 404
            await websocket.close(1000 if gone else 1013, "the stream has ended" if gone else "unavailable")
            return
        if news is not None and news.get("seq", -1) > after:
            after = int(news["seq"])
            await websocket.send_json({"type": "records", "stream_id": stream_id, **models.clean(dict(news))})
            spoken = time.monotonic()
        elif time.monotonic() - spoken > _HEARTBEAT_SECONDS:
            await websocket.send_json({"type": "waiting", "stream_id": stream_id})
            spoken = time.monotonic()
        elif news is None:
            await asyncio.sleep(0.05)  # avoids a busy loop if the hub returns without waiting


async def _read_until_gone(websocket: WebSocket) -> None:
    """Wait until the client leaves. No messages are expected: a client that sends 16 is disconnected."""
    for _ in range(16):
        message = await websocket.receive()
        if message["type"] == "websocket.disconnect":
            return
    await websocket.close(1008, "send nothing")
