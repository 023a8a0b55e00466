"""The packet index: its predictions, and rejection of unreliable timestamps."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from pipeline.video import packet_index as packets
from pipeline.video.packet_index import MAX_REORDER, build


@dataclass
class Packet:
    pts: int | None
    dts: int | None = None
    size: int = 100
    is_keyframe: bool = False
    is_corrupt: bool = False
    is_discard: bool = False


def group(start: int) -> list[Packet]:
    """An open GOP of four: the keyframe, two leading pictures shown before it, and two after it."""
    return [
        Packet(start + 2, start, 900, is_keyframe=True),
        Packet(start, start + 1, 30),
        Packet(start + 1, start + 2, 30),
        Packet(start + 3, start + 3, 300),
    ]


def stream(groups: int) -> list[Packet]:
    return [Packet(0, -1, is_keyframe=True), *(p for i in range(groups) for p in group(1 + 4 * i))]


def test_keyframes_and_ranks() -> None:
    index = build(stream(3), 100)
    assert index is not None
    assert index.complete
    assert list(index.order) == list(range(13))
    assert list(index.keyframes) == [0, 1, 5, 9]
    assert [index.rank(k) for k in index.keyframes] == [0, 3, 7, 11]
    # frames 1 and 2 lead the keyframe shown as frame 3: only the one before it gets at them
    assert [index.keyframe_before(f) for f in range(13)] == [0, 0, 0, 1, 1, 1, 1, 5, 5, 5, 5, 9, 9]
    assert [index.keyframe_before(f, 1) for f in (2, 3, 7, 12)] == [None, 0, 1, 5]
    assert index.covers(12)
    assert not index.covers(13)


def test_a_partial_index_is_certain_only_so_far() -> None:
    read = 0

    def counted() -> Iterator[Packet]:
        nonlocal read
        for packet in stream(1000):
            read += 1
            yield packet

    index = build(counted(), 50)
    assert index is not None
    assert not index.complete
    assert read == 50 + 2 * MAX_REORDER
    assert index.covers(50)
    assert index.frames_known == 50 + MAX_REORDER


def test_edited_out_packets_are_no_frames() -> None:
    hidden = [Packet(-2, -3, is_keyframe=True, is_discard=True), Packet(-1, -2, is_discard=True)]
    index = build([*hidden, *stream(2)], 100)
    assert index is not None
    assert list(index.order) == list(range(9))
    assert index.rank(index.positions[0]) == 0
    assert index.keyframe_before(0) == 2


def test_empty_packets_do_not_count() -> None:
    index = build([*stream(1), Packet(None, size=0)], 100)
    assert index is not None
    assert len(index.pts) == 5


@pytest.mark.parametrize(
    "spoilt",
    [
        [],
        [*stream(1), Packet(None, 9)],
        [*stream(1), Packet(3, 9)],
        [*stream(1), Packet(9, 3)],
        [*stream(1), Packet(9, 9, is_corrupt=True)],
        stream(2)[2:],
        [Packet(i, i) for i in range(20)],
        [Packet(t, None, is_keyframe=True) for t in (*range(100, 300), *range(0, 90))],
    ],
    ids=["none", "no pts", "pts twice", "dts goes back", "corrupt", "starts late", "no keyframe", "restart"],
)
def test_untrustworthy_timestamps(spoilt: list[Packet]) -> None:
    assert packets.build(spoilt, 400) is None
