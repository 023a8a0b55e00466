"""Input locations: URIs and paths resolved to file systems and files, and change detection."""

from __future__ import annotations

import hashlib
import io
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.base.errors import NoSuchSourceError, SourceError, one_line
from pipeline.base.redaction import redacted, shareable
from pipeline.storage.filesystems import connect, is_local
from pipeline.storage.read_ahead import ReadAhead
from pipeline.storage.retries import ShortAnswerError, retry

BLOCK_BYTES = 4 << 20
"""Longest range of one read. Measured by tests/benchmarks/s3_reading.py: 25.7 MiB of H.264 with the index at
the end, 20 ms a request, 50 MiB/s, two busy cores. Requests, MiB read and seconds for three tasks:

    cache, KiB                one pass          resume half-way       first frame
    none                    106 25.9 3.95       116  27.2 4.23         9  1.1 0.31
    fsspec readahead 1024    24 26.9 1.51        34  33.2 2.30         9  5.1 0.53
    fsspec readahead 4096    10 29.9 1.28        20  51.2 2.61         9 17.1 0.86
    fsspec blockcache 4096    8 25.7 1.13        16  41.0 1.83         7 11.3 0.60
    ReadAhead, 1024          30 25.7 1.75        40  27.0 2.07         9  1.1 0.31
    ReadAhead, 4096          13 25.7 1.16        23  27.0 1.67         9  1.1 0.39   the default
    ReadAhead, 16384         10 25.7 1.25        20  27.0 2.99         9  1.1 0.47
"""

MakeCache = Callable[[Callable[[int, int], bytes], int, int], Any]

_SAMPLES = 16
_SAMPLE_BYTES = 1 << 14
_NAMED_VERSIONS = ("ETag", "etag", "md5Hash", "content_md5", "generation", "VersionId")


