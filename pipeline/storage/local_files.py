"""File operations on a local disk, made durable with POSIX calls.

A file is written under a temporary name in `ROOT/.tmp` (never beside the data), synced, and given its name by
a hard link, which fails if the name exists; then its folder is synced. File systems without hard links
(exFAT, some FUSE mounts) get Linux's exclusive rename. If there is neither, the store refuses to write: any
other method could overwrite another writer's file or expose half of one.

The root may be a symbolic link. Links below it are refused for writing and reading: otherwise anybody who can
create one could redirect rows. Folders are opened one by one without following links, and files are used
relative to their open folder, so a link created during an operation is not followed either. Where the system
lacks these calls (Windows), names are checked before each operation.
"""

from __future__ import annotations

import errno
import logging
import os
import secrets
import socket
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow.fs

from pipeline.base.errors import OutputError, StoreError, bare_reason
from pipeline.storage.files import Files
from pipeline.storage.local_places import (
    HAS_PLACES,
    LISTED,
    NO_LINK,
    PASSED,
    Place,
    is_link,
    link_exclusively,
    make_folder,
    make_folders,
    rename,
    sync,
)

logger = logging.getLogger(__name__)

TEMP_FOLDER = ".tmp"
FOREIGN_TEMP_AGE_SECONDS = 24 * 3600.0
_ATTEMPTS = 5
_PROCESS_TOKEN = secrets.token_hex(4)
_HOST = "".join(c if c.isalnum() or c in ".-" else "-" for c in socket.gethostname()) or "host"
# Errors that every other write in this folder would meet, too.
_OF_THE_WHOLE = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.ESTALE,
    errno.ENOTCONN,
}


