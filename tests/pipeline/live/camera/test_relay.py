"""Guarded connections: real FFmpeg, a real relay, cameras that redirect, passwords that stay private."""

from __future__ import annotations

import contextlib
import logging
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import pytest
from support.rtsp_camera import Camera, Proxy, camera
from support.videos import make_video

from pipeline.base.errors import UsageError
from pipeline.live.camera.options import LiveOptions
from pipeline.live.camera.relay import RelayError, RtspRelay
from pipeline.live.camera.source import LiveSource
from pipeline.live.camera.url_guard import CheckedUrl, UrlGuard

PATIENCE = 40.0
PASSWORD = "h%40nter-2"

Answer = Callable[[str, dict[str, str]], bytes | None]


class FakeCamera:
    """Responds to each request as specified; a context manager. Records the requests."""

    def __init__(self, answer: Answer, address: str = "127.0.0.1") -> None:
        self._answer = answer
        self.requests: list[str] = []
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._listener = socket.create_server((address, 0), family=family)
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                with client, contextlib.suppress(OSError):
                    self._talk(client)

    def _talk(self, client: socket.socket) -> None:
        held = b""
        client.settimeout(10)
        while data := client.recv(4096):
            held += data
            while b"\r\n\r\n" in held:
                request, _, held = held.partition(b"\r\n\r\n")
                text = request.decode()
                self.requests.append(text)
                first, *rest = text.split("\r\n")
                headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in rest)}
                answer = self._answer(first.split()[0], headers)
                if answer is None:
                    return
                client.sendall(answer)

    def __enter__(self) -> FakeCamera:
        return self

    def __exit__(self, *exc: object) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(15)


def reply(headers: dict[str, str], status: str = "200 OK", *more: str, body: str = "") -> bytes:
    lines = [f"RTSP/1.0 {status}", f"CSeq: {headers.get('cseq', '0')}", *more]
    if body:
        lines += ["Content-Type: application/sdp", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, "", body]).encode()


SDP = "\r\n".join(
    ["v=0", "o=- 0 0 IN IP4 127.0.0.1", "s=x", "c=IN IP4 0.0.0.0", "t=0 0", "m=video 0 RTP/AVP 96",
     "a=rtpmap:96 H264/90000", "a=control:track1", ""]
)  # fmt: skip


def guarded(port: int, **changes: Any) -> LiveOptions:
    values: dict[str, Any] = {
        "guard": UrlGuard(["127.0.0.1"], ports=[port]),
        "open_seconds": 5.0,
        "stall_seconds": 2.0,
        "first_backoff_seconds": 0.1,
        "most_backoff_seconds": 0.3,
        "queue_frames": 64,
    }
    return LiveOptions(**(values | changes))


def failure(source: LiveSource) -> str:
    """Failure of the first connection."""
    source.start()
    pause = threading.Event()
    for _ in range(round(PATIENCE / 0.02)):
        if source.status().tries:
            return str(source.status().failure)
        pause.wait(0.02)
    raise AssertionError(source.status())


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_video(tmp_path_factory.mktemp("clips") / "clip.mp4", 50, gop=10)


@pytest.fixture(scope="module")
def protected(clip: Path) -> Iterator[Camera]:
    """A camera that requires a password, by digest."""
    with camera(clip, user="admin:h@nter-2") as made:
        yield made


@pytest.mark.parametrize("step", ["OPTIONS", "DESCRIBE", "SETUP", "PLAY"])
def test_a_redirect_is_not_followed(step: str) -> None:
    """The redirect target gets no request, whichever request is redirected."""
    with FakeCamera(lambda method, headers: reply(headers)) as elsewhere:

        def answer(method: str, headers: dict[str, str]) -> bytes:
            if method == step:
                return reply(
                    headers, "302 Moved Temporarily", f"Location: rtsp://127.0.0.1:{elsewhere.port}/inside"
                )
            if method == "DESCRIBE":
                return reply(headers, body=SDP)
            if method == "SETUP":
                return reply(
                    headers, "200 OK", "Session: 1", "Transport: RTP/AVP/TCP;unicast;interleaved=0-1"
                )
            return reply(headers, "200 OK", "Public: DESCRIBE, SETUP, PLAY")

        with FakeCamera(answer) as fake:
            with LiveSource(f"rtsp://127.0.0.1:{fake.port}/live", guarded(fake.port)) as source:
                assert failure(source).startswith("refused: the camera redirects")
            assert any(request.startswith(step) for request in fake.requests)
        assert elsewhere.requests == []


