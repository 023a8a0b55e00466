"""Videos found by looking: a folder or a glob on any fsspec URI, and the prompts that lie beside videos.

One listing finds videos and sidecars together: in a bucket of 10,000 videos a question per video would take
longer than the tracking of some.
"""

from __future__ import annotations

import logging
import os
import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from fsspec.utils import glob_translate

from pipeline.errors import UsageError
from pipeline.filesystems import connect, expanded
from pipeline.images import SUFFIXES as IMAGE_SUFFIXES
from pipeline.locations import one_line, read_error, scheme_of

logger = logging.getLogger(__name__)

VIDEO_SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts", ".mts", ".m2ts", ".mpg", ".mpeg", ".m2v"),
    *(".wmv", ".asf", ".flv", ".ogv", ".3gp", ".3g2", ".mxf", ".vob", ".y4m", ".mjpeg", ".mjpg"),
    *(".h264", ".264", ".h265", ".265", ".hevc"),
)
SIDECARS = (".prompts.json", ".masks.png")
_MAGIC = re.compile(r"[*?\[]")
_FOLDERS_REMEMBERED = 256


def has_wildcard(uri: str) -> bool:
    """Whether a URI may be a glob. In a web address `?` begins the query."""
    return scheme_of(uri) not in ("http", "https") and _MAGIC.search(uri) is not None


def videos_in(uri: str, storage_options: Mapping[str, Any] | None = None) -> Iterator[tuple[str, str | None]]:
    """(video, its sidecar or None) of a folder and all below it, or of a glob; sorted, local paths absolute.

    Of a folder, and of a glob that leaves the suffix open, files with a video's suffix are taken; of another
    glob, all that match. Hidden files and folders, and sidecars, are no videos.

    Raises:
        UsageError: it cannot be listed, or there is no video.
    """
    pattern, chain = _unchained(uri)
    magic = _MAGIC.search(pattern) if has_wildcard(pattern) else None
    root = pattern[: magic.start()].rpartition("/")[0] if magic else pattern.rstrip("/")
    if magic and "/" not in pattern[: magic.start()]:
        root = "."
    elif not root or root.endswith(":/"):
        root += "/"
    wanted = _matcher(pattern[len(root) :] if root != "." else pattern) if magic else _has_video_suffix
    place, depth = f"{root}{chain}", _depth(pattern[magic.start() :]) if magic else None
    names = _listing(place, depth, storage_options)
    start = os.path.abspath(root.partition("://")[2] if "://" in root else expanded(root))
    prefix = start if scheme_of(root) in ("file", "local") and not chain else root
    prefix = prefix.rstrip("/") if not prefix.endswith("://") else prefix[:-1]
    found = {n for n in names if n.endswith(SIDECARS)}
    count = 0
    for name in names:
        if name not in found and wanted(name):
            count += 1
            beside = sidecar_of(name, found)
            yield f"{prefix}/{name}{chain}", None if beside is None else f"{prefix}/{beside}{chain}"
    if not count:
        raise UsageError(_nothing(uri, bool(magic), names))


def sidecar_of(video: str, names: Iterable[str]) -> str | None:
    """Which of `names` (a set, best) holds the prompts of a video of this name; prompts before masks."""
    stem, suffix = os.path.splitext(video)
    for base in (video, stem) if suffix else (video,):
        for ending in SIDECARS:
            if base + ending in names:
                return base + ending
    return None


class Sidecars:
    """Prompts beside videos that a manifest names: each folder is listed once, while it is remembered."""

    def __init__(self, storage_options: Mapping[str, Any] | None = None) -> None:
        self._options = storage_options
        self._folders: OrderedDict[str, frozenset[str]] = OrderedDict()

    def of(self, video: str) -> str | None:
        """The URI of the prompts beside a video; None if there are none or its folder cannot be listed."""
        if scheme_of(video) in ("http", "https") or "::" in video or "/" not in video.rstrip("/"):
            return None
        folder, _, name = video.rstrip("/").rpartition("/")
        if folder not in self._folders:
            self._folders[folder] = self._look(folder)
            if len(self._folders) > _FOLDERS_REMEMBERED:
                self._folders.popitem(last=False)
        self._folders.move_to_end(folder)
        found = sidecar_of(name, self._folders[folder])
        return None if found is None else f"{folder}/{found}"

    def _look(self, folder: str) -> frozenset[str]:
        try:
            fs, path = connect(folder or "/", self._options, library_retries=True)
            fs.invalidate_cache()
            entries = fs.ls(path, detail=False)
        except (FileNotFoundError, NotADirectoryError, ImportError, ValueError):
            return frozenset()  # no such folder, or none that could be listed: opening the video will tell
        except Exception as error:
            logger.warning("%s cannot be listed, prompts beside its videos are not seen: %s",
                           folder, one_line(error))  # fmt: skip
            return frozenset()
        names = (str(entry).rstrip("/").rpartition("/")[2] for entry in entries)
        return frozenset(name for name in names if name.endswith(SIDECARS))


# --- listing -------------------------------------------------------------------------------------


def _unchained(uri: str) -> tuple[str, str]:
    """The part that names files, and what follows it: of `zip://*.mp4::s3://b/a.zip` it is the first."""
    head, separator, tail = uri.partition("::")
    return (head, separator + tail) if separator and "://" in head else (uri, "")


def _listing(place: str, depth: int | None, storage_options: Mapping[str, Any] | None) -> list[str]:
    """Names below a folder, sorted, without hidden ones."""
    try:
        fs, path = connect(place, storage_options, library_retries=True)
        root = path.rstrip("/") + "/"
        fs.invalidate_cache()
        paths = fs.find(path, maxdepth=depth)
        fs.invalidate_cache()  # what it may remember of a million files
    except Exception as error:  # every store behind fsspec has errors of its own
        raise UsageError(str(read_error(place, error))) from error
    root = root.lstrip("/")
    names = (p.lstrip("/").removeprefix(root) for p in paths if not p.endswith("/"))
    return sorted(n for n in names if n and not n.startswith(".") and "/." not in n)


def _matcher(pattern: str) -> Any:
    """Whether a name below the root matches a glob."""
    pattern = pattern.lstrip("/")
    match = re.compile(glob_translate(pattern)).match
    any_suffix = "." not in pattern.rpartition("/")[2]
    return lambda name: match(name) is not None and (not any_suffix or _has_video_suffix(name))


def _depth(pattern: str) -> int | None:
    """How many levels of folders a glob reaches."""
    return None if "**" in pattern else pattern.count("/") + 1


def _has_video_suffix(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in VIDEO_SUFFIXES


def _nothing(uri: str, is_glob: bool, names: list[str]) -> str:
    if is_glob:
        return f"{uri} matches no video; check the pattern (`**` reaches into folders)"
    if any(n.lower().endswith(IMAGE_SUFFIXES) and not n.endswith(SIDECARS) for n in names):
        hint = "images only; to track a folder of images, name it in a manifest"
    else:
        hint = f"{len(names)} other files; videos end in .mp4, .mkv, .mov, ... - a glob takes others too"
    return f"{uri} holds no video ({hint})"
