"""A `LiveHub` of this process behind the API, served by uvicorn in a thread."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import uvicorn

from pipeline.api.app import create_app
from pipeline.api.service import ApiSettings
from pipeline.live.hub.hub import LiveHub
from pipeline.live.spec import LiveSpec


class LocalHub:
    """The hub's methods, awaitable: each runs in a thread."""

    def __init__(self, hub: LiveHub) -> None:
        self._hub = hub

    async def add(self, spec: LiveSpec) -> Mapping[str, Any]:
        return await asyncio.to_thread(self._hub.add, spec)

    async def remove(self, stream_id: str) -> Mapping[str, Any] | None:
        return await asyncio.to_thread(self._hub.remove, stream_id)

    async def list(self) -> Sequence[Mapping[str, Any]]:
        return await asyncio.to_thread(self._hub.list)

    async def status(self, stream_id: str) -> Mapping[str, Any]:
        return await asyncio.to_thread(self._hub.status, stream_id)

    async def request(self, stream_id: str, content: Mapping[str, Any]) -> Mapping[str, Any]:
        return await asyncio.to_thread(self._hub.request, stream_id, content)

    async def view(self, stream_id: str, read: Callable[..., Any], /, *arguments: Any, **options: Any) -> Any:
        return await asyncio.to_thread(self._hub.view, stream_id, read, *arguments, **options)

    async def capacity(self) -> Mapping[str, Any]:
        return await asyncio.to_thread(self._hub.capacity)


@contextlib.contextmanager
def served_hub(hub: Any, settings: ApiSettings) -> Iterator[str]:
    """The address at which a hub (with awaitable methods) is served."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        app = create_app(hub, settings)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.02)
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
