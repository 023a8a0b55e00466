"""Where input lies: URIs and paths to file systems, files to read, and whether they changed."""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import fsspec
from fsspec.implementations.local import LocalFileSystem

from pipeline.errors import SourceError

log = logging.getLogger(__name__)

_SAMPLES = 16
_SAMPLE_BYTES = 1 << 14
_NAMED_VERSIONS = ("ETag", "etag", "md5Hash", "content_md5", "generation", "VersionId")


@dataclass(frozen=True, slots=True)
class Location:
    """A place on a file system: what the user wrote, and where that is.

    Args:
        uri: as given.
        fs: its fsspec file system.
        path: the path on that file system.
    """

    uri: str
    fs: Any
    path: str

    @property
    def is_local(self) -> bool:
        return isinstance(self.fs, LocalFileSystem)

    def is_folder(self) -> bool:
        """Whether this is a folder. Raises SourceError if it is neither that nor a file."""
        try:
            kind = self.fs.info(self.path)["type"]
        except Exception as error:
            raise read_error(self.uri, error) from error
        if kind not in ("file", "directory"):
            raise SourceError(
                f"{self.uri}: is a {kind}, neither a file nor a folder; save the video to a file"
            )
        return bool(kind == "directory")

    def open(self, block_size: int) -> GuardedFile:
        """Open for reading in ranges of `block_size` bytes; read errors are kept in the file's `failure`."""
        try:
            handle = self.fs.open(self.path, "rb", block_size=block_size, cache_type="readahead")
        except Exception as error:
            raise read_error(self.uri, error) from error
        return GuardedFile(handle)

    def fingerprint(self) -> str:
        """A short text that changes when the file does.

        Made of the size and the store's own version mark (an ETag or the like), or else of samples of the
        content: a modification time would call a copied or touched file another one.
        """
        try:
            info = self.fs.info(self.path)
            size = int(info.get("size") or 0)
            digest = hashlib.sha256(str(size).encode())
            marks = [str(info[name]) for name in _NAMED_VERSIONS if info.get(name)]
            if marks and not self.is_local:
                digest.update("|".join(marks).encode())
            else:
                self._digest_samples(digest, size)
        except Exception as error:
            raise read_error(self.uri, error) from error
        return f"{size}-{digest.hexdigest()[:16]}"

    def _digest_samples(self, digest: Any, size: int) -> None:
        with self.fs.open(self.path, "rb", block_size=_SAMPLE_BYTES, cache_type="none") as handle:
            if size <= _SAMPLES * _SAMPLE_BYTES:
                digest.update(handle.read())
                return
            for i in range(_SAMPLES):
                handle.seek((size - _SAMPLE_BYTES) * i // (_SAMPLES - 1))
                digest.update(handle.read(_SAMPLE_BYTES))


class GuardedFile(io.RawIOBase):
    """A readable, seekable file that seems to end where reading fails, and keeps the error in `failure`.

    FFmpeg would take it for the end anyway, and PyAV print it. Whoever reads must look at `failure` to tell a
    network that broke from a video that ended.
    """

    def __init__(self, handle: BinaryIO) -> None:
        self._handle = handle
        self.failure: Exception | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return bool(self._handle.seekable())

    def read(self, size: int = -1) -> bytes:
        try:
            return bytes(self._handle.read(size))
        except Exception as error:
            self.failure = error
            return b""

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        try:
            return int(self._handle.seek(offset, whence))
        except Exception as error:
            if not isinstance(error, ValueError):  # to before the start, or for the size: FFmpeg just tries
                self.failure = error
            return -1

    def tell(self) -> int:
        return int(self._handle.tell())

    def close(self) -> None:
        if not self.closed:
            self._handle.close()
        super().close()


def scheme_of(uri: str) -> str:
    """The URI's scheme in lower case; "file" for plain paths."""
    head, separator, _ = uri.partition("://")
    return head.lower() if separator else "file"


def locate(uri: str, storage_options: Mapping[str, Any] | None = None) -> Location:
    """Find the file system of a URI or a plain path; nothing is read yet. Raises SourceError."""
    if not uri or "\0" in uri:
        raise SourceError(f"{uri!r} is no video: give a path or a URI such as s3://bucket/clip.mp4")
    try:
        fs, path = fsspec.core.url_to_fs(uri, **dict(storage_options or {}))
    except ImportError as error:
        raise SourceError(
            f"{uri}: no driver for {scheme_of(uri)}:// is installed; {one_line(error)}"
        ) from error
    except Exception as error:
        raise SourceError(
            f"{uri}: cannot be understood as a path or URI ({one_line(error)}); "
            "use a path, file://, s3:// or another fsspec scheme"
        ) from error
    return Location(uri, fs, str(path))


def read_error(uri: str, error: BaseException) -> SourceError:
    """A SourceError in one line for whatever a file system raised."""
    if isinstance(error, SourceError):
        return error
    if isinstance(error, FileNotFoundError):
        return SourceError(f"{uri}: no such file or folder; check the path")
    if isinstance(error, PermissionError):
        return SourceError(f"{uri}: permission denied; check the file's rights or the credentials")
    return SourceError(
        f"{uri}: reading failed ({one_line(error)}); check the path and the connection, then try again"
    )


def one_line(error: BaseException) -> str:
    """An exception's text without line breaks, with its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