class LocalFiles(Files):
    """Files on a local disk."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self._folder = folder
        self._prefix = os.path.join(self.root, "")

    def create(self, name: str, data: bytes, owner: str = "") -> bool:
        with self._reporting("write", name):
            # This check only saves writing the file; the link decides.
            if self._is_taken(name):
                return False
            try:
                self._put(name, data, owner, link_exclusively)
            except FileExistsError:
                return False
            return True

    def replace(self, name: str, data: bytes, owner: str = "") -> None:
        with self._reporting("write", name):
            self._put(name, data, owner, rename)

    def read(self, name: str) -> bytes:
        with self._reporting("read", name), self._opened(name) as file:
            return file.read()

    def tail(self, name: str, count: int) -> bytes:
        with self._reporting("read", name), self._opened(name) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - count))
            return file.read()

    def exists(self, name: str) -> bool:
        with self._reporting("read", name), suppress(FileNotFoundError, NotADirectoryError):
            with self._place(name) as place:
                mode = os.stat(place.name, dir_fd=place.folder, follow_symlinks=False).st_mode
            if stat.S_ISLNK(mode):
                raise self._linked(name)
            return stat.S_ISREG(mode)
        return False

    def names(self, folder: str, recursive: bool = False) -> list[str]:
        return sorted(name for name, _ in self._found(folder, recursive, sized=False))

    def sizes(self, folder: str, recursive: bool = False) -> dict[str, int]:
        return dict(sorted(self._found(folder, recursive, sized=True)))

    def folders(self, folder: str) -> list[str]:
        with self._reporting("list", folder), suppress(FileNotFoundError), self._listing(folder) as entries:
            for entry in entries:
                if entry.is_symlink():
                    raise self._linked(f"{folder}/{entry.name}")
            return sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
        return []

    def part(self, name: str, start: int, end: int) -> bytes:
        with self._reporting("read", name), self._opened(name) as file:
            file.seek(start)
            data = file.read(end - start)
            if len(data) != end - start:
                raise StoreError(f"cannot read {self.uri(name)}: it ends before byte {end}")
            return data

    def _found(self, folder: str, recursive: bool, sized: bool) -> list[tuple[str, int]]:
        """Files with their sizes, or 0 where these are not asked for."""
        found: list[tuple[str, int]] = []
        with self._reporting("list", folder), suppress(FileNotFoundError), self._listing(folder) as entries:
            for entry in entries:
                name = f"{folder}/{entry.name}"
                if entry.is_file(follow_symlinks=False):
                    found.append((name, entry.stat(follow_symlinks=False).st_size if sized else 0))
                elif entry.is_symlink():
                    # Silently missing rows would be worse than an error.
                    raise self._linked(name)
                elif recursive and entry.is_dir(follow_symlinks=False):
                    found += self._found(name, True, sized)
        return found

    def remove(self, name: str) -> None:
        with (
            self._reporting("remove", name),
            suppress(FileNotFoundError),
            self._place(name) as place,
        ):
            os.unlink(place.name, dir_fd=place.folder)
            # Each removal reaches the disk before the next: the order must survive a power cut.
            sync(place)

    def remove_empty_folder(self, folder: str) -> None:
        with suppress(OSError), self._place(folder) as place:
            os.rmdir(place.name, dir_fd=place.folder)

    def arrow(self, name: str) -> tuple[Any, str]:
        return pyarrow.fs.LocalFileSystem(), self.path(name)

    def path(self, name: str) -> str:
        """Path of a file on this machine."""
        return self._prefix + name

    def sweep(self, owner: str) -> None:
        with suppress(OSError), self._listing(TEMP_FOLDER) as entries:
            for entry in entries:
                with suppress(OSError, StoreError):
                    if _is_stale(entry, owner):
                        self.remove(f"{TEMP_FOLDER}/{entry.name}")
                        logger.info("removed temporary file %s of a writer that has ended", entry.name)

    # Without following links

    @contextmanager
    def _place(self, name: str, *, make: bool = False) -> Iterator[Place]:
        """Yield the name of a file or folder in its open folder; `make` creates missing folders.

        Raises:
            StoreError: one of the folders is a symbolic link.
            OSError: a folder cannot be opened or created.
        """
        *folders, leaf = name.split("/")
        if make:
            make_folders(self._folder)
        if not HAS_PLACES:
            self._check_links(folders)
            if make:
                make_folders(self._folder.joinpath(*folders))
            yield Place(None, str(self._folder / name))
            return
        folder = os.open(self._folder, PASSED)
        try:
            for depth, part in enumerate(folders, 1):
                if make:
                    make_folder(Place(folder, part))
                inner = self._enter(Place(folder, part), PASSED, "/".join(folders[:depth]))
                os.close(folder)
                folder = inner
            yield Place(folder, leaf)
        finally:
            os.close(folder)

    def _enter(self, place: Place, flags: int, name: str) -> int:
        """Open a place and return its descriptor; StoreError if it is a symbolic link."""
        try:
            return os.open(place.name, flags | NO_LINK, dir_fd=place.folder)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.EMLINK) and is_link(place):
                raise self._linked(name) from None
            raise

    @contextmanager
    def _opened(self, name: str) -> Iterator[BinaryIO]:
        """Open a file for reading."""
        with self._place(name) as place:
            if not HAS_PLACES and is_link(place):
                raise self._linked(name)
            with open(self._enter(place, os.O_RDONLY | getattr(os, "O_BINARY", 0), name), "rb") as file:
                yield file

    @contextmanager
    def _listing(self, folder: str) -> Iterator[list[os.DirEntry[str]]]:
        """List a folder. The entries are valid within the context."""
        with self._place(folder) as place:
            if not HAS_PLACES:
                if is_link(place):
                    raise self._linked(folder)
                yield list(os.scandir(place.name))
                return
            descriptor = self._enter(place, LISTED, folder)
            try:
                yield list(os.scandir(descriptor))
            finally:
                os.close(descriptor)

    def _is_taken(self, name: str) -> bool:
        with suppress(FileNotFoundError), self._place(name) as place:
            os.stat(place.name, dir_fd=place.folder, follow_symlinks=False)
            return True
        return False

    def _check_links(self, folders: Sequence[str]) -> None:
        for depth in range(1, len(folders) + 1):
            if is_link(Place(None, str(self._folder.joinpath(*folders[:depth])))):
                raise self._linked("/".join(folders[:depth]))

    def _linked(self, name: str) -> StoreError:
        return StoreError(
            f"{self.uri(name)} is a symbolic link, and links inside an output folder are not followed: "
            "remove it, or choose another output folder (the output folder itself may be a link)"
        )

    # Writing

    def _put(self, name: str, data: bytes, owner: str, move: Callable[[Place, Place], None]) -> None:
        for attempt in range(_ATTEMPTS):
            try:
                with self._temporary(data, owner) as temporary, self._place(name, make=True) as target:
                    move(temporary, target)
                    sync(target)
                return
            except FileNotFoundError:
                # The temporary file was swept or the empty folder removed just now.
                if attempt == _ATTEMPTS - 1:
                    raise

    @contextmanager
    def _temporary(self, data: bytes, owner: str) -> Iterator[Place]:
        """Write a temporary file; it is removed at the end of the context."""
        name = f"{owner}@{_HOST}@{os.getpid()}@{_PROCESS_TOKEN}@{secrets.token_hex(6)}.tmp"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | NO_LINK | getattr(os, "O_BINARY", 0)
        with self._place(f"{TEMP_FOLDER}/{name}", make=True) as place:
            try:
                with open(os.open(place.name, flags, 0o666, dir_fd=place.folder), "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                yield place
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(place.name, dir_fd=place.folder)

    @contextmanager
    def _reporting(self, doing: str, name: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            if doing != "write":
                raise
            raise StoreError(f"cannot write {self.uri(name)}: its folder was removed meanwhile") from None
        except OSError as error:
            kind = OutputError if doing != "read" and error.errno in _OF_THE_WHOLE else StoreError
            raise kind(
                f"cannot {doing} {self.uri(name)}: {bare_reason(error)}{_remedy(error, doing)}"
            ) from error


def _remedy(error: OSError, doing: str) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "; everything committed so far is kept: free some space and run again"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and doing != "read":
        return "; choose a folder that you may write to"
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return "; a file is in the place of a folder: choose another output folder"
    return ""


def _is_stale(entry: os.DirEntry[str], owner: str) -> bool:
    """Whether the writer of a temporary file has certainly ended.

    A process id is meaningful only on its own host; files of other hosts count as stale after a day. A wrong
    guess costs the other writer a second attempt but no rows: `create` starts over when its temporary file is
    gone.
    """
    parts = entry.name.removesuffix(".tmp").split("@")
    if len(parts) != 5:
        return False
    if time.time() - entry.stat(follow_symlinks=False).st_mtime > FOREIGN_TEMP_AGE_SECONDS:
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
