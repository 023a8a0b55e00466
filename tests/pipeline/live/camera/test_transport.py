"""The transport of a camera's media: detected, remembered, and named in errors."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from support.live_reader import PATIENCE, options
from support.rtsp_camera import camera
from support.videos import make_video
from test_relay import SDP, FakeCamera, failure, guarded, reply

from pipeline.live.camera.connection import ConnectionLost
from pipeline.live.camera.options import LiveOptions
from pipeline.live.camera.source import LiveSource
from pipeline.live.camera.transport import TransportChoice
from pipeline.live.spec import LiveSettings


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_video(tmp_path_factory.mktemp("clips") / "clip.mp4", 50, gop=10)


REFUSED = ConnectionLost("unreachable", "not over that", transport="refused")
SILENT = ConnectionLost("stalled", "no picture for 5.0 s", transport="silent")
AWAY = ConnectionLost("unreachable", "Connection refused")
URL = "rtsp://camera/live"


def current(choice: TransportChoice) -> str:
    return choice.current


def test_tcp_comes_first_and_then_what_worked() -> None:
    assert LiveOptions().transport == LiveSettings().transport == "auto"
    choice = TransportChoice("auto", URL)
    assert current(choice) == "tcp"
    assert choice.lost(REFUSED, pictures=False)  # the other one at once
    assert current(choice) == "udp"
    choice.worked()
    assert not choice.lost(SILENT, pictures=True)
    for _ in range(9):  # however long it is away
        assert not choice.lost(AWAY, pictures=False)
        assert current(choice) == "udp"
    assert choice.failure(AWAY) == "unreachable: Connection refused"
    for _ in range(3):
        assert current(choice) == "udp"
        assert not choice.lost(SILENT, pictures=False)  # perhaps it is another camera by now
    assert current(choice) == "tcp"
    assert choice.lost(REFUSED, pictures=False) is False  # both were tried: after a pause
    assert choice.failure(REFUSED) == "unreachable: over TCP: not over that; over UDP: no picture for 5.0 s"


def test_what_is_asked_for_is_kept_and_a_refusal_has_nothing_to_do_with_it() -> None:
    for asked in ("tcp", "udp"):
        choice = TransportChoice(asked, URL)
        assert not choice.lost(REFUSED, pictures=False)
        assert choice.current == asked
    choice = TransportChoice("auto", URL)
    assert not choice.lost(ConnectionLost("refused", "not allowed"), pictures=False)
    assert choice.current == "tcp"
    other = TransportChoice("auto", "http://host/stream")
    assert not other.lost(SILENT, pictures=False)
    assert other.current == "auto"


@pytest.mark.parametrize("only", ["tcp", "udp"])
@pytest.mark.parametrize("guard", [False, True])
def test_a_camera_that_offers_one_transport_is_followed(clip: Path, only: str, guard: bool) -> None:
    with camera(clip, transport=only) as made:
        chosen = guarded(made.port) if guard else options()
        assert chosen.transport == "auto"
        with LiveSource(made.url(), chosen) as source:
            for _ in range(5):
                assert source.read(PATIENCE) is not None
            assert source.status().connections == 1
            assert source._transport.current == only
            made.kill()
            made.start()
            for _ in range(60):
                frame = source.read(PATIENCE)
                assert frame is not None
                if any(event.kind == "reconnect" for event in frame.losses):
                    break
            assert source._transport.current == only


@pytest.mark.parametrize(("only", "asked"), [("udp", "tcp"), ("tcp", "udp")])
def test_a_transport_that_the_camera_does_not_offer_is_named(clip: Path, only: str, asked: str) -> None:
    with camera(clip, transport=only) as made, LiveSource(made.url(), options(transport=asked)) as source:
        assert failure(source) == (
            f"unreachable: the camera does not send its media over {asked.upper()}: "
            f"set transport to auto or {only}"
        )


def test_media_from_another_address_of_the_host_is_hinted_at() -> None:
    """The camera agrees to everything, but its packets come from 127.0.0.2: FFmpeg accepts none."""
    sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sender.bind(("127.0.0.2", 0))

    def answer(method: str, headers: dict[str, str]) -> bytes:
        if method == "DESCRIBE":
            return reply(headers, body=SDP)
        if method == "SETUP":
            ports = headers["transport"].split("client_port=")[1].split(";")[0]
            for number in range(20):
                packet = bytes([0x80, 96, 0, number]) + bytes(8) + bytes([0x65]) + bytes(200)
                sender.sendto(packet, ("127.0.0.1", int(ports.split("-")[0])))
            way = f"Transport: RTP/AVP;unicast;client_port={ports};server_port=6000-6001"
            return reply(headers, "200 OK", "Session: 1", way)
        return reply(headers, "200 OK", "Public: DESCRIBE, SETUP, PLAY")

    with sender, FakeCamera(answer) as fake:
        chosen = guarded(fake.port, transport="udp", open_seconds=1.0, stall_seconds=0.5)
        with LiveSource(f"rtsp://127.0.0.1:{fake.port}/live", chosen) as source:
            said = failure(source)
    assert "no media arrived over UDP from 127.0.0.1" in said
    assert "another of its addresses" in said
    assert "transport tcp" in said
