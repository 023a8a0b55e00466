"""ObjectCopy: what a state remembers of one object, to be given to another state of the same model.

A copy has no grid and no times: it can go into the state of a video of any size.
"""

from __future__ import annotations

import json
import struct
import zlib
from dataclasses import dataclass
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

_FORMAT = "xmem-object-copy"
_VERSION = "1"
MOST_ELEMENTS = 4096
"""Elements of a copy at most: two whole frames at 480p, and as many prototypes as one consolidation makes."""


@dataclass(frozen=True, eq=False)
class ObjectCopy:
    """Elements of one object, and what its model keeps of it besides.

    Args:
        model_fingerprint: fingerprint of the model whose features they are.
        hidden_dim: channels of the model's sensory memory, which is not copied; 0 without one.
        key: (N, C_k) float32
        shrinkage: (N,) float32
        value: (N, C_v) float32
        summary: accumulated summary of Cutie's objects, (Q, C + 1) float32; None for XMem.
    """

    model_fingerprint: str
    hidden_dim: int
    key: Tensor
    shrinkage: Tensor
    value: Tensor
    summary: Tensor | None = None

    def __repr__(self) -> str:
        return f"ObjectCopy({len(self.key)} elements, model {self.model_fingerprint[:8]})"

    def to_bytes(self) -> bytes:
        """As safetensors bytes; equal copies have equal bytes."""
        tensors = {"key": self.key, "shrinkage": self.shrinkage, "value": self.value}
        if self.summary is not None:
            tensors["summary"] = self.summary
        tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        facts = {"model_fingerprint": self.model_fingerprint, "hidden_dim": self.hidden_dim}
        # One entry of metadata, since safetensors writes several in random order.
        text = json.dumps({"version": _VERSION, "crc32": _checksum(tensors), **facts}, sort_keys=True)
        return safetensors.torch.save(tensors, {_FORMAT: text})

    @classmethod
    def from_bytes(cls, blob: bytes) -> ObjectCopy:
        """Restore a copy from `to_bytes`'s output; ValueError for anything else."""
        try:
            (length,) = struct.unpack_from("<Q", blob)
            facts: dict[str, Any] = json.loads(json.loads(blob[8 : 8 + length])["__metadata__"][_FORMAT])
            if facts["version"] != _VERSION:
                raise ValueError(f"version {facts['version']!r}: this release reads {_VERSION!r}")
            tensors = safetensors.torch.load(blob)
            if _checksum(tensors) != facts["crc32"]:
                raise ValueError("its checksum does not match")
            key, shrinkage, value = tensors["key"], tensors["shrinkage"], tensors["value"]
            if key.ndim != 2 or value.ndim != 2 or not len(key) == len(value) == len(shrinkage) > 0:
                raise ValueError(f"shapes {[tuple(t.shape) for t in (key, shrinkage, value)]}")
            summary = tensors.get("summary")
            return cls(
                str(facts["model_fingerprint"]), int(facts["hidden_dim"]), key, shrinkage, value, summary
            )
        except (struct.error, LookupError, TypeError, ValueError, safetensors.SafetensorError) as error:
            raise ValueError(f"damaged or foreign copy of an object: {error}") from error


def _checksum(tensors: dict[str, Tensor]) -> int:
    crc = 0
    for name in sorted(tensors):
        tensor = tensors[name]
        crc = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.numpy().tobytes(), crc)
    return crc
