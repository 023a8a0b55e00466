"""Snapshots are restored completely or rejected."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipeline.tracking.snapshots.stream import Snapshot

SNAPSHOT = Snapshot(
    next_frame=4200,
    tracker=bytes(range(256)) * 8,
    run="5f" * 16,
    previous_pts_seconds=168.04,
    previous_size=(122, 158),
    categories=((3, "Läufer 走"), (70000, None)),
    rows=12345,
    losses=2,
)


WITH_FINDER = replace(SNAPSHOT, finder=b"what a detector remembers" * 3)


@pytest.mark.parametrize(
    "snapshot",
    [
        SNAPSHOT,
        WITH_FINDER,
        replace(SNAPSHOT, next_frame=0, previous_pts_seconds=None, previous_size=None, categories=()),
    ],
)
def test_it_comes_back(snapshot: Snapshot) -> None:
    assert Snapshot.from_bytes(snapshot.to_bytes()) == snapshot


def test_without_a_finder_it_is_written_as_ever() -> None:
    assert b'"version":"1"' in SNAPSHOT.to_bytes()
    assert b'"version":"2"' in WITH_FINDER.to_bytes()


@pytest.mark.parametrize("snapshot", [SNAPSHOT, WITH_FINDER])
def test_any_changed_byte_is_noticed(snapshot: Snapshot) -> None:
    """The checksum covers the metadata, too: a wrong category would change rows."""
    blob = snapshot.to_bytes()
    unnoticed = []
    for position in range(len(blob)):
        damaged = bytearray(blob)
        damaged[position] ^= 1
        try:
            found = Snapshot.from_bytes(bytes(damaged))
        except ValueError:
            continue
        if found != snapshot:
            unnoticed.append(position)
    assert not unnoticed


@pytest.mark.parametrize("length", [0, 7, 8, 100, -1])
def test_what_was_cut_off_is_noticed(length: int) -> None:
    with pytest.raises(ValueError, match="damaged or foreign snapshot"):
        Snapshot.from_bytes(SNAPSHOT.to_bytes()[:length])
