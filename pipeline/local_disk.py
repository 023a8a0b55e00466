"""Durable file operations on a local disk: what `files.Files` promises, by POSIX means.

A file is written under a temporary name in `ROOT/.tmp` (never beside the data), synced, and then given
its name by a hard link, which fails if the name exists; its folder is synced after that. File systems
without hard links (exFAT, some FUSE mounts) get Linux' exclusive rename. With neither the store refuses:
anything else could overwrite another writer's file or show half of one.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow.fs

from pipeline.errors import StoreError
from pipeline.files import Files
from pipeline.locations import bare_reason

logger = logging.getLogger(__name__)

TEMP_FOLDER = ".tmp"
FOREIGN_TEMP_AGE_SECONDS = 24 * 3600.0
_ATTEMPTS = 5
_PROCESS_TOKEN = secrets.token_hex(4)
_HOST = "".join(c if c.isalnum() or c in ".-" else "-" for c in socket.gethostname()) or "host"
_NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}
_AT_FDCWD, _RENAME_NOREPLACE = -100, 1


class LocalFiles(Files):
    """Files on a disk."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self._folder = folder

    def create(self, name: str, data: bytes, owner: str = "") -> bool:
        target = self._folder / name
        with self._reporting("write", name):
            # An earlier look saves writing the file; the link decides.
            if os.path.lexists(target):
                return False
            try:
                self._place(target, data, owner, _link_exclusively)
            except FileExistsError:
                return False
            return True

    def replace(self, name: str, data: bytes, owner: str = "") -> None:
        with self._reporting("write", name):
            self._place(self._folder / name, data, owner, os.replace)

    def read(self, name: str) -> bytes:
        with self._reporting("read", name):
            return (self._folder / name).read_bytes()

    def tail(self, name: str, count: int) -> bytes:
        with self._reporting("read", name), open(self._folder / name, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - count))
            return file.read()

    def exists(self, name: str) -> bool:
        with self._reporting("read", name):
            return (self._folder / name).is_file()

    def names(self, folder: str, recursive: bool = False) -> list[str]:
        found: list[str] = []
        with self._reporting("list", folder), suppress(FileNotFoundError):
            for entry in os.scandir(self._folder / folder):
                name = f"{folder}/{entry.name}"
                if entry.is_file():
                    found.append(name)
                elif recursive and entry.is_dir():
                    found += self.names(name, recursive=True)
        return sorted(found)

    def remove(self, name: str) -> None:
        path = self._folder / name
        with self._reporting("remove", name), suppress(FileNotFoundError):
            path.unlink()
            # Each removal reaches the disk before the next: a restart's order must survive a power cut.
            _sync_folder(path.parent)

    def remove_empty_folder(self, folder: str) -> None:
        with suppress(OSError):
            (self._folder / folder).rmdir()

    def arrow(self, name: str) -> tuple[Any, str]:
        return pyarrow.fs.LocalFileSystem(), str(self._folder / name)

    def sweep(self, owner: str) -> None:
        with suppress(OSError):
            for entry in list(os.scandir(self._folder / TEMP_FOLDER)):
                with suppress(OSError):
                    if _is_stale(entry, owner):
                        os.unlink(entry.path)
                        logger.info("removed temporary file %s of a writer that is gone", entry.path)

    def _place(self, target: Path, data: bytes, owner: str, move: Callable[[Path, Path], None]) -> None:
        for attempt in range(_ATTEMPTS):
            temporary = self._write_temporary(data, owner)
            try:
                _make_folders(target.parent)
                move(temporary, target)
                _sync_folder(target.parent)
                return
            except FileNotFoundError:
                # Somebody swept the temporary file or removed the empty folder just now.
                if attempt == _ATTEMPTS - 1:
                    raise
            finally:
                with suppress(FileNotFoundError):
                    temporary.unlink()

    def _write_temporary(self, data: bytes, owner: str) -> Path:
        folder = self._folder / TEMP_FOLDER
        path = folder / f"{owner}@{_HOST}@{os.getpid()}@{_PROCESS_TOKEN}@{secrets.token_hex(6)}.tmp"
        _make_folders(folder)
        try:
            with open(path, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            with suppress(OSError):
                path.unlink()
            raise
        return path

    @contextmanager
    def _reporting(self, doing: str, name: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            if doing != "write":
                raise
            raise StoreError(f"cannot write {self.uri(name)}: its folder vanished while writing") from None
        except OSError as error:
            raise StoreError(
                f"cannot {doing} {self.uri(name)}: {bare_reason(error)}{_remedy(error, doing)}"
            ) from error


def _remedy(error: OSError, doing: str) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "; everything committed so far is kept: free some space and run again"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and doing != "read":
        return "; choose a folder that you may write to"
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return "; a file is where a folder is needed: choose another output folder"
    return ""


def _make_folders(folder: Path) -> None:
    """Makes a folder and those above it; each new name is made durable in its parent."""
    if folder.is_dir():
        return
    _make_folders(folder.parent)
    try:
        folder.mkdir()
    except FileExistsError:
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from None
    else:
        _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return  # a folder one may write to but not list
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network and FUSE mounts cannot sync a folder; then the file's own fsync is all there is.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def _link_exclusively(temporary: Path, target: Path) -> None:
    """Gives a finished file its name; FileExistsError if the name is taken."""
    try:
        os.link(temporary, target)
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        _rename_exclusively(temporary, target)


def _rename_exclusively(temporary: Path, target: Path) -> None:
    if os.name == "nt":
        os.rename(temporary, target)  # on Windows this never replaces
        return
    number = errno.ENOSYS
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if hasattr(libc, "renameat2"):
            source, name = os.fsencode(temporary), os.fsencode(target)
            if libc.renameat2(_AT_FDCWD, source, _AT_FDCWD, name, ctypes.c_uint(_RENAME_NOREPLACE)) == 0:
                return
            number = ctypes.get_errno()
    if number == errno.EEXIST:
        raise FileExistsError(number, os.strerror(number), str(target))
    if number not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP):
        raise OSError(number, os.strerror(number), str(target))
    raise StoreError(
        f"cannot write {target}: this file system has neither hard links nor an exclusive rename, so two "
        f"writers could overwrite each other; choose another disk, or the bucket's own URI (s3://...)"
    )


def _is_stale(entry: os.DirEntry[str], owner: str) -> bool:
    """Whether a temporary file's writer is certainly gone.

    A process id says something only on its own host; other hosts' files must be a day old. Being wrong costs
    the other writer a second attempt, no rows: `create` starts again when its temporary file vanishes.
    """
    parts = entry.name.removesuffix(".tmp").split("@")
    if len(parts) != 5:
        return False
    if time.time() - entry.stat().st_mtime > FOREIGN_TEMP_AGE_SECONDS:
        return True
    file_owner, host, pid, token, _ = parts
    if file_owner != owner or host != _HOST or not pid.isdigit():
        return False
    if int(pid) == os.getpid():
        # A restarted container gets the same host name and process id again, but not the same token.
        return token != _PROCESS_TOKEN
    return not _is_running(int(pid))


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
