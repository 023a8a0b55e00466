"""Clients that send half a head or half a body over real sockets are disconnected; others are served."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import pytest
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from websockets.sync.client import connect

from pipeline.api.slow_clients import Crowd, WholeBodies, impatient

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # uvicorn's choice of WebSocket library

SECONDS = 0.7
PATIENCE = 20.0
HALF_HEAD = b"GET / HTTP/1.1\r\nHost: here\r\nX-Slow: "
HALF_BODY = b"POST / HTTP/1.1\r\nHost: here\r\nContent-Length: 100\r\n\r\n{"


class Echo:
    """Returns the length of a body, or sends first over a WebSocket."""

    def __init__(self) -> None:
        self.asked = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.accept"})
            await asyncio.sleep(3 * SECONDS)
            await send({"type": "websocket.send", "text": "still here"})
            await send({"type": "websocket.close"})
            return
        self.asked += 1
        size, more = 0, True
        while more:
            message = await receive()
            size += len(message.get("body", b""))
            more = message.get("more_body", False)
        if scope["path"] == "/long":
            await asyncio.sleep(3 * SECONDS)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": json.dumps(size).encode()})


class Server:
    def __init__(self, protocol: Any) -> None:
        self.app, self.idle, self.bodies = Echo(), Crowd(40, 20), Crowd(8, 4)
        made = WholeBodies(self.app, seconds=SECONDS, bodies=self.bodies, max_bytes=1000)
        config = uvicorn.Config(
            made,
            http=impatient(protocol, SECONDS, self.idle),
            lifespan="off",
            log_level="critical",
            timeout_graceful_shutdown=1,
        )
        self._server = uvicorn.Server(config)
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port: int = self._listening.getsockname()[1]
        self._thread = threading.Thread(target=self._server.run, args=([self._listening],))
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive()
            time.sleep(0.01)

    def send(self, data: bytes) -> socket.socket:
        made = socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE)
        made.sendall(data)
        return made

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=PATIENCE)

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join()
        self._listening.close()


@pytest.fixture(params=[HttpToolsProtocol, H11Protocol])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    made = Server(request.param)
    yield made
    made.close()


def rest(end: socket.socket) -> bytes:
    """Bytes from the server until it closes the connection; TimeoutError if it does not."""
    said = b""
    try:
        while data := end.recv(4096):
            said += data
    except ConnectionResetError:
        pass
    finally:
        end.close()
    return said


def test_half_a_head_is_not_waited_for(server: Server) -> None:
    slow = [server.send(HALF_HEAD) for _ in range(15)] + [server.send(b"") for _ in range(3)]
    with server.client() as client:
        assert client.get("/").json() == 0
    assert [rest(end) for end in slow] == [b""] * 18


def test_a_head_that_trickles_in_has_no_more_time(server: Server) -> None:
    end = server.send(HALF_HEAD)
    try:
        for _ in range(round(PATIENCE / 0.1)):
            end.sendall(b"x")
            time.sleep(0.1)
        raise AssertionError("it goes on and on")
    except OSError:  # reset or broken, as it comes
        pass
    finally:
        end.close()


def test_the_head_of_a_second_request_has_a_limit_too(server: Server) -> None:
    end = server.send(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n")
    assert end.recv(4096).startswith(b"HTTP/1.1 200")
    end.sendall(HALF_HEAD)
    rest(end)
    assert server.app.asked == 1


def test_of_too_many_that_wait_the_oldest_go_at_once(server: Server) -> None:
    slow = [server.send(b"") for _ in range(60)]
    with server.client() as client:
        assert client.get("/").json() == 0
    assert len(server.idle) <= 20
    for end in slow:
        rest(end)


def test_requests_that_are_under_way_are_left_alone(server: Server) -> None:
    with server.client() as client:
        assert client.get("/long").json() == 0  # answered later than a head may come
        assert client.post("/long", content=b"x" * 5000).json() == 5000
    with connect(f"ws://127.0.0.1:{server.port}/", open_timeout=PATIENCE, proxy=None) as websocket:
        assert websocket.recv(timeout=PATIENCE) == "still here"
    end = time.monotonic() + PATIENCE
    while len(server.idle):  # nobody is forgotten in there
        assert time.monotonic() < end
        time.sleep(0.02)


def test_half_a_body_reaches_nobody(server: Server) -> None:
    slow = [server.send(HALF_BODY) for _ in range(3)]
    with server.client() as client:
        assert client.post("/", content=b"{}").json() == 2
    said = [rest(end) for end in slow]
    assert all(text.startswith(b"HTTP/1.1 408") and b"did not arrive within 0.7 s" in text for text in said)
    assert server.app.asked == 1
    assert len(server.bodies) == 0


def test_of_too_many_bodies_the_oldest_is_refused(server: Server) -> None:
    slow = [server.send(HALF_BODY) for _ in range(12)]
    with server.client() as client:
        assert client.post("/", content=b"{}").json() == 2
    said = [rest(end) for end in slow]
    assert said[0].startswith(b"HTTP/1.1 503")
    assert b"too many incomplete request bodies" in said[0]
    assert server.app.asked == 1


def test_a_body_that_arrives_in_pieces_is_whole(server: Server) -> None:
    end = server.send(HALF_BODY)
    for _ in range(3):
        time.sleep(0.05)
        end.sendall(b"x" * 33)
    assert end.recv(4096).startswith(b"HTTP/1.1 200")
    end.close()

    def pieces() -> Iterator[bytes]:
        for _ in range(30):
            yield b"y" * 1000

    with server.client() as client:
        assert client.post("/", content=pieces()).json() == 30_000


def test_a_crowd_throws_out_the_oldest() -> None:
    gone: list[str] = []
    crowd = Crowd(4, 2)
    for name in ("a1", "a2", "b1", "a3", "b2", "c1"):
        crowd.enter(name, name[0], lambda name=name: gone.append(name))  # type: ignore[misc]
    assert gone == ["a1", "a2"]  # a has three; then there are five in all
    crowd.leave("b1")
    crowd.leave("b1")
    crowd.enter("a3", "a", lambda: gone.append("again"))  # the newest now
    crowd.enter("d1", "d", lambda: gone.append("d1"))
    crowd.enter("e1", "e", lambda: gone.append("e1"))
    assert gone == ["a1", "a2", "b2"]
    assert len(crowd) == 4