@dataclass(frozen=True, slots=True)
class Location:
    """A resolved location: the URI as given, its file system and the path on it.

    Args:
        uri: as given.
        fs: its fsspec file system.
        path: the path on that file system.
    """

    uri: str = field(repr=False)
    fs: Any = field(repr=False)
    path: str = field(repr=False)

    def __repr__(self) -> str:
        return f"Location({redacted(self.uri)!r})"

    @property
    def is_local(self) -> bool:
        return is_local(self.fs)

    def is_folder(self) -> bool:
        """Whether this is a folder. Raises SourceError if it is neither a folder nor a file."""
        try:
            kind = retry(f"look at {self.uri}", lambda: self.fs.info(self.path))["type"]
        except Exception as error:
            raise read_error(self.uri, error) from shareable(error)
        if kind not in ("file", "directory"):
            raise SourceError(
                f"{self.uri}: is a {kind}, neither a file nor a folder; save the video to a file first"
            )
        return bool(kind == "directory")

    def open(self, block_size: int) -> GuardedFile:
        """Open for reading in ranges of up to `block_size` bytes; a final failure is kept in `failure`."""
        try:
            return GuardedFile(self, block_size)
        except Exception as error:
            raise read_error(self.uri, error) from shareable(error)

    def read_bytes(self, path: str | None = None, size: int | None = None) -> bytes:
        """Return all bytes of this file, or of another on the same file system. Raises the file system's
        errors.

        Args:
            size: the file's size in bytes; looked up if None.
        """
        wanted = self.path if path is None else path

        def fetch() -> bytes:
            if self.is_local:
                return bytes(self.fs.cat_file(wanted))
            expected = self.fs.info(wanted)["size"] if size is None else size
            data = bytes(self.fs.cat_file(wanted))
            if expected is not None and len(data) != int(expected):
                raise ShortAnswerError(f"received {len(data)} bytes instead of {expected}")
            return data

        return retry(f"read {self.uri if path is None else path}", fetch)

    def fingerprint(self) -> str:
        """Return a short text that changes when the file does.

        It is made from the size and the store's version mark (such as an ETag), or from samples of the
        content. The modification time is not used: it changes when a file is copied or touched.
        """
        try:
            info = retry(f"look at {self.uri}", lambda: self.fs.info(self.path))
            size = int(info.get("size") or 0)
            digest = hashlib.sha256(str(size).encode())
            marks = [str(info[name]) for name in _NAMED_VERSIONS if info.get(name)]
            if marks and not self.is_local:
                digest.update("|".join(marks).encode())
            else:
                for sample in retry(f"read {self.uri}", lambda: list(self._samples(size))):
                    digest.update(sample)
        except Exception as error:
            raise read_error(self.uri, error) from shareable(error)
        return f"{size}-{digest.hexdigest()[:16]}"

    def _samples(self, size: int) -> Iterator[bytes]:
        with self.fs.open(self.path, "rb", block_size=_SAMPLE_BYTES, cache_type="none") as handle:
            if size <= _SAMPLES * _SAMPLE_BYTES:
                yield handle.read()
                return
            for i in range(_SAMPLES):
                handle.seek((size - _SAMPLE_BYTES) * i // (_SAMPLES - 1))
                yield handle.read(_SAMPLE_BYTES)


class GuardedFile(io.RawIOBase):
    """A remote file, readable and seekable, that seems to end where reading finally fails.

    A range that cannot be read is requested again at the same position. If that does not help, the error is
    kept in `failure`: FFmpeg would treat it as the end anyway, and PyAV would print it. Callers must check
    `failure` to tell a broken network from the end of the video.

    Reading a file that changes meanwhile fails on S3 (each range is requested with the ETag first seen).
    """

    def __init__(self, location: Location, block_size: int, cached: MakeCache = ReadAhead) -> None:
        self.failure: Exception | None = None
        self._uri = location.uri
        self._lock = threading.Lock()
        self._position = 0
        self._handle = retry(
            f"open {self._uri}",
            lambda: location.fs.open(location.path, "rb", block_size=block_size, cache_type="none"),
        )
        size = getattr(self._handle, "size", None)
        self._size = size if isinstance(size, int) else None
        # Without a known size there are no ranges: the file is read in order.
        self._cache = None if self._size is None else cached(self._fetch, self._size, block_size)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._cache is not None or bool(self._handle.seekable())

    def read(self, size: int = -1) -> bytes:
        if self.failure is not None:  # FFmpeg asks again; one round of retries is enough
            return b""
        try:
            if self._cache is None or self._size is None:
                return bytes(self._handle.read(size))
            end = self._size if size is None or size < 0 else min(self._size, self._position + size)
            if end <= self._position:
                return b""
            data = bytes(self._cache.read(self._position, end))
            self._position += len(data)
            return data
        except Exception as error:
            self.failure = error
            return b""

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        try:
            if self._cache is None or self._size is None:
                return int(self._handle.seek(offset, whence))
        except Exception as error:
            # A seek before the start, or a request for the size: FFmpeg only probes.
            if not isinstance(error, ValueError):
                self.failure = error
            return -1
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}.get(whence)
        if base is None or base + offset < 0:
            return -1
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return int(self._handle.tell()) if self._cache is None else self._position

    def close(self) -> None:
        if not self.closed:
            self._handle.close()
        super().close()

    def _fetch(self, start: int, end: int) -> bytes:
        assert self._size is not None
        end = min(end, self._size)
        if end <= start:
            return b""

        def fetch() -> bytes:
            data = self._range(start, end)
            if len(data) != end - start:
                raise ShortAnswerError(f"received {len(data)} bytes instead of {end - start}")
            return data

        return retry(f"read {self._uri}, bytes {start}..{end - 1}", fetch)

    def _range(self, start: int, end: int) -> bytes:
        fetch_range = getattr(self._handle, "_fetch_range", None)
        if fetch_range is None:
            with self._lock:
                self._handle.seek(start)
                return bytes(self._handle.read(end - start))
        try:
            return bytes(fetch_range(start, end))
        except IndexError as error:  # s3fs indexes into errors that may be empty
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def scheme_of(uri: str) -> str:
    """The scheme of a URI in lower case; "file" for plain paths."""
    head, separator, _ = uri.partition("://")
    return head.lower() if separator else "file"


def locate(uri: str, storage_options: Mapping[str, Any] | None = None) -> Location:
    """Find the file system of a URI or plain path, reading nothing. Raises SourceError."""
    if not uri or "\0" in uri:
        raise SourceError(f"{uri!r} is not a video: give a path or a URI such as s3://bucket/clip.mp4")
    try:
        fs, path = connect(uri, storage_options)
    except ImportError as error:
        raise SourceError(
            f"{uri}: no driver for {scheme_of(uri)}:// is installed; {one_line(error)}"
        ) from shareable(error)
    except Exception as error:
        raise SourceError(
            f"{uri}: is not a valid path or URI ({one_line(error)}); "
            "use a path, file://, s3:// or another fsspec scheme"
        ) from shareable(error)
    return Location(uri, fs, path)


def read_error(uri: str, error: BaseException) -> SourceError:
    """Convert any error of a file system to a SourceError of one line."""
    if isinstance(error, SourceError):
        return error
    if isinstance(error, FileNotFoundError):
        return NoSuchSourceError(f"{uri}: no such file or folder; check the path")
    if isinstance(error, PermissionError):
        return SourceError(f"{uri}: permission denied; check the file's permissions or the credentials")
    if type(error).__name__ == "FileExpired":
        return SourceError(f"{uri}: was replaced while being read; try again")
    return SourceError(
        f"{uri}: reading failed ({one_line(error)}); check the path and the connection, then try again"
    )
