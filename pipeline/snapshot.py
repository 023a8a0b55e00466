"""A snapshot: all that a stream needs, besides its record and its rows, to go on from a frame."""

from __future__ import annotations

import json
import struct
import zlib
from dataclasses import asdict, dataclass
from typing import Any

import safetensors
import safetensors.torch
import torch

_FORMAT = "xmem-stream-snapshot"
_VERSION = 1


@dataclass(frozen=True)
class Snapshot:
    """The state of a stream after frames 0 .. next_frame - 1.

    Args:
        next_frame: the frame to go on with.
        tracker: `TrackerState.to_bytes()`.
        run: which settings, prompts and video it belongs to: a digest.
        previous_pts_seconds: of frame next_frame - 1; lets the source seek. None where it must not: damaged
            input is decoded from the start.
        previous_size: (height, width) of that frame, None before the first.
        categories: of the living objects, as [id, category] pairs.
        rows: mask records of all those frames.
        losses: frames or packets that the source lost on the way.
    """

    next_frame: int
    tracker: bytes
    run: str
    previous_pts_seconds: float | None
    previous_size: tuple[int, int] | None
    categories: tuple[tuple[int, str | None], ...]
    rows: int
    losses: int

    def to_bytes(self) -> bytes:
        """As safetensors bytes."""
        facts: dict[str, Any] = asdict(self)
        del facts["tracker"]
        text = json.dumps(facts, sort_keys=True)
        metadata = {
            "format": _FORMAT,
            "version": str(_VERSION),
            "facts": text,
            "crc32": _checksum(text, self.tracker),
        }
        tracker = torch.frombuffer(bytearray(self.tracker), dtype=torch.uint8)
        return safetensors.torch.save({"tracker": tracker}, metadata)

    @classmethod
    def from_bytes(cls, blob: bytes) -> Snapshot:
        """The snapshot that `to_bytes` stored. ValueError if the bytes are damaged or something else."""
        try:
            (length,) = struct.unpack_from("<Q", blob)
            metadata = json.loads(blob[8 : 8 + length])["__metadata__"]
            if (metadata["format"], metadata["version"]) != (_FORMAT, str(_VERSION)):
                raise ValueError(f"format {metadata['format']!r}, version {metadata['version']!r}")
            tracker = safetensors.torch.load(blob)["tracker"].numpy().tobytes()
            if _checksum(metadata["facts"], tracker) != metadata["crc32"]:
                raise ValueError("checksum does not match")
            facts = json.loads(metadata["facts"])
            size = facts["previous_size"]
            return cls(
                next_frame=facts["next_frame"],
                tracker=tracker,
                run=facts["run"],
                previous_pts_seconds=facts["previous_pts_seconds"],
                previous_size=None if size is None else (size[0], size[1]),
                categories=tuple((int(i), c) for i, c in facts["categories"]),
                rows=facts["rows"],
                losses=facts["losses"],
            )
        except (struct.error, LookupError, TypeError, ValueError, safetensors.SafetensorError) as error:
            raise ValueError(f"damaged or foreign snapshot: {error}") from error


def _checksum(facts: str, tracker: bytes) -> str:
    return str(zlib.crc32(tracker, zlib.crc32(facts.encode())))
