"""A loopback RTSP relay between FFmpeg and a camera that confines FFmpeg to the checked address.

FFmpeg's RTSP client follows redirects, resolves names, and sends reports to whatever address a reply names.
So the FFmpeg of a guarded stream talks to this relay, which connects to the checked address, passes the bytes
on, and checks the camera's replies (`pipeline.live.camera.messages`): a redirect ends the connection. For
`rtsps` the relay speaks TLS with the camera, and FFmpeg speaks plain RTSP with the relay.
"""

from __future__ import annotations

import logging
import secrets
import selectors
import socket
import ssl
import threading
import time
from contextlib import suppress

from pipeline.base.closeable import Closing
from pipeline.base.errors import one_line
from pipeline.live.camera.messages import Refusal, Replies, Requests
from pipeline.live.camera.url_guard import CheckedUrl

log = logging.getLogger(__name__)

_BUFFER = 1 << 18
_CHUNK = 1 << 16


class RelayError(Exception):
    """The camera cannot be reached at any of its checked addresses."""


class RtspRelay(Closing):
    """One connection to one camera. Use it as a context manager, and give `url` to FFmpeg.

    Args:
        target: where to connect: its checked addresses in turn, never its name.
        connect_seconds: limit for connecting, TLS included, over all addresses.
        verify: for rtsps, whether the camera's certificate must be valid for its host name.
        authorities: a file of CA certificates that replaces the system's.

    Attributes:
        url: the relay's URL, with the camera's user and password, path and query. A secret.
        token: the User-Agent that the relay's one client must send.
        refusal: why the relay closed the connection, if it did.
        camera_address: the address that the relay is connected to.

    Raises RelayError if no address of the camera can be reached.
    """

    def __init__(
        self,
        target: CheckedUrl,
        *,
        connect_seconds: float = 5.0,
        verify: bool = True,
        authorities: str | None = None,
    ) -> None:
        self.refusal: str | None = None
        self.token = "xmem-" + secrets.token_urlsafe(18)
        self._stop = threading.Event()
        self._camera = _connected(target, connect_seconds, verify, authorities)
        peer, own = self._camera.getpeername()[0], self._camera.getsockname()[0]
        self.camera_address: str = peer
        self._replies = Replies(camera=peer, own=own)
        self._requests = Requests(self.token)
        # Same family as the camera's address: FFmpeg opens its UDP ports in the family of the given address.
        v6 = self._camera.family == socket.AF_INET6
        family = socket.AF_INET6 if v6 else socket.AF_INET
        self._listener = socket.create_server(("::1" if v6 else "127.0.0.1", 0), family=family, backlog=1)
        self._wake, self._woken = socket.socketpair()
        port = self._listener.getsockname()[1]
        userinfo = target.userinfo + "@" if target.userinfo else ""
        self.url = f"rtsp://{userinfo}{'[::1]' if v6 else '127.0.0.1'}:{port}{target.rest}"
        self._thread = threading.Thread(target=self._run, name="xmem-relay", daemon=True)
        self._thread.start()

    @property
    def media_over_udp(self) -> bool:
        """Whether the camera has agreed to send media over UDP."""
        return self._replies.direct

    def close(self) -> None:
        """Close both connections and wait for the thread."""
        self._stop.set()
        with suppress(OSError):  # it may be closed already
            self._wake.send(b"x")
        self._thread.join()

    def _run(self) -> None:
        client: socket.socket | None = None
        try:
            client = self._accepted()
            if client is not None:
                self._pass_on(client)
        except Refusal as refusal:
            self.refusal = str(refusal)
            log.warning("closed the connection to a camera: %s", refusal)
        except OSError as error:
            log.debug("relay ended: %s", one_line(error))
        finally:
            for end in (client, self._camera, self._listener, self._wake, self._woken):
                if end is not None:
                    with suppress(OSError):
                        end.close()

    def _accepted(self) -> socket.socket | None:
        """Accept one client; no other can connect after it."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._woken, selectors.EVENT_READ)
            selector.select()
        if self._stop.is_set():
            return None
        client, _ = self._listener.accept()
        self._listener.close()
        return client

    def _pass_on(self, client: socket.socket) -> None:
        """Copy bytes in both directions, each as fast as its receiver takes them."""
        camera = self._camera
        for end in (client, camera):
            end.setblocking(False)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        to_client, to_camera = bytearray(), bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(self._woken, selectors.EVENT_READ)
            while not self._stop.is_set():
                # Bytes that TLS has already decrypted do not make the socket readable.
                pending = isinstance(camera, ssl.SSLSocket) and camera.pending() and len(to_client) < _BUFFER
                _watch(selector, client, read=len(to_camera) < _BUFFER, write=bool(to_client))
                _watch(selector, camera, read=len(to_client) < _BUFFER, write=bool(to_camera))
                ready = {key.fileobj: mask for key, mask in selector.select(0 if pending else None)}
                if ready.get(camera) or pending:
                    if len(to_client) < _BUFFER:
                        data = _received(camera)
                        if data == b"":
                            return self._finish(client, to_client)
                        to_client += self._replies.feed(data or b"")
                    _send(camera, to_camera)
                if ready.get(client):
                    if len(to_camera) < _BUFFER:
                        data = _received(client)
                        if data == b"":
                            return _send(camera, to_camera)
                        to_camera += self._requests.feed(data or b"")
                    _send(client, to_client)
                _send(client, to_client)
                _send(camera, to_camera)

    def _finish(self, client: socket.socket, rest: bytearray) -> None:
        """After the camera has closed its end, send the client what arrived before."""
        client.settimeout(1.0)
        with suppress(OSError):  # it may be closed already
            client.sendall(rest)


def _connected(
    target: CheckedUrl, seconds: float, verify: bool, authorities: str | None
) -> socket.socket | ssl.SSLSocket:
    """Connect to one of the target's addresses."""
    deadline = time.monotonic() + seconds
    last: Exception | None = None
    for address in target.addresses:
        left = deadline - time.monotonic()
        if left <= 0:
            break
        try:
            plain = socket.create_connection((str(address), target.port), timeout=left)
        except OSError as error:
            last = error
            continue
        try:
            if target.encrypted:
                context = ssl.create_default_context(cafile=authorities)
                if not verify:
                    context.check_hostname = False
                    context.verify_mode = ssl.CERT_NONE
                plain.settimeout(max(0.1, deadline - time.monotonic()))
                return context.wrap_socket(plain, server_hostname=target.host)
            return plain
        except OSError as error:
            plain.close()
            last = error
    why = "no response in time" if last is None or isinstance(last, TimeoutError) else one_line(last)
    raise RelayError(f"{target.host}:{target.port} cannot be reached ({why})")


def _watch(selector: selectors.BaseSelector, end: socket.socket, *, read: bool, write: bool) -> None:
    events = (selectors.EVENT_READ if read else 0) | (selectors.EVENT_WRITE if write else 0)
    watched = end in selector.get_map()
    if events and watched:
        selector.modify(end, events)
    elif events:
        selector.register(end, events)
    elif watched:
        selector.unregister(end)


def _received(end: socket.socket) -> bytes | None:
    """Return received bytes; empty at the end of the stream, None if there are none yet."""
    try:
        return end.recv(_CHUNK)
    except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
        return None
    except (ConnectionError, ssl.SSLEOFError):
        return b""


def _send(end: socket.socket, data: bytearray) -> None:
    while data:
        try:
            sent = end.send(memoryview(data)[:_CHUNK].tobytes())
        except (BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError):
            return
        del data[:sent]
