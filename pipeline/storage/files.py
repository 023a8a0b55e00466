"""Durable file operations under one folder, on a local disk or any fsspec URI.

The store needs operations that fsspec does not provide: creating a file without ever overwriting another
(`create`), replacing a file atomically (`replace`), and listings that are never stale. A reader sees a
complete file or none.

How `create` excludes other writers:

* local disk: `local_files.py`.
* object stores: `If-None-Match: *` or the store's own equivalent, through fsspec's `mode="create"`. A server
  that ignores the condition is detected at the first file created, and refused.
* `memory://`: a lock, since it lives in one process.

Requests to a store are retried (`pipeline.storage.retries`). A request whose response was lost may have been
carried out, or may be carried out after the next attempt. `create` then finds the name taken by a file with
the same bytes, which its callers check. On S3 `replace` writes only if the object is still the one it has
seen, so that a late request cannot undo a later one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any


class Files(ABC):
    """Files under one root; names are relative, with forward slashes.

    Every failure is a StoreError of one line; reading a missing file raises FileNotFoundError.
    """

    def __init__(self, root: str) -> None:
        self.root = root

    def uri(self, name: str) -> str:
        """Full name of a file, for messages."""
        return f"{self.root.rstrip('/')}/{name}"

    @abstractmethod
    def create(self, name: str, data: bytes, owner: str = "") -> bool:
        """Create `name` with `data`, durably. Returns False, changing nothing, if the name is taken."""

    @abstractmethod
    def replace(self, name: str, data: bytes, owner: str = "") -> None:
        """Write the whole file `name`, durably, replacing any existing one."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """Return all bytes of a file; FileNotFoundError if there is none."""

    @abstractmethod
    def tail(self, name: str, count: int) -> bytes:
        """Return the last `count` bytes of a file (all if shorter); FileNotFoundError if there is none."""

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Whether a file of this name exists."""

    @abstractmethod
    def names(self, folder: str, recursive: bool = False) -> list[str]:
        """Sorted names of the files in a folder, relative to the root; empty if there is no such folder."""

    @abstractmethod
    def sizes(self, folder: str, recursive: bool = False) -> dict[str, int]:
        """The same files with their sizes in bytes, by name."""

    @abstractmethod
    def folders(self, folder: str) -> list[str]:
        """Names (without those of their parents, sorted) of the folders in a folder."""

    @abstractmethod
    def part(self, name: str, start: int, end: int) -> bytes:
        """Bytes `start` to `end` (exclusive) of a file, which must have them, in one request.

        FileNotFoundError if there is none.
        """

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a file; no error if there is none."""

    @abstractmethod
    def arrow(self, name: str) -> tuple[Any, str]:
        """Return a pyarrow or fsspec file system and the path of `name` on it, to open a pyarrow dataset."""

    @abstractmethod
    def sweep(self, owner: str) -> None:
        """Remove temporary files left by killed writers of `owner`."""

    @abstractmethod
    def remove_empty_folder(self, folder: str) -> None:
        """Remove a folder if it is empty, on file systems where folders are more than prefixes."""
