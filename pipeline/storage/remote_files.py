"""Files on fsspec file systems: create-only commits, retries and errors that name the location."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from fsspec.implementations.memory import MemoryFileSystem

from pipeline.base.errors import OutputError, StoreError, bare_reason
from pipeline.base.redaction import shareable
from pipeline.storage.files import Files
from pipeline.storage.filesystems import is_s3
from pipeline.storage.retries import ShortAnswerError, http_status, retry


class RemoteFiles(Files):
    """Files on an object store or any other fsspec file system.

    Args:
        root: URI of the folder.
        fs, path: its file system, and the path on it.
        for_arrow: creates the file system that pyarrow reads with, which retries by itself; default: `fs`.
    """

    def __init__(self, root: str, fs: Any, path: str, for_arrow: Callable[[], Any] | None = None) -> None:
        super().__init__(root)
        self._fs = fs
        self._path = path.rstrip("/")
        self._for_arrow = for_arrow
        self._is_s3 = is_s3(fs)
        self._is_memory = isinstance(fs, MemoryFileSystem)
        self._exclusive_checked = self._is_memory

    def create(self, name: str, data: bytes, owner: str = "") -> bool:
        for attempt in range(_CREATE_ATTEMPTS):
            outcome = self._attempt("write", name, lambda: self._create_once(name, data))
            if outcome is not None:
                if outcome and not self._exclusive_checked:
                    self._check_exclusive(name, data)
                return outcome
            # 409: another request for the same name was under way; the winner is known in a moment.
            time.sleep(0.1 * 2**attempt)
        raise StoreError(
            f"cannot write {self.uri(name)}: other writers kept writing the same name; try again"
        )

    def replace(self, name: str, data: bytes, owner: str = "") -> None:
        if not self._is_s3:
            self._attempt("write", name, lambda: self._put(name, data, "overwrite"))
            return
        for _ in range(_REPLACE_ATTEMPTS):
            if self._attempt("write", name, lambda: self._create_once(name, data)):
                return
            seen = self._attempt("read", name, lambda: self._etag(name))
            if seen is None:
                continue
            if self._attempt("write", name, partial(self._put_over, name, data, seen)):
                return
        raise StoreError(
            f"cannot write {self.uri(name)}: other writers kept writing the same name; try again"
        )

    def read(self, name: str) -> bytes:
        def fetch() -> bytes:
            size = self._size(name)
            return _whole(self._fs.cat_file(self._full(name)), size)

        return self._attempt("read", name, fetch)

    def tail(self, name: str, count: int) -> bytes:
        def fetch() -> bytes:
            # A plain suffix range (start=-count) fails on some servers when the file is shorter.
            size = self._size(name)
            first = max(0, size - count)
            return _whole(self._fs.cat_file(self._full(name), start=first, end=size), size - first)

        return self._attempt("read", name, fetch)

    def exists(self, name: str) -> bool:
        def look() -> bool:
            try:
                return bool(self._fs.info(self._full(name))["type"] == "file")
            except FileNotFoundError:
                return False

        return self._attempt("read", name, look)

    def names(self, folder: str, recursive: bool = False) -> list[str]:
        return list(self.sizes(folder, recursive))

    def sizes(self, folder: str, recursive: bool = False) -> dict[str, int]:
        def look() -> list[tuple[str, int]]:
            path = self._full(folder)
            try:
                if recursive:
                    found = self._fs.find(path, detail=True).values()
                else:
                    found = [e for e in self._fs.ls(path, detail=True) if e["type"] == "file"]
            except FileNotFoundError:
                return []
            return [(str(e["name"]), int(e["size"] or 0)) for e in found]

        # Some servers list a placeholder for the folder itself.
        found = [(self._relative(path), size) for path, size in self._attempt("list", folder, look)]
        return dict(sorted((n, s) for n, s in found if n.startswith(folder + "/") and not n.endswith("/")))

    def folders(self, folder: str) -> list[str]:
        def look() -> list[str]:
            try:
                entries = self._fs.ls(self._full(folder), detail=True)
            except FileNotFoundError:
                return []
            return [str(e["name"]) for e in entries if e["type"] == "directory"]

        found = [self._relative(path).rstrip("/") for path in self._attempt("list", folder, look)]
        return sorted(n.rpartition("/")[2] for n in found if n.startswith(folder + "/"))

    def part(self, name: str, start: int, end: int) -> bytes:
        def fetch() -> bytes:
            return _whole(self._fs.cat_file(self._full(name), start=start, end=end), end - start)

        return self._attempt("read", name, fetch)

    def remove(self, name: str) -> None:
        def remove() -> None:
            with suppress(FileNotFoundError):
                self._fs.rm_file(self._full(name))

        self._attempt("remove", name, remove)

    def arrow(self, name: str) -> tuple[Any, str]:
        return self._for_arrow() if self._for_arrow else self._fs, self._full(name)

    def _full(self, name: str) -> str:
        return f"{self._path}/{name}"

    def _relative(self, path: str) -> str:
        return path.lstrip("/").removeprefix(self._full("").lstrip("/"))

    def _size(self, name: str) -> int:
        return int(self._fs.info(self._full(name))["size"])

    def _put(self, name: str, data: bytes, mode: str, **conditions: str) -> None:
        if self._is_s3:
            seconds = _UPLOAD_SECONDS + len(data) // _UPLOAD_BYTES_PER_SECOND
            self._fs.pipe_file(self._full(name), data, mode=mode, timeout=seconds, **conditions)
        else:
            self._fs.pipe_file(self._full(name), data, mode=mode)

    def _etag(self, name: str) -> str | None:
        """ETag of the current object; "" if the store gives none, None if there is no object."""
        try:
            return str(self._fs.info(self._full(name)).get("ETag") or "")
        except FileNotFoundError:
            return None

    def _put_over(self, name: str, data: bytes, seen: str) -> bool:
        """Overwrite the object that was seen; False if another object is there now."""
        try:
            self._put(name, data, "overwrite", **({"IfMatch": seen} if seen else {}))
            return True
        except Exception as error:
            status, _ = http_status(error)
            if status == 412:  # possibly by our own attempt whose response was lost
                return bool(self._fs.cat_file(self._full(name)) == data)
            if not seen or status not in (400, 501):
                raise
        self._put(name, data, "overwrite")  # for stores without such a condition
        return True

    def _create_once(self, name: str, data: bytes) -> bool | None:
        """Try once. True: created; False: the name is taken; None: undecided, try again."""
        if self._is_memory:
            with _MEMORY_LOCK:
                if self._fs.exists(self._full(name)):
                    return False
                self._put(name, data, "overwrite")
                return True
        try:
            self._put(name, data, "create")
            return True
        except FileExistsError:
            return False
        except Exception as error:
            status, _ = http_status(error)
            if status == 412:
                return False
            if status == 409:
                return False if self.exists(name) else None
            raise

    def _check_exclusive(self, name: str, data: bytes) -> None:
        """Create the same file again, which must fail; success does no harm, as the bytes are the same."""
        if self._attempt("write", name, lambda: self._create_once(name, data)) is True:
            raise StoreError(
                f"{self.root} ignores the condition If-None-Match, so two writers could overwrite each "
                f"other's files: use a store that honours it (AWS S3, SeaweedFS) or a local folder"
            )
        self._exclusive_checked = True

    def sweep(self, owner: str) -> None:
        """Do nothing: unfinished uploads are not visible, and the bucket's rules expire them."""

    def remove_empty_folder(self, folder: str) -> None:
        """Do nothing: folders are only prefixes here."""

    def _attempt(self, doing: str, name: str, operation: Callable[[], T]) -> T:
        """Run a request, retrying while its failure may be temporary. All requests go through here."""
        try:
            return retry(f"{doing} {self.uri(name)}", operation)
        except (FileNotFoundError, StoreError) as error:
            if doing == "write" and isinstance(error, FileNotFoundError):
                # Folders need not exist here, so it is the bucket that is missing.
                raise OutputError(f"cannot write {self.uri(name)}: {bare_reason(error)}") from shareable(
                    error
                )
            raise
        except Exception as error:  # object stores raise their client libraries' own types
            kind = OutputError if _is_refused(error) else StoreError
            raise kind(f"cannot {doing} {self.uri(name)}: {bare_reason(error)}") from shareable(error)


T = TypeVar("T")
_CREATE_ATTEMPTS = 5
_REPLACE_ATTEMPTS = 8
_UPLOAD_SECONDS = 120
_UPLOAD_BYTES_PER_SECOND = 1 << 18
"""Time limit of an upload; nothing else ends one that waits for the server's "100 Continue"."""
_CREDENTIALS = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "TokenRetrievalError",
    "ProfileNotFound",
}
"""Errors of botocore in a process without usable credentials."""
_MEMORY_LOCK = threading.Lock()


def _is_refused(error: BaseException) -> bool:
    """Whether the store accepts nothing from this process: no credentials, permission, bucket or space."""
    status, code = http_status(error)
    if isinstance(error, PermissionError) or status in (401, 403, 507):
        return True
    names = {cls.__name__ for cls in type(error).__mro__}
    return bool(names & _CREDENTIALS) or any(word in code for word in ("Bucket", "Quota", "StorageFull"))


def _whole(data: bytes, size: int) -> bytes:
    """Return the data if it is complete."""
    if len(data) != size:
        raise ShortAnswerError(f"received {len(data)} bytes instead of {size}")
    return bytes(data)
