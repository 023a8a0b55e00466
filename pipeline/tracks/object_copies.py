"""Stored copies of objects' memories: files that are created once and never changed.

    OUT/edits/<id>/copy-<key>.safetensors

A run that repeats frames reads the same bytes again, whatever became of the stream that they came from.
"""

from __future__ import annotations

import hashlib
import re

from pipeline.base.errors import StoreError
from pipeline.storage.files import Files

_NAME = re.compile(r"copy-[0-9a-f]{32}\.safetensors")


class ObjectCopies:
    """The copies that one stream holds.

    Args:
        files: the output folder.
    """

    def __init__(self, files: Files, stream_id: str) -> None:
        self._files, self._stream_id = files, stream_id
        self._folder = f"edits/{stream_id}"

    def add(self, blob: bytes, about: str | None = None) -> str:
        """Store a copy, durably, and return its key. If there is one of that key already, it stays.

        Args:
            about: what the key is made from; None: the bytes themselves.
        """
        key = self.key(blob if about is None else about.encode("utf-8", "surrogatepass"))
        self._files.create(self._name(key), blob, self._stream_id)
        return key

    @staticmethod
    def key(about: bytes) -> str:
        """The key of a copy, 32 hex digits."""
        return hashlib.blake2b(about, digest_size=16).hexdigest()

    def holds(self, key: str) -> bool:
        """Whether there is a copy of this key."""
        return self._files.exists(self._name(key))

    def read(self, key: str) -> bytes:
        """A copy; StoreError if it is missing."""
        name = self._name(key)
        try:
            return self._files.read(name)
        except FileNotFoundError:
            raise StoreError(
                f"{self._files.uri(name)} is missing, which the stream's memory was edited with: restore it "
                "from a copy, or start the stream over"
            ) from None

    def take(self, others: ObjectCopies) -> None:
        """Store the copies of another stream, or of another folder, too."""
        for name in others._names():
            self._files.create(f"{self._folder}/{name.rpartition('/')[2]}", others._files.read(name))

    def remove_all(self) -> None:
        """Remove all copies."""
        for name in self._names():
            self._files.remove(name)
        self._files.remove_empty_folder(self._folder)

    def _names(self) -> list[str]:
        return [n for n in self._files.names(self._folder) if _NAME.fullmatch(n.rpartition("/")[2])]

    def _name(self, key: str) -> str:
        return f"{self._folder}/copy-{key}.safetensors"
