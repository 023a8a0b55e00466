"""ASGI middleware in front of every route: authentication, origin checks, size limits, error hiding.

Written as plain ASGI and not as dependencies of routes, so that requests are refused before their body is
read, and so that WebSockets are covered too.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import secrets
import traceback
from collections.abc import Awaitable, Callable, Collection, Iterable, MutableMapping
from typing import Any, Protocol
from urllib.parse import parse_qs, urlsplit

from pipeline.api.tokens import TicketOffice
from pipeline.base.redaction import redacted
from pipeline.base.stream_ids import is_stream_id

log = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Tokens(Protocol):
    """What checks the Authorization header: a `TokenSet`, or the `Sessions` of a page."""

    def allows_header(self, header: str | None) -> bool: ...


OPEN_PATHS = frozenset({"/healthz", "/readyz", "/openapi.json"})
"""Paths that need no token: they reveal nothing about any stream."""

BODY_SECONDS = 15.0
"""Time limit for receiving a request's body."""

LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "[::1]")

FAULT = "internal error; the operator finds it in the log under this request's id"

_TICKETED = re.compile(r"/v1/streams/([^/]+)/(?:live|preview\.mjpeg|frame\.jpg)")
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::\d{1,5})?")
_REQUEST_ID = re.compile(r"[A-Za-z0-9-]{8,64}")
_MOST_QUERY = 4096
_CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    b"content-security-policy": _CSP.encode(),
    b"x-content-type-options": b"nosniff",
    b"x-frame-options": b"DENY",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-resource-policy": b"same-origin",
    b"cross-origin-opener-policy": b"same-origin",
    b"permissions-policy": b"camera=(), microphone=(), geolocation=()",
    b"cache-control": b"no-store",
}


def problem(code: str, message: str, request_id: str) -> dict[str, str]:
    """The body of every error response: a code for programs, a one-line message, and the request id."""
    return {"code": code, "message": redacted(" ".join(message.split())), "request_id": request_id}


