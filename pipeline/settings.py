"""What decides a stream's rows: model, sizes, memory, chunks. In the stream record, compared on resume."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline.errors import UsageError
from xmem_core import MemoryConfig

DTYPES = ("float32", "bfloat16", "float16")
MIN_SIZE = 16

# Snapshots may come as often as one likes. A model may be called by another name: its weights count.
_INDIFFERENT = ("snapshot_chunks", "model")


@dataclass(frozen=True)
class TrackSettings:
    """Settings of one stream.

    Args:
        model: name or path given to `xmem_core.load_model`.
        model_fingerprint: of the weights it stood for.
        memory: memory settings.
        size: shorter side that the network sees, in pixels; None: frames as they are.
        dtype: one of `DTYPES`.
        threads: CPU threads of the network. Another number changes the last bits of its results, so a stream
            keeps the number it began with.
        chunk_frames: frames per commit.
        snapshot_chunks: commits between two snapshots of the tracker's state.
        max_frames: track no more than so many frames; None: all.
        box_segmenter: who turns boxes into masks.
    """

    model: str
    model_fingerprint: str
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    size: int | None = None
    dtype: str = "float32"
    threads: int = 1
    chunk_frames: int = 100
    snapshot_chunks: int = 4
    max_frames: int | None = None
    box_segmenter: str = "grabcut"

    def __post_init__(self) -> None:
        for name in ("threads", "chunk_frames", "snapshot_chunks", "max_frames"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name}={value} is not allowed: at least 1")
        if self.size is not None and self.size < MIN_SIZE:
            raise UsageError(f"size={self.size} is not allowed: at least {MIN_SIZE} pixels")
        if self.dtype not in DTYPES:
            raise UsageError(f"dtype={self.dtype!r} is not allowed: choose one of {', '.join(DTYPES)}")

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict that `from_dict` takes back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrackSettings:
        """Build from `to_dict`'s output."""
        return cls(**{**values, "memory": MemoryConfig.from_dict(values["memory"])})

    def decisive(self) -> dict[str, Any]:
        """Those that change rows, as a flat dict."""
        return _decisive(self.to_dict())

    def differences(self, stored: Mapping[str, Any]) -> list[str]:
        """How settings of a record differ from these, one short phrase each; only what changes rows."""
        own, other = self.decisive(), _decisive(stored)
        return [
            f"{name} was {other.get(name)!r}, now {own.get(name)!r}"
            for name in sorted(set(own) | set(other))
            if own.get(name) != other.get(name)
        ]


def _decisive(values: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if name in _INDIFFERENT:
            continue
        if isinstance(value, Mapping):
            flat.update({f"{name}.{inner}": v for inner, v in value.items()})
        else:
            flat[name] = value
    return flat
