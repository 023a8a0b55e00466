"""What decides a stream's rows: model, sizes, memory, chunks. In the stream record, compared on resume."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline.errors import UsageError
from xmem_core import MemoryConfig, VideoSegmenter

DTYPES = ("float32", "bfloat16", "float16")
AUTO = "auto"
"""Instead of one of `DTYPES`: what suits machine and model, see `pipeline.executor.open_segmenter`."""
MIN_SIZE = 16

# Snapshots may come as often as one likes. A model may be called by another name: its weights count.
_INDIFFERENT = ("snapshot_chunks", "model")
# Without a detector these mean nothing; and streams of before there were any go on as they began.
_OF_DETECTOR = ("detector", "detect_every", "detect_confirmations", "max_objects", "out_of_sight_frames")


def dtype_name(segmenter: VideoSegmenter) -> str:
    """One of `DTYPES`: what a segmenter computes in."""
    return str(segmenter.dtype).removeprefix("torch.")


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
        detector: who finds new objects by itself, see `pipeline.detectors`; None: nobody does.
        detect_every: frames from one look of the detector to the next.
        detect_confirmations: looks that must find a thing before it becomes an object.
        max_objects: the detector starts no object while there are so many.
        out_of_sight_frames: an object that the detector started is given up when it has not been visible for
            more frames than that.
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
    detector: str | None = None
    detect_every: int = 5
    detect_confirmations: int = 3
    max_objects: int = 8
    out_of_sight_frames: int = 250

    def __post_init__(self) -> None:
        for name in ("threads", "chunk_frames", "snapshot_chunks", "max_frames", *_OF_DETECTOR[1:]):
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
    without = _OF_DETECTOR if values.get("detector") is None else ()
    for name, value in values.items():
        if name in _INDIFFERENT or name in without:
            continue
        if isinstance(value, Mapping):
            flat.update({f"{name}.{inner}": v for inner, v in value.items()})
        else:
            flat[name] = value
    return flat
