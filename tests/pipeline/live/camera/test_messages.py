"""RTSP messages that the relay passes on, independently of how the bytes are split."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.live.camera.messages import MAX_BODY, Messages, Refusal, Replies, Requests

CAMERA, OWN = "10.20.0.7", "10.20.0.1"


def replies() -> Replies:
    return Replies(camera=CAMERA, own=OWN)


def lines(*text: str, body: bytes = b"") -> bytes:
    return "\r\n".join([*text, "", ""]).encode() + body


OK = lines("RTSP/1.0 200 OK", "CSeq: 1")
SDP = b"v=0\r\n\r\nm=video 0 RTP/AVP 96\r\n$not media\r\n"
DESCRIPTION = lines("RTSP/1.0 200 OK", "CSeq: 2", f"Content-Length: {len(SDP)}", body=SDP)
MEDIA = b"$\x00\x00\x0cRTSP/1.0 302"
NOT_FOUND = lines("RTSP/1.0 404 Not Found", "CSeq: 3")


def test_messages_bodies_and_media_pass_unchanged() -> None:
    stream = OK + DESCRIPTION + MEDIA + NOT_FOUND + MEDIA + OK
    assert replies().feed(stream) == stream


@given(st.lists(st.integers(1, 40), min_size=1))
def test_it_does_not_matter_how_bytes_arrive(cuts: list[int]) -> None:
    stream = OK + DESCRIPTION + MEDIA + NOT_FOUND + MEDIA * 3
    reader, out, at, i = replies(), b"", 0, 0
    while at < len(stream):
        step = cuts[i % len(cuts)]
        out += reader.feed(stream[at : at + step])
        at, i = at + step, i + 1
    assert out == stream


@pytest.mark.parametrize(
    "first",
    [f"RTSP/1.0 {code} Moved" for code in (300, 301, 302, 303, 305, 307, 399)]
    + ["RTSP/2.0 301", "REDIRECT rtsp://10.20.0.7/ RTSP/1.0"],
)
def test_redirects_end_the_connection(first: str) -> None:
    with pytest.raises(Refusal, match="redirects"):
        replies().feed(lines(first, "CSeq: 1", "Location: rtsp://169.254.169.254/"))


@pytest.mark.parametrize("header", ["Location: rtsp://x/", "LOCATION:rtsp://x/", "location :\trtsp://x/"])
def test_a_location_ends_it_with_any_status(header: str) -> None:
    for status in ("200 OK", "401 Unauthorized", "404 Not Found"):
        with pytest.raises(Refusal, match="redirects"):
            replies().feed(lines(f"RTSP/1.0 {status}", "CSeq: 1", header))


def test_a_redirect_hidden_from_a_lazy_reader_is_found() -> None:
    for stream in (
        MEDIA + lines("RTSP/1.0 302 Found"),
        b"\r\n\n\r\n" + lines("RTSP/1.0 302 Found"),
        b"RTSP/1.0 302 Found\n\n",
        OK + b"RTSP/1.0 302 Found\n\r\n",
        DESCRIPTION + lines("RTSP/1.0 302 Found"),
    ):
        with pytest.raises(Refusal, match="redirects"):
            replies().feed(stream)


@pytest.mark.parametrize(
    "stream",
    [
        b"RTSP/1.0 200 OK\r\n$\x00\x00\x10 media in a header\r\n\r\n",
        b"RTSP/1.0 200 OK\r\nCSeq: 1\rLocation: x\r\n\r\n",
        b"RTSP/1.0 200 OK\r\nCSeq: 1\0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: http://x/\r\n\r\n",
        b"RTSP/1.0 2000 OK\r\n\r\n",
        b"RTSP/1.0  302 OK\r\n\r\n",
        b" RTSP/1.0 200 OK\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.2p1\r\n\r\n",
        lines("RTSP/1.0 200 OK", "Content-Length: 5", "Content-Length: 6"),
        lines("RTSP/1.0 200 OK", "Content-Length: -1"),
        lines("RTSP/1.0 200 OK", "Content-Length: 5abc"),
        lines("RTSP/1.0 200 OK", "Content-Length: 0x10"),
        lines("RTSP/1.0 200 OK", f"Content-Length: {MAX_BODY + 1}"),
        lines("RTSP/1.0 200 OK", "X: " + "a" * 2000),
        b"RTSP/1.0 200 OK" + b"a" * 2000,
        lines("RTSP/1.0 200 OK", *["X: y"] * 100),
    ],
)
def test_what_two_readers_could_take_differently_is_refused(stream: bytes) -> None:
    with pytest.raises(Refusal):
        replies().feed(stream)


def test_lines_that_are_no_headers_do_not_pass() -> None:
    passed = replies().feed(
        lines("RTSP/1.0 200 OK", "CSeq: 1", " folded: x", "no colon", "Odd Name: x", "A : b")
    )
    assert passed == lines("RTSP/1.0 200 OK", "CSeq: 1", "A: b")


def test_media_too_short_to_be_any_is_swallowed() -> None:
    """FFmpeg would take its content for the start of a message."""
    assert replies().feed(b"$\x00\x00\x07RTSP/1." + OK) == OK
    assert replies().feed(b"$\x00\x00\x00" + MEDIA) == MEDIA


def transport(value: str) -> str:
    out = replies().feed(lines("RTSP/1.0 200 OK", "CSeq: 3", f"Transport: {value}"))
    return out.decode().split("Transport: ")[1].split("\r\n")[0]


def test_media_over_udp_comes_from_the_camera_to_here() -> None:
    udp = "RTP/AVP;unicast;client_port=5000-5001;server_port=6000-6001"
    with_source = udp + ";source=10.20.0.7"
    assert transport(udp) == with_source
    assert transport(with_source) == with_source
    assert transport(f"{udp};destination={OWN};source={CAMERA};ssrc=1") == f"{udp};ssrc=1;source={CAMERA}"
    for elsewhere in (
        "source=10.20.0.8",
        "source=127.0.0.1",
        "source=camera.example",
        "SOURCE=169.254.169.254",
        "source = 8.8.8.8",
        "destination=10.20.0.9",
        "destination=239.1.1.1",
        "source=",
    ):
        with pytest.raises(Refusal, match="another address"):
            transport(f"{udp};{elsewhere}")
    for wrong in (udp + ";multicast", udp.replace("unicast", "multicast"), f"{udp},{with_source}"):
        with pytest.raises(Refusal):
            transport(wrong)


def test_media_within_the_connection_needs_no_addresses() -> None:
    tcp = "RTP/AVP/TCP;unicast;interleaved=0-1;ssrc=12"
    assert transport(f"{tcp};source=192.168.1.10;destination=172.16.0.1") == tcp


def test_only_the_client_that_knows_the_token_is_served() -> None:
    known = lines("OPTIONS rtsp://127.0.0.1:1/ RTSP/1.0", "CSeq: 1", "User-Agent: token")
    passed = Requests("token").feed(known)
    assert passed == known.replace(b"token", b"xmem")
    for wrong in (
        lines("OPTIONS rtsp://127.0.0.1:1/ RTSP/1.0", "CSeq: 1"),
        lines("OPTIONS rtsp://127.0.0.1:1/ RTSP/1.0", "User-Agent: other"),
        lines("OPTIONS rtsp://127.0.0.1:1/ RTSP/1.0", "User-Agent: token", "User-Agent: token2"),
        lines("GET / HTTP/1.1", "User-Agent: token"),
    ):
        with pytest.raises(Refusal):
            Requests("token").feed(wrong)
    answer = lines("RTSP/1.0 501 Not Implemented")
    assert Requests("token").feed(answer) == answer
    assert Requests("token").feed(MEDIA) == MEDIA


def as_ffmpeg_reads(data: bytes) -> list[tuple[int, dict[str, str]]]:
    """Status and headers of each message, read as leniently as FFmpeg's client reads before it plays."""
    found: list[tuple[int, dict[str, str]]] = []
    at = 0
    while True:
        status, headers, line, count = 0, dict[str, str](), b"", 0
        while True:
            if at >= len(data):
                return found
            byte = data[at : at + 1]
            at += 1
            if byte == b"\n":
                if not line:
                    break
                text = line.decode("latin-1")
                if count == 0:
                    words = text.split()
                    digits = words[1] if len(words) > 1 and words[0].startswith("RTSP/") else "0"
                    status = int("".join(c for c in digits[:3] if c in "0123456789") or 0)
                else:
                    name, _, value = text.partition(":")
                    headers[name.lower()] = value.strip()
                count, line = count + 1, b""
            elif byte == b"$" and not line:
                at += 3 + int.from_bytes(data[at + 1 : at + 3], "big")
            elif byte != b"\r":
                line += byte
        length = headers.get("content-length", "0")
        found.append((status, headers))
        digits = length[: len(length) - len(length.lstrip("0123456789"))]
        at += int(digits or 0)


