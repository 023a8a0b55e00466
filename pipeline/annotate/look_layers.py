"""Pictures that the annotator lays over frames, kept with the project.

OUT/annotate/<stream>/layers/<digest>       one picture each, created and never replaced
"""

from __future__ import annotations

import hashlib
import re
import threading

from pipeline.annotate.project import project_folder
from pipeline.base.errors import UsageError
from pipeline.draw.look import Layer
from pipeline.storage.files import Files

_DIGEST = re.compile(r"[0-9a-f]{20}")


class LookLayers:
    """The layers of one project. Thread-safe.

    Args:
        files: the output folder.
        stream_id: its stream.
    """

    def __init__(self, files: Files, stream_id: str) -> None:
        self._files, self._stream_id = files, stream_id
        self._newest: tuple[str, Layer] | None = None
        self._lock = threading.Lock()

    def add(self, data: bytes) -> str:
        """Store a picture; durable when its digest is returned. UsageError if it cannot be a layer."""
        layer = Layer.decode(data, "the picture")
        digest = hashlib.blake2b(data, digest_size=10).hexdigest()
        self._files.create(self._name(digest), data, self._stream_id)
        with self._lock:
            self._newest = digest, layer
        return digest

    def get(self, digest: str) -> Layer:
        """The layer of a digest; UsageError if there is none."""
        with self._lock:
            if self._newest is not None and self._newest[0] == digest:
                return self._newest[1]
        if not _DIGEST.fullmatch(digest):
            raise UsageError(f"layer {digest[:40]!r} is not known: choose its file again")
        try:
            data = self._files.read(self._name(digest))
        except FileNotFoundError:
            raise UsageError(f"layer {digest!r} is not known: choose its file again") from None
        layer = Layer.decode(data, "the layer")
        with self._lock:
            self._newest = digest, layer
        return layer

    def _name(self, digest: str) -> str:
        return f"{project_folder(self._stream_id)}/layers/{digest}"