class ApiGuard:
    """ASGI middleware that checks every request; see the module docstring.

    Args:
        tokens: accepted tokens; None: no authentication, which only makes sense on loopback.
        tickets: issues and checks tickets, see `pipeline.api.tokens`; None: there are none.
        hosts: allowed host names in the Host header, without port; None: any. On loopback this prevents
            DNS rebinding, by which a web page could reach the API under its own host name.
        max_body_bytes: maximum size of a request's body.
        open_paths: paths that need no token.
    """

    def __init__(
        self,
        app: App,
        *,
        tokens: Tokens | None,
        tickets: TicketOffice | None,
        hosts: Iterable[str] | None,
        max_body_bytes: int,
        open_paths: Collection[str] = OPEN_PATHS,
    ) -> None:
        self._app = app
        self._tokens = tokens
        self._tickets = tickets
        self._hosts = None if hosts is None else frozenset(name.lower() for name in hosts)
        self._max_body_bytes = max_body_bytes
        self._open_paths = frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = _headers(scope)
        request_id = headers.get("x-request-id", "")
        if not _REQUEST_ID.fullmatch(request_id):
            request_id = secrets.token_hex(8)
        scope.setdefault("state", {})["request_id"] = request_id
        refused = self._refusal(scope, headers)
        if refused is not None:
            await refuse(scope, receive, send, *refused, request_id)
        elif scope["type"] == "websocket":
            await self._websocket(scope, receive, send, request_id)
        else:
            await self._http(scope, receive, send, request_id)

    # --- checks ----------------------------------------------------------------------------------

    def _refusal(self, scope: Scope, headers: dict[str, str]) -> tuple[int, str, str] | None:
        """(status, code, message) if the request is refused, else None."""
        host = _HOST.fullmatch(headers.get("host", ""))
        if self._hosts is not None and (host is None or host[1].lower() not in self._hosts):
            return 421, "wrong_host", "the Host header names a host that this service does not serve"
        if not _same_page(scope, headers):
            return 403, "cross_site", "cross-site requests are refused"
        if len(scope.get("query_string", b"")) > _MOST_QUERY:
            return 414, "too_long", f"the query is longer than {_MOST_QUERY} characters"
        if not self._known(scope, headers):
            return (
                401,
                "no_token",
                "send the header `Authorization: Bearer TOKEN` with a token of this service",
            )
        length = headers.get("content-length", "0")
        if not length.isascii() or not length.isdigit():
            return 400, "bad_length", "Content-Length is not a number"
        if len(length) > 18 or int(length) > self._max_body_bytes:
            return 413, "too_large", f"the body is larger than {self._max_body_bytes} bytes"
        return None

    def _known(self, scope: Scope, headers: dict[str, str]) -> bool:
        if self._tokens is None or scope["path"] in self._open_paths:
            return True
        if self._tokens.allows_header(headers.get("authorization")):
            return True
        match = None if self._tickets is None else _TICKETED.fullmatch(scope["path"])
        if (
            self._tickets is None
            or match is None
            or scope.get("method", "GET") != "GET"
            or not is_stream_id(match[1])
        ):
            return False
        given = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("ticket", [])
        return len(given) == 1 and self._tickets.allows(given[0], match[1])

    # --- forwarding ------------------------------------------------------------------------------

    async def _http(self, scope: Scope, receive: Receive, send: Send, request_id: str) -> None:
        started = False

        async def dressed(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = _dressed(message.get("headers", ()), request_id)
            await send(message)

        try:
            body = await asyncio.wait_for(self._body(receive), BODY_SECONDS)
        except TimeoutError:
            text = f"the body did not arrive within {BODY_SECONDS:g} s"
            await refuse(scope, receive, send, 408, "too_slow", text, request_id)
            return
        if body is None:
            text = f"the body is larger than {self._max_body_bytes} bytes"
            await refuse(scope, receive, send, 413, "too_large", text, request_id)
            return
        try:
            await self._app(scope, _replayed(body, receive), dressed)
        except Exception as error:
            _log_fault(scope, error, request_id)
            if not started:
                await refuse(scope, receive, send, 500, "internal", FAULT, request_id)

    async def _body(self, receive: Receive) -> bytes | None:
        """The whole body, with or without a Content-Length; None if it is too large."""
        parts: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return b"".join(parts)
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self._max_body_bytes:
                return None
            if not message.get("more_body", False):
                return b"".join(parts)

    async def _websocket(self, scope: Scope, receive: Receive, send: Send, request_id: str) -> None:
        try:
            await self._app(scope, receive, send)
        except Exception as error:
            _log_fault(scope, error, request_id)
            try:
                await send({"type": "websocket.close", "code": 1011, "reason": f"internal {request_id}"})
            except Exception as gone:
                log.debug("request %s: the client is gone: %s", request_id, type(gone).__name__)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` that returns a body already read, then the messages after it."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _headers(scope: Scope) -> dict[str, str]:
    """Headers by lower-case name. Repeated headers are dropped, since readers may pick different values."""
    found: dict[str, str] = {}
    for name, value in scope.get("headers", ()):
        key = name.decode("latin-1").lower()
        found[key] = "\0" if key in found else value.decode("latin-1")
    return found


def _same_page(scope: Scope, headers: dict[str, str]) -> bool:
    """Whether the request is not cross-site. Clients other than browsers do not send these headers."""
    if headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and scope["path"] != "/":
        return False
    origin = headers.get("origin")
    if origin is None:
        return True
    try:
        return urlsplit(origin).netloc.lower() == headers.get("host", "").lower() != ""
    except ValueError:
        return False


def _dressed(given: Iterable[tuple[bytes, bytes]], request_id: str) -> list[tuple[bytes, bytes]]:
    headers = [(name, value) for name, value in given if name.lower() not in _HEADERS]
    return [*headers, *_HEADERS.items(), (b"x-request-id", request_id.encode())]


async def refuse(
    scope: Scope,
    receive: Receive,
    send: Send,
    status: int,
    code: str,
    message: str,
    request_id: str,
    *,
    close: bool = False,
) -> None:
    """Answer a request with a `problem`.

    Args:
        close: close the connection afterwards; needed where the rest of a body is not read.
    """
    if scope["type"] == "websocket":
        await receive()  # the handshake; a close before it is accepted is answered with 403
        await send({"type": "websocket.close", "code": 1008, "reason": code})
        return
    body = json.dumps(problem(code, message, request_id)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b'Bearer realm="xmem"'))
    if close or status in (400, 408, 413):
        headers.append((b"connection", b"close"))  # the rest of the body is not read
    await send({"type": "http.response.start", "status": status, "headers": _dressed(headers, request_id)})
    await send({"type": "http.response.body", "body": body})


def _log_fault(scope: Scope, error: Exception, request_id: str) -> None:
    trace = redacted("".join(traceback.format_exception(error)))
    log.error("request %s: %s %s failed\n%s", request_id, scope.get("method", "WS"), scope["path"], trace)
