"""What to track: a folder, a glob or a manifest file as the videos of one batch, each with its prompts.

Prompts are named here, not read: a batch may have more of them than the driver's memory holds. Those of a
video are, in this order: the manifest's, those beside the video (`a.prompts.json` or `a.masks.png` for
`a.mp4`; `a.mp4.prompts.json` too), the file given for all.
"""

from __future__ import annotations

import logging
import math
import os
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jobs.listing import Sidecars, Skipped, has_wildcard, sidecar_of, videos_in
from jobs.manifest_file import SUFFIXES, Row, check_prompts_name, is_manifest, read_rows
from pipeline.errors import SourceError, UsageError
from pipeline.filesystems import expanded
from pipeline.locations import locate, scheme_of
from pipeline.prompts import PromptSet, load_mask_png, load_prompts
from pipeline.redact import redacted
from pipeline.sources import find_plugin
from pipeline.stream_ids import generate_stream_id
from pipeline.work import StreamSpec

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class VideoJob:
    """One video of a batch.

    Args:
        spec: the stream.
        priority: its share of the work compared with the other videos'; above 0.

    Raises:
        UsageError: the priority is not a finite number above 0.
    """

    spec: StreamSpec
    priority: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.priority < math.inf:
            raise UsageError(f"priority {self.priority!r} is not allowed: give a number above 0")


def load_manifest(
    source: str | os.PathLike[str],
    *,
    prompts: str | None = None,
    detector: str | None = None,
    priority: float = 1.0,
    restart: bool = False,
    inline_prompts: bool = False,
    storage_options: Mapping[str, Any] | None = None,
    skipped: Skipped | None = None,
) -> list[VideoJob]:
    """The videos of a batch, in the order of the manifest or of their names.

    About 0.6 kB a video is kept; manifest files are read as streams.

    Args:
        source: path or fsspec URI of a folder (its videos, at any depth), a glob, a single video, or a
            manifest: .jsonl, .csv or .parquet with columns uri, stream_id, prompts and priority, of which
            only uri is needed. What is relative in a manifest is relative to it.
        prompts: prompts file or masks for the videos that have none of their own; checked here.
        detector: name of the detector that finds objects; videos need no prompts then.
        priority: of videos without one.
        restart: start all of them over.
        inline_prompts: give the videos what a local `prompts` file holds, not its name: on a cluster nobody
            else could read it.
        storage_options: for the fsspec file systems.
        skipped: takes note of a folder's or glob's files that are not tracked; they are logged, too.

    Returns:
        the jobs. A video with nothing to track is among them: it may have been begun before, and fails by
        itself otherwise.

    Raises:
        UsageError: nothing can be tracked at all: the source cannot be read or holds no video, a row is
            wrong, a stream or video is there twice, or no video has anything to track.
    """
    uri = os.fspath(source)
    shared: Mapping[str, Any] | None = None
    if prompts is not None:
        prompts, content = _shared_prompts(prompts, storage_options)
        if inline_prompts and scheme_of(prompts) == "file":
            prompts, shared = None, content.to_record()
    jobs: list[VideoJob] = []
    lines = array("q")
    seen: dict[str, int] = {}
    explicit: set[str] = set()
    skipped = Skipped() if skipped is None else skipped
    for row in _rows(uri, storage_options, skipped):
        generated = generate_stream_id(row.uri)
        stream_id = row.stream_id or generated
        if row.prompts is None and row.prompts_uri is None:
            spec = StreamSpec(stream_id, row.uri, prompts, shared, restart)
        else:
            spec = StreamSpec(stream_id, row.uri, row.prompts_uri, row.prompts, restart)
        jobs.append(VideoJob(spec, row.priority or priority))
        lines.append(row.line)
        if row.stream_id is not None and row.stream_id != generated:
            explicit.add(stream_id)
        for name in {stream_id, generated}:
            before = seen.setdefault(name, len(jobs) - 1)
            if before != len(jobs) - 1 and not _meant(jobs[before], jobs[-1], explicit):
                raise UsageError(_twice(uri, jobs[before], lines[before], jobs[-1], row.line))
    if skipped.count:
        logger.warning("%s: %s", redacted(uri), skipped)
    if not jobs:
        raise UsageError(f"{uri} names no video; give at least one")
    if detector is None and not any(job.spec.prompts_uri or job.spec.prompts for job in jobs):
        raise UsageError(_nothing_to_track(uri, jobs))
    return jobs


