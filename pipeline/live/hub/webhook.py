"""Webhook: pushes the zone events of live streams to an HTTP address.

The operator names the address; redirects are not followed, and of an answer only the status counts. A request
ends after ten seconds, however slowly the receiver answers. See `pipeline.live.hub.event_push`.
"""

from __future__ import annotations

import hashlib
import hmac
import http.client
import json
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from pipeline.base.errors import UsageError, XmemError, one_line
from pipeline.base.redaction import redacted

_SECONDS = 10.0
_LEAST_SECRET = 16
SIGNATURE = "X-Xmem-Signature"
TIMESTAMP = "X-Xmem-Timestamp"


@dataclass(frozen=True)
class WebhookSettings:
    """Where events are pushed to; UsageError for what makes no sense.

    Args:
        url: http or https; may hold a secret in its path, so it is in no repr.
        secret: signs the requests, see `signature`.
        first_backoff_seconds, most_backoff_seconds: between tries.
    """

    url: str = field(repr=False)
    secret: str = field(repr=False)
    first_backoff_seconds: float = 1.0
    most_backoff_seconds: float = 60.0

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            good = False
        if not good or not self.url.isascii() or not self.url.isprintable() or " " in self.url:
            raise UsageError(f"webhook {redacted(self.url)!r} is not allowed: an http or https URL")
        if "@" in parts.netloc:
            raise UsageError(
                f"webhook {redacted(self.url)!r} is not allowed: user and password are not sent, requests "
                "are signed instead; a secret may be part of the path"
            )
        if len(self.secret) < _LEAST_SECRET:
            raise UsageError(f"the webhook's secret is too short: at least {_LEAST_SECRET} characters")


def signature(secret: str, timestamp: str, body: bytes) -> str:
    """The header `X-Xmem-Signature`: HMAC-SHA256 over `<X-Xmem-Timestamp>.<body>`, hexadecimal."""
    digest = hmac.new(secret.encode(), timestamp.encode() + b"." + body, hashlib.sha256).hexdigest()
    return f"sha256={digest}"


class Webhook:
    """Sends events as signed POST requests; the receiver confirms with a status 2xx."""

    name = "webhook"

    def __init__(self, settings: WebhookSettings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._connection: http.client.HTTPConnection | None = None
        self._closed = False

    def send(self, stream_id: str, events: Sequence[Mapping[str, Any]]) -> None:
        """Send events in one request. XmemError if it is not answered with 2xx."""
        self._post({"stream_id": stream_id, "events": list(events)})

    def close(self) -> None:
        """End `send`; what was not delivered is sent after the next start."""
        self._closed = True
        self._hang_up()

    def _hang_up(self) -> None:
        """End the request under way; `send` gets an error."""
        with self._lock:
            found = None if self._connection is None else self._connection.sock
        if found is not None:
            with suppress(OSError):  # it has ended by itself
                found.shutdown(socket.SHUT_RDWR)

    def _post(self, content: Mapping[str, Any]) -> None:
        body = json.dumps(content).encode()
        timestamp = str(int(time.time()))
        parts = urlsplit(self._settings.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.hostname or "", parts.port, timeout=_SECONDS)
        headers = {
            "Content-Type": "application/json",
            TIMESTAMP: timestamp,
            SIGNATURE: signature(self._settings.secret, timestamp, body),
        }
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        # The socket's timeout is of each read: a receiver that sends a byte now and then has no other limit.
        limit = threading.Timer(_SECONDS, self._hang_up)
        limit.daemon = True
        try:
            with self._lock:
                self._connection = connection
            connection.connect()
            limit.start()
            if self._closed:
                raise OSError("closed")
            connection.request("POST", target, body, headers)
            status = connection.getresponse().status
        except (OSError, http.client.HTTPException) as error:
            raise XmemError(f"no answer: {type(error).__name__}: {one_line(error)}") from error
        finally:
            limit.cancel()
            with self._lock:
                self._connection = None
            connection.close()
        if not 200 <= status < 300:
            raise XmemError(f"it answered {status}")
