"""Keyframes that arrive in several packets are joined."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from support.videos import make_video

from pipeline.live.camera.access_units import Joiner, continues


def annex_b(*units: bytes) -> bytes:
    return b"".join(b"\0\0\0\1" + unit for unit in units)


PARAMETERS = (b"\x67\x42\x00\x1e\x00", b"\x68\xce\x00")


@pytest.mark.parametrize(
    ("codec", "data", "expected"),
    [
        ("h264", annex_b(b"\x65\x88\x80"), False),  # first_mb_in_slice is 0
        ("h264", annex_b(b"\x65\x1f\x80"), True),
        ("h264", annex_b(*PARAMETERS, b"\x65\x1f\x80"), True),
        ("h264", annex_b(*PARAMETERS, b"\x65\x88\x80", b"\x65\x1f"), False),
        ("h264", annex_b(b"\x41\x1f"), True),
        ("h264", annex_b(*PARAMETERS), False),
        ("h264", b"", False),
        ("h264", annex_b(b"\x65"), False),  # cut off
        ("h264", annex_b(b"\x06" + b"\xff" * 5000, b"\x65\x1f"), False),  # too far behind
        ("hevc", annex_b(b"\x40\x01\x0c", b"\x26\x01\xaf"), False),
        ("hevc", annex_b(b"\x40\x01\x0c", b"\x26\x01\x2f"), True),
        ("vp8", annex_b(b"\x65\x1f"), False),
    ],
)
def test_continues(codec: str, data: bytes, expected: bool) -> None:
    assert continues(codec, data) is expected


def sliced(folder: Path) -> tuple[list[Any], list[np.ndarray[Any, Any]]]:
    """Packets of pictures with four slices each, as received over RTSP, and the pictures."""
    clip = make_video(folder / "sliced.ts", 24, gop=6, options={"slices": "4"})
    with av.open(str(clip)) as container:
        packets = [p for p in container.demux(video=0) if p.size]
    with av.open(str(clip)) as container:
        pictures = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    return packets, pictures


def in_pieces(packet: Any) -> list[Any]:
    """A keyframe's packet split into two, between slices."""
    data = bytes(packet)
    slices = [m.start() for m in re.finditer(rb"\x00\x00\x01[\x65\x25\x45]", data)]
    assert len(slices) == 4
    parts = []
    for part in (data[: slices[2]], data[slices[2] :]):
        made = av.Packet(part)
        made.pts, made.dts, made.time_base, made.is_keyframe = packet.pts, packet.dts, packet.time_base, True
        parts.append(made)
    return parts


def test_keyframes_in_pieces_become_whole_again(tmp_path: Path) -> None:
    packets, pictures = sliced(tmp_path)
    pieces = [part for p in packets for part in (in_pieces(p) if p.is_keyframe else [p])]
    assert len(pieces) == len(packets) + 4
    pieces[0].pts = pieces[0].dts = None  # as the first packet of a connection may be
    joiner = Joiner("h264", "rtsp")
    joined = [whole for part in pieces for whole in joiner.take(part)] + joiner.rest()
    assert [bytes(p) for p in joined] == [bytes(p) for p in packets]
    assert [p.pts for p in joined] == [p.pts for p in packets]
    assert [p.is_keyframe for p in joined] == [p.is_keyframe for p in packets]
    decoder = av.CodecContext.create("h264", "r")
    decoder.thread_count, decoder.thread_type = 1, "NONE"
    shown = [f for p in [*joined, None] for f in decoder.decode(p)]
    assert not any(f.is_corrupt for f in shown)
    for got, wanted in zip(shown, pictures, strict=True):
        np.testing.assert_array_equal(got.to_ndarray(format="rgb24"), wanted)


def test_whole_keyframes_are_held_back_only_once(tmp_path: Path) -> None:
    packets, _ = sliced(tmp_path)
    joiner = Joiner("h264", "rtsp")
    given = [len(joiner.take(packet)) for packet in packets]
    assert given == [0, 2, *[1] * 22]
    assert joiner.rest() == []


def test_a_picture_that_lost_its_beginning_is_no_part_of_the_keyframe() -> None:
    joiner = Joiner("h264", "rtsp")
    key, torn = av.Packet(annex_b(b"\x65\x88\x80")), av.Packet(annex_b(b"\x41\x1f"))
    key.is_keyframe = True
    assert joiner.take(key) == []
    assert joiner.take(torn) == [key, torn]
    assert joiner.take(key) == [key]


def test_what_is_not_known_passes_untouched(tmp_path: Path) -> None:
    packets, _ = sliced(tmp_path)
    for codec, container in (("h264", "hls"), ("mjpeg", "rtsp")):
        joiner = Joiner(codec, container)
        assert all(joiner.take(packet) == [packet] for packet in packets)


def test_a_picture_without_end_is_not_gathered_for_ever() -> None:
    joiner = Joiner("h264", "rtsp")
    first = av.Packet(annex_b(b"\x65\x88\x80"))
    first.is_keyframe = True
    assert joiner.take(first) == []
    part = av.Packet(annex_b(b"\x65\x1f" + bytes(1 << 20)))
    part.is_keyframe = True
    given: list[Any] = []
    for _ in range(40):
        given += joiner.take(part)
    assert max(packet.size for packet in given) <= 16 << 20
    assert len(given) > 20
