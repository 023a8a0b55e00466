"""HTTP proxy that injects network and overload faults, determined by seed and request count.

It runs in front of a real S3 server and keeps the Host header, so that signatures stay valid. Requests are
counted by method and path, and the seed and that count alone decide whether a rule applies: the same requests
get the same faults, whatever the threads do.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

Act = Literal["drop", "lose", "late", "truncate", "stall", "shorten", "slow"]
Answer = Literal["cut", "reset", "hang"]

_PIECE = 1 << 14
_DELIVERIES = 3
"""Attempts to forward a late request: on a busy machine the server was once seen to leave one unanswered."""

_HALVED = ("truncate", "stall", "shorten")
_HOP_BY_HOP = {"connection", "keep-alive", "proxy-connection", "expect", "te", "upgrade"}


@dataclass(frozen=True)
class Rule:
    """A fault and the requests that it applies to.

    Args:
        act: "drop": not forwarded. "lose": forwarded, but the response is withheld. "late": forwarded
            `seconds` later, responded to at once. "truncate": half of the response's body, then the
            connection is cut. "stall": half of the body, then nothing. "shorten": half of the body as a
            complete response. "slow": the body takes `seconds`.
        answer: response for the first three acts: a status, the end of the connection, or nothing for as long
            as the proxy runs.
        method, path: regular expressions; the path is unquoted, has no query, and is searched.
        skip, count: of the matching requests, let the first `skip` pass, then disturb `count`; None: all.
        share: probability with which each of those is disturbed.
    """

    act: Act
    answer: int | Answer = 500
    method: str = ""
    path: str = ""
    skip: int = 0
    count: int | None = 1
    share: float = 1.0
    seconds: float = 0.0

    def matches(self, method: str, path: str) -> bool:
        return bool(re.fullmatch(self.method or ".*", method) and re.search(self.path, path))

    @property
    def name(self) -> str:
        return f"{self.act} {self.answer}" if self.act in ("drop", "lose", "late") else self.act


def storm(share: float, *, hang: bool = False, **which: Any) -> tuple[Rule, ...]:
    """Faults of all kinds for about this share of requests; those that hang cost their timeout each."""
    kinds: list[tuple[Act, int | Answer, str]] = [
        ("drop", 500, ""),
        ("drop", 503, ""),
        ("drop", "cut", ""),
        ("drop", "reset", ""),
        ("lose", 500, ""),
        ("lose", "cut", ""),
        ("late", 503, "PUT"),
        ("late", "cut", "PUT"),
        ("truncate", 500, "GET"),
        ("shorten", 500, "GET"),
    ]
    if hang:
        kinds += [("drop", "hang", ""), ("lose", "hang", "")]
    each = share / (10 if hang else 8)  # which is how many of them any method meets
    return tuple(
        Rule(act, answer, **{"method": method, **which}, count=None, share=each, seconds=0.3)
        for act, answer, method in kinds
    )


@dataclass
class Happened:
    """Log of the proxy, in order.

    Attributes:
        requests: (method, unquoted path, status that the client got or the fault's name).
        faults: number of injected faults, by "<fault> <method>".
        late: (path, status) of late requests that have arrived.
        undelivered: path and last error of late requests that the server did not answer.
        sent: bytes of bodies that went to clients.
    """

    requests: list[tuple[str, str, str]] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    late: list[tuple[str, int]] = field(default_factory=list)
    undelivered: list[str] = field(default_factory=list)
    sent: int = 0

    def count(self, act: str = "") -> int:
        """Number of injected faults whose name begins with `act`."""
        return sum(n for name, n in self.faults.items() if name.startswith(act))


class Proxy:
    """A running proxy. Rules can be replaced at any time; the first that applies is used.

    Args:
        endpoint: URL of the server, http://host:port.
        rules: the faults.
        seed: seed for rules with a share.
        latency: seconds added to every request.
        bandwidth: bytes per second of all responses' bodies together; None: unlimited.
    """

    def __init__(
        self,
        endpoint: str,
        rules: Sequence[Rule] = (),
        *,
        seed: int = 0,
        latency: float = 0.0,
        bandwidth: float | None = None,
    ) -> None:
        url = urlsplit(endpoint)
        assert url.hostname
        assert url.port
        self.server = (url.hostname, url.port)
        self.seed, self.latency, self.bandwidth = seed, latency, bandwidth
        self.happened = Happened()
        self.lock = threading.Lock()
        self.stopping = threading.Event()
        self._rules: list[Rule] = []
        self._matched: list[int] = []
        self._struck: list[int] = []
        self._seen: Counter[tuple[str, str]] = Counter()
        self._late: list[threading.Thread] = []
        self._free_at = 0.0
        self.set(*rules)

    @property
    def endpoint(self) -> str:
        host, port = self._http.server_address[:2]
        return f"http://{host!s}:{port}"

    def set(self, *rules: Rule) -> None:
        """Replace the rules; their counts begin anew. None: no more faults."""
        with self.lock:
            self._rules = list(rules)
            self._matched = [0] * len(rules)
            self._struck = [0] * len(rules)

    def options(self, options: dict[str, Any], read_timeout: float = 20.0) -> dict[str, Any]:
        """fsspec's storage options for the server, leading through the proxy."""
        client = {**options.get("client_kwargs", {}), "endpoint_url": self.endpoint}
        config = {**options.get("config_kwargs", {}), "read_timeout": read_timeout}
        return {**options, "client_kwargs": client, "config_kwargs": config}

    def settle(self) -> list[tuple[str, int]]:
        """Wait for all late requests to arrive; (path, status) of each.

        AssertionError if the server did not answer one.
        """
        self._join()
        assert not self.happened.undelivered
        return list(self.happened.late)

    def _join(self) -> None:
        with self.lock:
            waiting, self._late = self._late, []
        for thread in waiting:
            thread.join()

    def start(self) -> None:
        proxy = self

        class Handler(_Handler):
            owner = proxy

        self._http = _Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self.stopping.set()
        self._http.shutdown()
        self._http.server_close()
        self._join()

    # For the handlers

    def strike(self, method: str, path: str) -> Rule | None:
        """The rule that applies to a request, or None."""
        with self.lock:
            nth = self._seen[method, path]
            self._seen[method, path] += 1
            for i, rule in enumerate(self._rules):
                if not rule.matches(method, path):
                    continue
                self._matched[i] += 1
                if self._matched[i] <= rule.skip or (
                    rule.count is not None and self._struck[i] >= rule.count
                ):
                    continue
                if rule.share < 1 and self._chance(i, method, path, nth) >= rule.share:
                    continue
                self._struck[i] += 1
                self.happened.faults[f"{rule.name} {method}"] += 1
                return rule
        return None

    def _chance(self, rule: int, method: str, path: str, nth: int) -> float:
        key = f"{self.seed}|{rule}|{method}|{path}|{nth}".encode()
        return int.from_bytes(hashlib.blake2b(key, digest_size=4).digest()) / 2**32

    def record(self, method: str, path: str, outcome: object) -> None:
        with self.lock:
            self.happened.requests.append((method, path, str(outcome)))

    def deliver_late(self, seconds: float, path: str, forward: Any) -> None:
        def deliver() -> None:
            self.stopping.wait(seconds)
            for _ in range(_DELIVERIES):
                try:
                    connection, response = forward()
                    response.read()
                    connection.close()
                except (OSError, http.client.HTTPException) as failed:
                    reason = f"{path}: {failed!r}"
                    continue
                with self.lock:
                    self.happened.late.append((path, response.status))
                return
            with self.lock:
                self.happened.undelivered.append(reason)

        thread = threading.Thread(target=deliver, daemon=True)
        with self.lock:
            self._late.append(thread)
        thread.start()

    def pay(self, count: int) -> None:
        """Wait until the shared bandwidth has room for this number of bytes."""
        with self.lock:
            self.happened.sent += count
            if self.bandwidth is None:
                return
            self._free_at = max(self._free_at, time.monotonic()) + count / self.bandwidth
            wait = self._free_at - time.monotonic()
        if wait > 0:
            time.sleep(wait)


@contextlib.contextmanager
def faulty(endpoint: str, *rules: Rule, **settings: Any) -> Iterator[Proxy]:
    """Context manager of a proxy in front of a server."""
    proxy = Proxy(endpoint, rules, **settings)
    proxy.start()
    try:
        yield proxy
    finally:
        proxy.stop()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that disconnect: they are part of these tests."""


class _Gone(Exception):  # noqa: N818 - the connection is to be cut
    pass


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    owner: Proxy

    def log_message(self, *_: Any) -> None:
        """Log nothing: requests are counted."""

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (_Gone, OSError):
            self.close_connection = True

    def handle_expect_100(self) -> bool:
        return True  # not before it is clear that the body is wanted

    def finish(self) -> None:
        with contextlib.suppress(OSError):
            super().finish()

    def _do(self) -> None:
        path = unquote(urlsplit(self.path).path)
        method = str(self.command)
        if self.owner.latency:
            time.sleep(self.owner.latency)
        rule = self.owner.strike(method, path)
        if rule is not None and (rule.act, rule.answer) == ("drop", "hang"):
            self.owner.record(method, path, rule.name)
            self._answer("hang")
        body = self._body()
        # As they are now: a late request arrives when this handler is at work on the connection's next one.
        target, headers = self.path, self.headers.items()

        def forward() -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
            return self._forward(method, target, headers, body)

        if rule is not None and rule.act in ("drop", "lose", "late"):
            self.owner.record(method, path, rule.name)
            if rule.act == "lose":
                connection, response = forward()
                response.read()
                connection.close()
            elif rule.act == "late":
                self.owner.deliver_late(rule.seconds, path, forward)
            self._answer(rule.answer)
            return
        connection, response = forward()
        try:
            outcome = response.status if rule is None else rule.name
            self.owner.record(method, path, outcome)
            self._relay(method, response, rule)
        finally:
            connection.close()

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _do  # noqa: N815

    def _body(self) -> bytes:
        if self.headers.get("Expect", "").lower() == "100-continue":
            self.send_response_only(100)
            self.end_headers()
            self.wfile.flush()
        length = self.headers.get("Content-Length")
        if length is not None:
            data = self.rfile.read(int(length))
            if len(data) < int(length):
                raise _Gone
            return data
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return b""
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _forward(
        self, method: str, target: str, headers: list[tuple[str, str]], body: bytes
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        connection = http.client.HTTPConnection(*self.owner.server, timeout=60)
        connection.putrequest(method, target, skip_host=True, skip_accept_encoding=True)
        for name, value in headers:
            if name.lower() not in _HOP_BY_HOP | {"content-length", "transfer-encoding"}:
                connection.putheader(name, value)
        if body or method in ("PUT", "POST"):
            connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body or None)
        return connection, connection.getresponse()

    def _answer(self, answer: int | str) -> None:
        if isinstance(answer, int):
            text = b"" if self.command == "HEAD" else _error_body(answer)
            self.send_response(answer)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)
            return
        if answer == "hang":
            self._until_the_client_goes()
        if answer == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        raise _Gone

    def _until_the_client_goes(self) -> None:
        self.connection.settimeout(0.1)
        while not self.owner.stopping.is_set():
            try:
                if not self.connection.recv(1):
                    return
            except TimeoutError:
                continue
            except OSError:
                return

    def _relay(self, method: str, response: http.client.HTTPResponse, rule: Rule | None) -> None:
        length = response.getheader("Content-Length")
        act = "" if rule is None else rule.act
        keep = None if length is None else int(length) // 2
        self.send_response_only(response.status)
        for name, value in response.getheaders():
            lower = name.lower()
            if lower in _HOP_BY_HOP | {"content-length", "transfer-encoding"}:
                continue
            if act == "shorten" and lower == "content-range":
                continue
            self.send_header(name, value)
        if length is None and method != "HEAD" and response.status not in (204, 304):
            data = response.read()
            keep = len(data) // 2
            self.send_header("Content-Length", str(keep if act == "shorten" else len(data)))
            self.end_headers()
            self._write(data[:keep] if act in _HALVED else data)
        else:
            if length is not None:
                self.send_header("Content-Length", str(keep) if act == "shorten" else length)
            self.end_headers()
            if method != "HEAD":
                self._copy(response, keep if act in _HALVED else None, rule)
        self.wfile.flush()
        if act == "stall":
            self._until_the_client_goes()
        if act in ("truncate", "stall"):
            raise _Gone

    def _copy(self, response: http.client.HTTPResponse, limit: int | None, rule: Rule | None) -> None:
        total = int(response.getheader("Content-Length") or 0)
        left = total if limit is None else limit
        while left > 0:
            piece = response.read(min(left, _PIECE))
            if not piece:
                raise _Gone
            if rule is not None and rule.act == "slow":
                time.sleep(rule.seconds * len(piece) / total)
            self._write(piece)
            left -= len(piece)

    def _write(self, data: bytes) -> None:
        self.owner.pay(len(data))
        self.wfile.write(data)
        self.wfile.flush()


def _error_body(status: int) -> bytes:
    code, message = {503: ("SlowDown", "Please reduce your request rate.")}.get(
        status, ("InternalError", "We encountered an internal error. Please try again.")
    )
    return f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