pieces = st.sampled_from(
    [b"RTSP/1.0 302 Found", b"RTSP/1.0 200 OK", b"Location: rtsp://x/", b"CSeq: 1", b"Content-Length: 4",
     b"Content-Length: 9", b"$", b"\0", b"$\x00\x00\x04", b"$\x00\x00\x20", b"\r\n", b"\n", b"\r", b" ", b":",
     b"\r\n\r\n", b"REDIRECT * RTSP/1.0", b"a" * 8, b"OPTIONS * RTSP/1.0", OK, MEDIA]
)  # fmt: skip


@settings(max_examples=500)
@given(st.lists(st.one_of(pieces, st.binary(max_size=12)), max_size=24))
def test_ffmpeg_never_sees_a_redirect(stream: list[bytes]) -> None:
    reader: Messages = replies()
    out = b""
    for piece in stream:
        try:
            out += reader.feed(piece)
        except Refusal:
            break
    for status, headers in as_ffmpeg_reads(out):
        assert not 300 <= status < 400
        assert "location" not in headers


def test_the_lenient_reader_would_see_one() -> None:
    sneaky = b"RTSP/1.0 200 OK\r\n\r\n$\x00\x00\x02abRTSP/1.0\r 302 x\nLocation: rtsp://x/\n\n"
    assert [status for status, _ in as_ffmpeg_reads(sneaky)] == [200, 302]
