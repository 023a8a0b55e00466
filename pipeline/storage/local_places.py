"""File operations on names in open folders, without following symbolic links on the way.

Each call resolves a path anew, and anybody who may write to one of its folders can put a link there between
two calls. A `Place` is a name in a folder that is already open, so later changes of the path have no effect.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import sys
from dataclasses import dataclass
from pathlib import Path

HAS_PLACES = {os.open, os.mkdir, os.stat, os.link, os.unlink, os.rename, os.rmdir} <= os.supports_dir_fd
NO_LINK = getattr(os, "O_NOFOLLOW", 0)
LISTED = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0)
# Traversing a folder does not require read permission.
PASSED = getattr(os, "O_PATH", os.O_RDONLY) | getattr(os, "O_DIRECTORY", 0)

_NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}
_AT_FDCWD, _RENAME_NOREPLACE = -100, 1


@dataclass(frozen=True)
class Place:
    """A name in an open folder.

    Args:
        folder: descriptor of the folder; None if the system has no such calls (`HAS_PLACES`), and then `name`
            is a whole path.
        name: name of a file or folder in it.
    """

    folder: int | None
    name: str


def make_folders(folder: Path) -> None:
    """Create a folder and its parents; each new name is made durable in its parent."""
    if folder.is_dir():
        return
    make_folders(folder.parent)
    make_folder(Place(None, str(folder)))
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))


def make_folder(place: Place) -> None:
    """Create one folder if it does not exist."""
    try:
        os.mkdir(place.name, dir_fd=place.folder)
    except FileExistsError:
        return
    sync(place)


def is_link(place: Place) -> bool:
    """Whether the place is a symbolic link, or a junction on Windows."""
    try:
        found = os.stat(place.name, dir_fd=place.folder, follow_symlinks=False)
    except (FileNotFoundError, NotADirectoryError):
        return False
    junction = getattr(stat, "IO_REPARSE_TAG_MOUNT_POINT", None)
    return stat.S_ISLNK(found.st_mode) or (
        junction is not None and getattr(found, "st_reparse_tag", None) == junction
    )


def sync(place: Place) -> None:
    """Make the names in the folder of a place durable."""
    if os.name == "nt":
        return
    path = (os.path.dirname(place.name) or ".") if place.folder is None else "."
    try:
        descriptor = os.open(path, os.O_RDONLY, dir_fd=place.folder)
    except PermissionError:
        return  # a folder with write but no read permission
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network and FUSE mounts cannot sync a folder; only the file's own fsync is left then.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def rename(temporary: Place, target: Place) -> None:
    """Give a finished file its name, replacing any other."""
    os.replace(temporary.name, target.name, src_dir_fd=temporary.folder, dst_dir_fd=target.folder)


def link_exclusively(temporary: Place, target: Place) -> None:
    """Give a finished file its name; FileExistsError if the name is taken."""
    try:
        os.link(
            temporary.name,
            target.name,
            src_dir_fd=temporary.folder,
            dst_dir_fd=target.folder,
            follow_symlinks=not HAS_PLACES,
        )
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        _rename_exclusively(temporary, target)


def _rename_exclusively(temporary: Place, target: Place) -> None:
    if os.name == "nt":
        os.rename(temporary.name, target.name)  # never replaces a file on Windows
        return
    number = errno.ENOSYS
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if hasattr(libc, "renameat2"):
            done = libc.renameat2(
                _AT_FDCWD if temporary.folder is None else temporary.folder,
                os.fsencode(temporary.name),
                _AT_FDCWD if target.folder is None else target.folder,
                os.fsencode(target.name),
                ctypes.c_uint(_RENAME_NOREPLACE),
            )
            if done == 0:
                return
            number = ctypes.get_errno()
    if number == errno.EEXIST:
        raise FileExistsError(number, os.strerror(number), target.name)
    if number not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP):
        raise OSError(number, os.strerror(number), target.name)
    raise OSError(
        errno.ENOTSUP,
        "this file system has neither hard links nor an exclusive rename, so two writers could overwrite "
        "each other; choose another disk, or the bucket's own URI (s3://...)",
    )