def _rows(uri: str, storage_options: Mapping[str, Any] | None, skipped: Skipped) -> Iterator[Row]:
    """All videos, with the prompts that are their own."""
    if find_plugin(scheme_of(uri)):
        yield Row(0, uri)
    elif is_manifest(uri) and not has_wildcard(uri):
        sidecars = Sidecars(storage_options)
        for row in read_rows(uri, storage_options):
            bare = row.prompts is None and row.prompts_uri is None and not find_plugin(scheme_of(row.uri))
            beside = sidecars.of(row.uri) if bare else None
            yield row if beside is None else Row(row.line, row.uri, row.stream_id, beside, None, row.priority)
    elif _is_file(uri, storage_options):
        path = local_absolute(uri)
        if path.lower().endswith((".json", ".txt", ".tsv", ".yaml", ".yml")):
            raise UsageError(f"{uri} is no video; a manifest is one of {', '.join(SUFFIXES)}")
        yield Row(0, path, prompts_uri=_beside(path, storage_options))
    else:
        for video, beside in videos_in(uri, storage_options, skipped):
            yield Row(0, video, prompts_uri=beside)


def local_absolute(uri: str) -> str:
    """A local path as one that holds in any process's working folder; another URI as it is."""
    if "::" in uri or scheme_of(uri) not in ("file", "local"):
        return uri
    return os.path.abspath(expanded(uri.partition("://")[2] if "://" in uri else uri))


def _is_file(uri: str, storage_options: Mapping[str, Any] | None) -> bool:
    """Whether this is one file. A name that looks like a glob may be a file's all the same."""
    try:
        return not locate(uri, storage_options).is_folder()
    except SourceError as error:
        if has_wildcard(uri):
            return False
        raise UsageError(str(error)) from error


def _beside(video: str, storage_options: Mapping[str, Any] | None) -> str | None:
    """The prompts beside one video, by asking for each: its folder may be large."""
    if scheme_of(video) in ("http", "https") or "::" in video:
        return None

    class Existing:
        def __contains__(self, name: object) -> bool:
            location = locate(str(name), storage_options)
            return bool(location.fs.exists(location.path))

        def __iter__(self) -> Iterator[str]:
            return iter(())

    return sidecar_of(video, Existing())


def _shared_prompts(uri: str, storage_options: Mapping[str, Any] | None) -> tuple[str, PromptSet]:
    """The prompts for all videos: the one file that is read here, so that its faults are told once."""
    check_prompts_name(uri, "for all videos")
    uri = local_absolute(uri)
    is_picture = uri.partition("?")[0].lower().endswith(".png")
    if is_picture:
        return uri, load_mask_png(uri, storage_options=storage_options)
    return uri, load_prompts(uri, storage_options)


def _meant(one: VideoJob, other: VideoJob, explicit: set[str]) -> bool:
    """Whether a video that is there twice is so on purpose: each time as a stream with a name of its own."""
    ids = (one.spec.stream_id, other.spec.stream_id)
    return ids[0] != ids[1] and explicit.issuperset(ids)


def _twice(source: str, one: VideoJob, line: int, other: VideoJob, other_line: int) -> str:
    lines = f"lines {line} and {other_line}: " if line else ""
    if generate_stream_id(one.spec.uri) != generate_stream_id(other.spec.uri):
        what = f"stream id {other.spec.stream_id} is there twice ({one.spec.uri} and {other.spec.uri})"
        return f"{source} {lines}{what}; give each video another stream_id"
    what = f"video {one.spec.uri} is there twice"
    return f"{source} {lines}{what}; remove one, or give each a stream_id of its own"


def _nothing_to_track(source: str, jobs: list[VideoJob]) -> str:
    stem = os.path.splitext(jobs[0].spec.uri.rstrip("/").rpartition("/")[2])[0]
    videos = "the video" if len(jobs) == 1 else f"any of the {len(jobs)} videos"
    return (
        f"{source}: nothing to track in {videos}: put {stem}.prompts.json or {stem}.masks.png beside the "
        f"video, or give --prompts FILE or --detect NAME"
    )