def test_ffmpeg_alone_would_follow_it() -> None:
    """The reason for the relay: without it, this version of FFmpeg connects wherever the camera redirects."""
    with FakeCamera(lambda method, headers: reply(headers, "404 Not Found")) as elsewhere:
        there = f"Location: rtsp://127.0.0.1:{elsewhere.port}/inside"
        with (
            FakeCamera(lambda method, headers: reply(headers, "302 Found", there)) as fake,
            pytest.raises(av.FFmpegError),
        ):
            av.open(f"rtsp://127.0.0.1:{fake.port}/", options={"rtsp_transport": "tcp"}, timeout=5)
        assert elsewhere.requests[0].startswith("OPTIONS")


def test_media_from_another_address_is_refused() -> None:
    def answer(method: str, headers: dict[str, str]) -> bytes:
        if method == "DESCRIBE":
            return reply(headers, body=SDP)
        if method == "SETUP":
            ports = headers["transport"].split("client_port=")[1].split(";")[0]
            way = (
                f"Transport: RTP/AVP;unicast;client_port={ports};server_port=6000-6001;source=169.254.169.254"
            )
            return reply(headers, "200 OK", "Session: 1", way)
        return reply(headers, "200 OK", "Public: DESCRIBE, SETUP, PLAY")

    with FakeCamera(answer) as fake:
        options = guarded(fake.port, transport="udp")
        with LiveSource(f"rtsp://127.0.0.1:{fake.port}/live", options) as source:
            assert failure(source) == "refused: the camera names another address as its media's source"


def test_what_speaks_no_rtsp_gets_no_further_word() -> None:
    with (
        FakeCamera(lambda method, headers: b"220 mail.example ESMTP ready\r\n\r\n") as fake,
        LiveSource(f"rtsp://127.0.0.1:{fake.port}/", guarded(fake.port)) as source,
    ):
        assert failure(source) == "refused: the camera does not speak RTSP"


def test_names_that_move_are_checked_at_every_connection() -> None:
    answers = iter([["127.0.0.1"], ["169.254.169.254"]])
    with FakeCamera(lambda method, headers: None) as fake:
        guard = UrlGuard(["127.0.0.1"], ports=[fake.port], resolver=lambda host, port: next(answers, []))
        options = guarded(fake.port, guard=guard)
        with LiveSource(f"rtsp://camera.example:{fake.port}/", options) as source:
            assert failure(source).startswith("unreachable")
            pause = threading.Event()
            while not str(source.status().failure).startswith("refused"):
                pause.wait(0.02)
            assert "camera.example is not in a network" in str(source.status().failure)
        assert len(fake.requests) == 1


def test_what_is_plainly_not_allowed_is_refused_at_once() -> None:
    for url in ("http://127.0.0.1/x", "file:///etc/passwd", "rtsp://127.0.0.1:22/", "rtsp://127.1/"):
        with pytest.raises(UsageError):
            LiveSource(url, guarded(554))


