"""Limits on slow and idle HTTP clients, enforced in Ray Serve's proxy.

The proxy is uvicorn, which waits for a request for as long as a client likes, and Ray Serve gives a request
one of the replicas' slots before its body is here. With `middlewares` as the proxy's callback

* a request's head has HEAD_SECONDS, from when the connection is made, or from a later request's first byte;
* a body has BODY_SECONDS, and reaches a replica only once it is complete (or larger than is allowed);
* idle connections and incomplete bodies are limited in number, per client and in total. Above the limit the
  oldest is closed: a well-behaved client sends at once, so it is never the oldest for long.

`xmem serve` names it in the environment variable that Ray reads; elsewhere set it where Ray starts:

    RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=pipeline.api.slow_clients.middlewares
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Hashable, MutableMapping
from typing import Any

from starlette.middleware import Middleware

from pipeline.api.guard import BODY_SECONDS, App, Message, Receive, Scope, Send, refuse

log = logging.getLogger(__name__)

VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
CALLBACK = "pipeline.api.slow_clients.middlewares"

HEAD_SECONDS = 10.0
MOST_IDLE, MOST_IDLE_PER_CLIENT = 1024, 128
"""Connections that have no request under way."""
MOST_BODIES, MOST_BODIES_PER_CLIENT = 128, 32
"""Requests whose body is under way."""
MAX_BODY_BYTES = 2**20
"""Bytes buffered here; a larger body is passed on unbuffered, to be refused."""


def middlewares() -> list[Middleware]:
    """The callback, called before the proxy's server starts: what is put around its application."""
    limit_heads()
    return [Middleware(WholeBodies)]


class Crowd:
    """A bounded collection of members in order of arrival. Above the limits, the oldest are evicted.

    Args:
        most, most_per_client: maximum number of members, in total and per client.
    """

    def __init__(self, most: int, most_per_client: int) -> None:
        self._most, self._most_per_client = most, most_per_client
        self._members: dict[Hashable, tuple[str, Callable[[], object]]] = {}
        self._of: MutableMapping[str, dict[Hashable, None]] = {}

    def __len__(self) -> int:
        return len(self._members)

    def enter(self, member: Hashable, client: str, throw_out: Callable[[], object]) -> None:
        """Add a member, as the newest.

        Args:
            client: the client that it belongs to.
            throw_out: called after the member is evicted.
        """
        self.leave(member)
        self._members[member] = (client, throw_out)
        own = self._of.setdefault(client, {})
        own[member] = None
        if len(own) > self._most_per_client:
            self._throw_out(next(iter(own)))
        elif len(self._members) > self._most:
            self._throw_out(next(iter(self._members)))

    def leave(self, member: Hashable) -> None:
        """Remove a member, if it is present."""
        client, _ = self._members.pop(member, ("", None))
        own = self._of.get(client, {})
        own.pop(member, None)
        if not own:
            self._of.pop(client, None)

    def _throw_out(self, member: Hashable) -> None:
        client, throw_out = self._members[member]
        self.leave(member)
        log.debug("too many connections of %s or in total: closed the oldest idle one", client)
        throw_out()


class WholeBodies:
    """ASGI middleware that forwards a request only after reading its body; see the module docstring."""

    def __init__(
        self,
        app: App,
        *,
        seconds: float = BODY_SECONDS,
        bodies: Crowd | None = None,
        max_bytes: int = MAX_BODY_BYTES,
    ) -> None:
        self._app, self._seconds, self._max_bytes = app, seconds, max_bytes
        self._bodies = Crowd(MOST_BODIES, MOST_BODIES_PER_CLIENT) if bodies is None else bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        names = {name.lower() for name, _ in scope.get("headers", ())} if scope["type"] == "http" else set()
        if not names & {b"content-length", b"transfer-encoding"}:
            await self._app(scope, receive, send)
            return
        reading = asyncio.ensure_future(self._read(receive))
        client = str((scope.get("client") or ("",))[0])
        self._bodies.enter(reading, client, reading.cancel)
        try:
            await asyncio.wait({reading}, timeout=self._seconds)
        finally:
            self._bodies.leave(reading)
            late = not reading.done()
            reading.cancel()
        if late:
            text = f"the body did not arrive within {self._seconds:g} s"
            await refuse(scope, receive, send, 408, "too_slow", text, secrets.token_hex(8))
        elif reading.cancelled():
            text = "too many incomplete request bodies: send the body at once, or try again later"
            await refuse(scope, receive, send, 503, "busy", text, secrets.token_hex(8), close=True)
        elif (first := reading.result()) is not None:
            await self._app(scope, _after(first, receive), send)

    async def _read(self, receive: Receive) -> Message | None:
        """The body as one message, with `more_body` if it is larger than is held; None: the client left."""
        parts: list[bytes] = []
        size, more = 0, True
        while more and size <= self._max_bytes:
            message = await receive()
            if message["type"] != "http.request":
                return None
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            more = bool(message.get("more_body", False))
        return {"type": "http.request", "body": b"".join(parts), "more_body": more}


def _after(first: Message, receive: Receive) -> Receive:
    """A `receive` that returns a message, then the messages after it."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return first

    return replay


def limit_heads() -> None:
    """Limit the time for request heads in all uvicorn servers that this process starts from now on."""
    from uvicorn.protocols.http import auto

    if not getattr(auto.AutoHTTPProtocol, "limits_heads", False):
        crowd = Crowd(MOST_IDLE, MOST_IDLE_PER_CLIENT)
        auto.AutoHTTPProtocol = impatient(auto.AutoHTTPProtocol, HEAD_SECONDS, crowd)


def impatient(protocol: type[asyncio.Protocol], seconds: float, idle: Crowd) -> type[asyncio.Protocol]:
    """uvicorn's HTTP protocol, either of the two, with a time limit for the heads of requests.

    Args:
        idle: connections without a request under way.
    """
    base: Any = protocol

    class Impatient(base):  # type: ignore[misc]
        limits_heads = True
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._wait()
            self._begin_timer()

        def data_received(self, data: bytes) -> None:
            before = self.cycle
            super().data_received(data)
            if self._under_way():
                if self.cycle is not before:
                    self._end_timer()
                    idle.leave(self)
            elif self._timer is None and not self.transport.is_closing():
                self._begin_timer()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if not self._under_way() and not self.transport.is_closing():
                self._wait()

        def handle_websocket_upgrade(self, *arguments: Any) -> None:
            self._end_timer()
            self._upgraded = True
            idle.leave(self)
            super().handle_websocket_upgrade(*arguments)

        def connection_lost(self, exc: Exception | None) -> None:
            self._end_timer()
            idle.leave(self)
            super().connection_lost(exc)

        _upgraded = False

        def _under_way(self) -> bool:
            return self._upgraded or (self.cycle is not None and not self.cycle.response_complete)

        def _wait(self) -> None:
            idle.enter(self, str((self.client or ("",))[0]), self.transport.abort)

        def _begin_timer(self) -> None:
            self._timer = self.loop.call_later(seconds, self._too_slow)

        def _end_timer(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _too_slow(self) -> None:
            self._timer = None
            if not self._under_way():
                self.transport.abort()

    return Impatient
