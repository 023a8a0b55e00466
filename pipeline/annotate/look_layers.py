"""Display settings of a project: the look chosen last, and the pictures that it uses as layers.

OUT/annotate/<stream>/layers/<digest>       one picture each, created and never replaced
OUT/annotate/<stream>/look.json             the look chosen last
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import threading
from collections.abc import Mapping
from typing import Any

from pipeline.annotate import models
from pipeline.annotate.project import project_folder
from pipeline.base.errors import UsageError
from pipeline.draw.look import Layer, Look
from pipeline.storage.files import Files

log = logging.getLogger(__name__)

_DIGEST = re.compile(r"[0-9a-f]{20}")


class LookLayers:
    """The layers of one project, and the look chosen last. Thread-safe.

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

    def keep(self, look: Mapping[str, Any]) -> None:
        """Store the look chosen last, as the page's requests give it."""
        self._files.replace(self._look, json.dumps(look).encode(), self._stream_id)

    def kept(self) -> dict[str, Any] | None:
        """The look chosen last; None if there is none that can be shown."""
        try:
            look = models.Look.model_validate_json(self._files.read(self._look))
            layer = None if look.layer is None else self.get(look.layer)
            if look.overlay is not None:
                used = layer if look.overlay == "layered" else None
                Look(look.overlay, look.opacity, look.outlines, look.ids, None, {}, used, look.layer_place)
            return look.model_dump()
        except FileNotFoundError:
            return None
        except (UsageError, ValueError, TypeError, AttributeError) as error:
            log.warning("the look of %s is not used again: %s", self._stream_id, error)
            return None

    @property
    def _look(self) -> str:
        return f"{project_folder(self._stream_id)}/look.json"

    def _name(self, digest: str) -> str:
        return f"{project_folder(self._stream_id)}/layers/{digest}"