@pytest.mark.parametrize("transport", ["tcp", "udp"])
def test_a_camera_with_a_password(
    protected: Camera, transport: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    url = protected.url(user=f"admin:{PASSWORD}")
    with LiveSource(url, guarded(protected.port, transport=transport)) as source:
        for _ in range(30):
            frame = source.read(PATIENCE)
            assert frame is not None
        said = caplog.text + repr(source) + source.uri + str(source.status())
    assert "nter-2" not in said
    assert f"127.0.0.1:{protected.port}" in source.uri


def test_a_wrong_password_is_said_and_not_shown(protected: Camera, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    url = protected.url(user="admin:wr0ng")
    for options in (guarded(protected.port), LiveOptions(open_seconds=5.0)):
        with LiveSource(url, options) as source:
            assert "authorization failed" in failure(source).lower()
            assert "wr0ng" not in caplog.text + repr(source) + str(source.status())


def test_a_camera_at_an_ipv6_address() -> None:
    """FFmpeg gets as far as requesting a port of that family, over the relay."""

    def answer(method: str, headers: dict[str, str]) -> bytes:
        if method == "DESCRIBE":
            return reply(headers, body=SDP)
        return reply(headers, "200 OK" if method == "OPTIONS" else "461 Unsupported transport")

    try:
        fake = FakeCamera(answer, "::1")
    except OSError:
        pytest.skip("this machine has no IPv6")
    with fake:
        options = guarded(fake.port, guard=UrlGuard(["::1"], ports=[fake.port]), transport="udp")
        with LiveSource(f"rtsp://[::1]:{fake.port}/live?a=b", options) as source:
            assert failure(source).startswith("unreachable")
        described, setup = fake.requests[1:3]
        assert described.startswith("DESCRIBE rtsp://[::1]:")
        assert "/live?a=b RTSP/1.0" in described
        assert "client_port=" in setup
        assert "User-Agent: xmem" in setup


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not installed")
    folder = tmp_path_factory.mktemp("tls")
    command = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=camera"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "both.pem", "-out", "cert.pem"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    with (folder / "both.pem").open("a") as both:
        both.write((folder / "cert.pem").read_text())
    return folder


def test_rtsps_is_verified_and_encrypted(protected: Camera, certificate: Path) -> None:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate / "both.pem")
    with Proxy(protected.port, tls=tls) as proxy:
        url = f"rtsps://admin:{PASSWORD}@127.0.0.1:{proxy.port}/live"
        with LiveSource(url, guarded(proxy.port)) as source:
            assert "certificate" in failure(source).lower()
        for options in (
            guarded(proxy.port, certificate_authorities=str(certificate / "cert.pem")),
            guarded(proxy.port, verify_certificate=False),
        ):
            with LiveSource(url, options) as source:
                frames = [source.read(PATIENCE) for _ in range(10)]
                assert all(frame is not None for frame in frames)


def checked(port: int, **more: str) -> CheckedUrl:
    return UrlGuard(["127.0.0.1"], ports=[port]).check(f"rtsp://127.0.0.1:{port}/live")


def test_another_process_on_this_machine_gets_nothing() -> None:
    with FakeCamera(lambda method, headers: reply(headers)) as fake:
        with RtspRelay(checked(fake.port)) as relay:
            port = int(relay.url.split(":")[2].split("/")[0])
            with socket.create_connection(("127.0.0.1", port), timeout=10) as stranger:
                stranger.sendall(b"OPTIONS * RTSP/1.0\r\nCSeq: 1\r\nUser-Agent: guess\r\n\r\n")
                assert stranger.recv(100) == b""
                with pytest.raises(OSError):  # noqa: PT011 - refused or reset, as the kernel likes
                    socket.create_connection(("127.0.0.1", port), timeout=10).recv(1)
        assert fake.requests == []
        assert "another process" in str(relay.refusal)


def test_a_camera_that_is_not_there() -> None:
    with pytest.raises(RelayError, match="cannot be reached"):
        RtspRelay(checked(1), connect_seconds=2.0)


def test_closing_a_relay_that_nobody_used() -> None:
    before = threading.active_count()
    with FakeCamera(lambda method, headers: None) as fake:
        RtspRelay(checked(fake.port)).close()
    assert threading.active_count() <= before


def test_a_client_that_does_not_read_slows_the_camera_and_fills_no_memory() -> None:
    """The camera sends as fast as it is read; the relay holds a few hundred kilobytes at most."""
    sent = {"bytes": 0}
    frame = b"$\x00\x10\x00" + bytes(4096)
    listener = socket.create_server(("127.0.0.1", 0))
    stop = threading.Event()

    def flood() -> None:
        with contextlib.suppress(OSError):
            client, _ = listener.accept()
            with client:
                client.settimeout(0.2)
                client.recv(4096)
                while not stop.is_set():
                    with contextlib.suppress(TimeoutError):
                        sent["bytes"] += client.send(frame[sent["bytes"] % len(frame) :])

    thread = threading.Thread(target=flood)
    thread.start()
    try:
        with RtspRelay(checked(listener.getsockname()[1])) as relay:
            port = int(relay.url.split(":")[2].split("/")[0])
            with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
                request = f"PLAY * RTSP/1.0\r\nUser-Agent: {relay.token}\r\n\r\n"
                client.sendall(request.encode())
                before = -1
                while sent["bytes"] != before or not before:
                    before = sent["bytes"]
                    stop.wait(0.5)
                got = 0
                while got < before:
                    got += len(client.recv(1 << 16))
                assert sent["bytes"] >= got
        assert before < 30 << 20
    finally:
        stop.set()
        thread.join(10)
        listener.close()
