"""Snapshot of a live stream: a stream snapshot plus clock and request state."""

from __future__ import annotations

import json
import struct
import zlib
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import safetensors
import safetensors.torch

from pipeline.tracking.snapshots.stream import Snapshot, packed

_FORMAT = "xmem-live-snapshot"
_VERSION = "1"


@dataclass(frozen=True)
class LiveSnapshot:
    """The state of a live stream after the frames before `stream.next_frame`.

    Args:
        stream: the snapshot of the tracker, as for files.
        wall_time: wall time of the last tracked frame; None before the first.
        applied: number of the last request applied to this state.
        paused: whether the stream is paused.
    """

    stream: Snapshot
    wall_time: datetime | None
    applied: int
    paused: bool = False

    def to_bytes(self) -> bytes:
        """As safetensors bytes."""
        inner = self.stream.to_bytes()
        facts: dict[str, Any] = {
            "wall_time": None if self.wall_time is None else self.wall_time.isoformat(),
            "applied": self.applied,
            "paused": self.paused,
        }
        text = json.dumps(facts, sort_keys=True)
        metadata = {"format": _FORMAT, "version": _VERSION, "facts": text, "crc32": _checksum(text)}
        return packed({"stream": inner}, metadata)

    @classmethod
    def from_bytes(cls, blob: bytes) -> LiveSnapshot:
        """Restore from the output of `to_bytes`. ValueError if the bytes are damaged or of another format."""
        try:
            (length,) = struct.unpack_from("<Q", blob)
            metadata = json.loads(blob[8 : 8 + length])["__metadata__"]
            if (metadata["format"], metadata["version"]) != (_FORMAT, _VERSION):
                raise ValueError(f"format {metadata['format']!r}, version {metadata['version']!r}")
            if metadata["crc32"] != _checksum(metadata["facts"]):
                raise ValueError("checksum does not match")
            facts = json.loads(metadata["facts"])
            wall = facts["wall_time"]
            inner = safetensors.torch.load(blob)["stream"].numpy().tobytes()
            return cls(
                Snapshot.from_bytes(inner),
                None if wall is None else datetime.fromisoformat(wall),
                int(facts["applied"]),
                bool(facts["paused"]),
            )
        except (struct.error, LookupError, TypeError, ValueError, safetensors.SafetensorError) as error:
            raise ValueError(f"damaged or foreign snapshot of a live stream: {error}") from error


def _checksum(facts: str) -> str:
    return str(zlib.crc32(facts.encode()))
