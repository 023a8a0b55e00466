"""Stream snapshots: everything besides record and rows that is needed to resume from a frame."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import safetensors
import safetensors.torch

_FORMAT = "xmem-stream-snapshot"
_VERSION = 1
# Version for snapshots with the object finder's state. Those without one keep the older version, which older
# releases can read.
_VERSION_WITH_FINDER = 2


@dataclass(frozen=True)
class Snapshot:
    """The state of a stream after frames 0 .. next_frame - 1.

    Args:
        next_frame: the frame to go on with.
        tracker: `TrackerState.to_bytes()`.
        run: digest of the settings, prompts and video that it belongs to.
        previous_pts_seconds: time of frame next_frame - 1, which lets the source seek. None where it must
            not seek: damaged input is decoded from the start.
        previous_size: (height, width) of that frame, None before the first.
        categories: categories of the tracked objects, as [id, category] pairs.
        rows: number of mask records of all those frames.
        losses: number of frames or packets that the source lost so far.
        finder: `ObjectFinder.to_bytes()`: detector, candidates, next id; None on streams without a detector.
    """

    next_frame: int
    tracker: bytes
    run: str
    previous_pts_seconds: float | None
    previous_size: tuple[int, int] | None
    categories: tuple[tuple[int, str | None], ...]
    rows: int
    losses: int
    finder: bytes | None = None

    def to_bytes(self) -> bytes:
        """As safetensors bytes."""
        facts: dict[str, Any] = asdict(self)
        del facts["tracker"], facts["finder"]
        text = json.dumps(facts, sort_keys=True)
        parts = {"tracker": self.tracker}
        if self.finder is not None:
            parts["finder"] = self.finder
        metadata = {
            "format": _FORMAT,
            "version": str(_VERSION if self.finder is None else _VERSION_WITH_FINDER),
            "facts": text,
            "crc32": _checksum(text, *parts.values()),
        }
        return packed(parts, metadata)

    @classmethod
    def from_bytes(cls, blob: bytes) -> Snapshot:
        """The snapshot that `to_bytes` stored. ValueError if the bytes are damaged or something else."""
        try:
            (length,) = struct.unpack_from("<Q", blob)
            metadata = json.loads(blob[8 : 8 + length])["__metadata__"]
            names = {str(_VERSION): ("tracker",), str(_VERSION_WITH_FINDER): ("tracker", "finder")}
            if metadata["format"] != _FORMAT or metadata["version"] not in names:
                raise ValueError(f"format {metadata['format']!r}, version {metadata['version']!r}")
            tensors = safetensors.torch.load(blob)
            parts = {n: tensors[n].numpy().tobytes() for n in names[metadata["version"]]}
            if _checksum(metadata["facts"], *parts.values()) != metadata["crc32"]:
                raise ValueError("checksum does not match")
            facts = json.loads(metadata["facts"])
            size = facts["previous_size"]
            return cls(
                next_frame=facts["next_frame"],
                tracker=parts["tracker"],
                run=facts["run"],
                previous_pts_seconds=facts["previous_pts_seconds"],
                previous_size=None if size is None else (size[0], size[1]),
                categories=tuple((int(i), c) for i, c in facts["categories"]),
                rows=facts["rows"],
                losses=facts["losses"],
                finder=parts.get("finder"),
            )
        except (struct.error, LookupError, TypeError, ValueError, safetensors.SafetensorError) as error:
            raise ValueError(f"damaged or foreign snapshot: {error}") from error


def packed(parts: Mapping[str, bytes], metadata: Mapping[str, str]) -> bytes:
    """Named bytes as tensors of uint8 in a safetensors file, copied once: `safetensors` copies more."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    start = 0
    for name, part in parts.items():
        header[name] = {"dtype": "U8", "shape": [len(part)], "data_offsets": [start, start + len(part)]}
        start += len(part)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join((struct.pack("<Q", len(text)), text, *parts.values()))


def _checksum(facts: str, *parts: bytes) -> str:
    crc = zlib.crc32(facts.encode())
    for number, part in enumerate(parts):
        # The lengths are hashed as well, so that the boundaries between parts count.
        crc = zlib.crc32(part, zlib.crc32(b"%d" % len(part), crc) if number else crc)
    return str(crc)
