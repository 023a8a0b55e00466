"""Durable file operations under one folder, on a local disk or any fsspec URI.

What the store needs and fsspec leaves open: creating a file that never overwrites another (`create`),
replacing one as a whole (`replace`), and listings that are never stale. A reader sees a file complete or not
at all.

How `create` excludes other writers:

* local disk: `local_files.py`.
* object stores: `If-None-Match: *` or the store's own equivalent, through fsspec's `mode="create"`. A server
  that ignores the condition is found out at the first file created, and refused.
* `memory://`: a lock; it lives in one process.

Requests to a store are tried again (`pipeline.storage.retries`). One whose answer was lost may have been
carried out, or may be yet, after the next attempt. `create` is then told that the name is taken, by the same
bytes, as its callers find out; and on S3 `replace` writes only in the place of what it has seen, so that no
request that comes late undoes a later one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any


class Files(ABC):
    """Files under one root; names are relative, with forward slashes.

    Every failure is a StoreError of one line, except that reading what does not exist is FileNotFoundError.
    """

    def __init__(self, root: str) -> None:
        self.root = root

    def uri(self, name: str) -> str:
        """The full name of a file, for messages."""
        return f"{self.root.rstrip('/')}/{name}"

    @abstractmethod
    def create(self, name: str, data: bytes, owner: str = "") -> bool:
        """Creates `name` holding `data`, durably; False, and nothing changed, if the name is taken."""

    @abstractmethod
    def replace(self, name: str, data: bytes, owner: str = "") -> None:
        """Writes `name` as a whole, durably, whether or not it exists."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """All bytes of a file; FileNotFoundError if there is none."""

    @abstractmethod
    def tail(self, name: str, count: int) -> bytes:
        """The last `count` bytes of a file (all of it if shorter); FileNotFoundError if there is none."""

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Whether there is a file of this name."""

    @abstractmethod
    def names(self, folder: str, recursive: bool = False) -> list[str]:
        """Names (relative to the root, sorted) of the files in a folder; none if there is no such folder."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Removes a file; no error if there is none."""

    @abstractmethod
    def arrow(self, name: str) -> tuple[Any, str]:
        """A pyarrow or fsspec file system, and the path of `name` on it: what a pyarrow dataset opens."""

    @abstractmethod
    def sweep(self, owner: str) -> None:
        """Removes temporary files that `owner`'s killed writers left."""

    @abstractmethod
    def remove_empty_folder(self, folder: str) -> None:
        """Removes a folder if it is empty, where folders are more than prefixes."""
