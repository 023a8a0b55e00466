"""Batch input: a folder, a glob or a manifest file as a list of videos, each with its prompts.

Prompts are referenced, not read, since those of a batch may exceed the driver's memory. A video's prompts
are, in this order: those in the manifest, those beside the video (`a.prompts.json` or `a.masks.png` for
`a.mp4`; also `a.mp4.prompts.json`), the file given for all videos.
"""

from __future__ import annotations

import logging
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from jobs.batch.listing import SIDECARS, Sidecars, Skipped, has_wildcard, root_of, sidecar_of, videos_in
from jobs.batch.manifest_file import SUFFIXES, Row, absolute, check_prompts_name, is_manifest, read_rows
from jobs.scheduling.video_job import VideoJob
from pipeline.base.errors import SourceError, UsageError
from pipeline.base.joined_uris import joined_uri
from pipeline.base.redaction import redacted
from pipeline.base.stream_ids import expanded, generate_stream_id, named_stream_id, relative_stream_id
from pipeline.distributed.messages import StreamSpec
from pipeline.prompts.resolving import PromptSet, load_mask_png, load_prompts
from pipeline.storage.locations import locate, scheme_of
from pipeline.video.plugin_video import find_plugin

logger = logging.getLogger(__name__)

Ids = Literal["uri", "relative", "name"]
_NO_VIDEOS = (".json", ".txt", ".tsv", ".yaml", ".yml")


def load_manifest(
    source: str | os.PathLike[str] | Sequence[str],
    *,
    prompts: str | None = None,
    detector: str | None = None,
    priority: float = 1.0,
    restart: bool = False,
    inline_prompts: bool = False,
    storage_options: Mapping[str, Any] | None = None,
    skipped: Skipped | None = None,
    ids: Ids = "uri",
    errors: list[str] | None = None,
    out: str | None = None,
) -> list[VideoJob]:
    """Load the videos of a batch, in the order of the manifest or of their names.

    Takes about 0.6 kB per video; manifest files are read as streams.

    Args:
        source: path or fsspec URI of a folder (its videos, at any depth), a glob, a single video, or a
            manifest: .jsonl, .csv or .parquet with columns uri (required), stream_id, sequence, prompts,
            priority and direction; other columns are stored in the stream record. Rows of one sequence are
            the files of one stream of that name, in their order; prompts, priority and other columns are
            those of its first row. Relative paths in a manifest are relative to it.
            Or a list of these, for instance from a shell's glob: sidecars and other files that are not
            videos are left out.
        prompts: prompts file or masks for videos without their own; validated here.
        detector: name of the detector that finds objects; videos then need no prompts.
        priority: priority of videos for which the manifest has none.
        restart: start all videos over.
        inline_prompts: pass the content of a local `prompts` file instead of its name, for workers on other
            machines.
        storage_options: options of the fsspec file systems.
        ids: how stream ids are derived if the manifest gives none: "uri": the whole URI. "relative": the
            path below the folder, the glob's fixed part or the manifest's folder, so that ids stay the same
            if the archive is moved. "name": the file's name, which must then be unique.
        errors: collects errors of single manifest rows and duplicate videos, instead of raising the first.
        skipped: collects a folder's or glob's files that are not tracked; they are also logged.
        out: the output folder: files in it are left out of a folder or glob.

    Returns:
        the jobs. Videos with nothing to track are included: they may have been begun before; otherwise they
        fail individually.

    Raises:
        UsageError: the source cannot be read or holds no video, a row is invalid, a stream or video is
            given twice, or no video has anything to track.
    """
    sources = [os.fspath(s) for s in ([source] if isinstance(source, str | os.PathLike) else source)]
    uri = ", ".join(sources[:3]) + (", ..." if len(sources) > 3 else "")
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
    for root, row in _joined(_all_rows(sources, storage_options, skipped, errors, out), uri, errors):
        generated = generate_stream_id(row.uri)
        stream_id = row.stream_id or _made(row.uri, root, ids)
        wanted = (row.prompts_uri, row.prompts)
        if wanted == (None, None):
            wanted = (prompts, shared)
        spec = StreamSpec(stream_id, row.uri, *wanted, restart, row.extra, row.direction)
        jobs.append(VideoJob(spec, row.priority or priority))
        lines.append(row.line)
        if row.stream_id is not None and row.stream_id != generated:
            explicit.add(stream_id)
        for name in {stream_id, generated}:
            before = seen.setdefault(name, len(jobs) - 1)
            if before != len(jobs) - 1 and not _meant(jobs[before], jobs[-1], explicit):
                wrong = _twice(uri, jobs[before], lines[before], jobs[-1], row.line, ids)
                if errors is None:
                    raise UsageError(wrong)
                errors.append(wrong)
                break
    if skipped.count:
        logger.warning("%s: %s", redacted(uri), skipped)
    if errors:
        return jobs
    if not jobs:
        raise UsageError(f"{uri} lists no video; give at least one")
    if detector is None and not any(job.spec.prompts_uri or job.spec.prompts for job in jobs):
        raise UsageError(_nothing_to_track(uri, jobs))
    return jobs


def _all_rows(
    sources: Sequence[str],
    storage_options: Mapping[str, Any] | None,
    skipped: Skipped,
    errors: list[str] | None,
    out: str | None,
) -> Iterator[tuple[str, Row]]:
    """Per source, the folder that its videos are relative to, and its videos."""
    for source in sources:
        if len(sources) > 1 and not is_manifest(source):
            # A shell's glob matches all files, including sidecars and notes.
            if source.endswith(SIDECARS):
                continue
            if source.lower().endswith(_NO_VIDEOS):
                skipped.add(source, "not a video suffix")
                continue
        root = ""
        for row in _rows(source, storage_options, skipped, errors, out):
            root = root or _root(source, row)
            yield root, row


def _joined(
    rows: Iterable[tuple[str, Row]], source: str, errors: list[str] | None
) -> Iterator[tuple[str, Row]]:
    """The rows, with one for each sequence after all others."""
    sequences: dict[str, list[tuple[str, Row]]] = {}
    for root, row in rows:
        if row.sequence is None:
            yield root, row
        else:
            sequences.setdefault(row.sequence, []).append((root, row))
    for name, files in sequences.items():
        root, first = files[0]
        try:
            for _, row in files[1:]:
                if row.prompts is not None or row.prompts_uri is not None:
                    raise UsageError("its prompts belong to its first row, with frames numbered through")
            video = joined_uri([row.uri for _, row in files])
        except UsageError as error:
            wrong = f"{source} line {row.line}: sequence {name!r}: {error}"
            if errors is None:
                raise UsageError(wrong) from error
            errors.append(wrong)
            continue
        yield root, replace(first, uri=video, stream_id=name)


def _root(source: str, row: Row) -> str:
    if row.line:
        return absolute("x", source).removesuffix("x").rstrip("/")
    if local_absolute(source) == row.uri:  # a single file
        return row.uri.rpartition("/")[0]
    return root_of(source)


def _made(uri: str, root: str, ids: Ids) -> str:
    """Derive the stream id of a video without one."""
    if ids == "name":
        return named_stream_id(uri)
    if ids == "relative" and root and uri.startswith(f"{root}/"):
        return relative_stream_id(uri.removeprefix(f"{root}/").partition("::")[0])
    return generate_stream_id(uri)


def _rows(
    uri: str,
    storage_options: Mapping[str, Any] | None,
    skipped: Skipped,
    errors: list[str] | None,
    out: str | None,
) -> Iterator[Row]:
    """All videos, with their own prompts."""
    if find_plugin(scheme_of(uri)):
        yield Row(0, uri)
    elif is_manifest(uri) and not has_wildcard(uri):
        sidecars = Sidecars(storage_options)
        for row in read_rows(uri, storage_options, errors):
            bare = row.prompts is None and row.prompts_uri is None and not find_plugin(scheme_of(row.uri))
            beside = sidecars.of(row.uri) if bare else None
            yield row if beside is None else replace(row, prompts_uri=beside)
    elif _is_file(uri, storage_options):
        path = local_absolute(uri)
        if path.lower().endswith(_NO_VIDEOS):
            raise UsageError(f"{uri} is not a video; a manifest is one of {', '.join(SUFFIXES)}")
        yield Row(0, path, prompts_uri=_beside(path, storage_options))
    else:
        own = None if out is None else local_absolute(out)
        for video, beside in videos_in(uri, storage_options, skipped, out=own):
            yield Row(0, video, prompts_uri=beside)


def local_absolute(uri: str) -> str:
    """Make a local path absolute; other URIs are returned unchanged."""
    if "::" in uri or scheme_of(uri) not in ("file", "local"):
        return uri
    return os.path.abspath(expanded(uri.partition("://")[2] if "://" in uri else uri))


def _is_file(uri: str, storage_options: Mapping[str, Any] | None) -> bool:
    """Whether the URI is a single file; a file's name may look like a glob."""
    try:
        return not locate(uri, storage_options).is_folder()
    except SourceError as error:
        if has_wildcard(uri):
            return False
        raise UsageError(str(error)) from error


def _beside(video: str, storage_options: Mapping[str, Any] | None) -> str | None:
    """The sidecar of one video. Checks each possible name, since its folder may be large."""
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
    """The prompts for all videos. The file is read here, so that its errors are reported once."""
    check_prompts_name(uri, "for all videos")
    uri = local_absolute(uri)
    is_picture = uri.partition("?")[0].lower().endswith(".png")
    if is_picture:
        return uri, load_mask_png(uri, storage_options=storage_options)
    return uri, load_prompts(uri, storage_options)


def _meant(one: VideoJob, other: VideoJob, explicit: set[str]) -> bool:
    """Whether a duplicate video is intended: each occurrence has its own explicit stream id."""
    ids = (one.spec.stream_id, other.spec.stream_id)
    return ids[0] != ids[1] and explicit.issuperset(ids)


def _twice(source: str, one: VideoJob, line: int, other: VideoJob, other_line: int, ids: Ids) -> str:
    lines = f"lines {line} and {other_line}: " if line else ""
    if generate_stream_id(one.spec.uri) != generate_stream_id(other.spec.uri):
        what = f"stream id {other.spec.stream_id} appears twice ({one.spec.uri} and {other.spec.uri})"
        remedy = ", or use --ids relative" if ids == "name" else ""
        return f"{source} {lines}{what}; give each video another stream_id{remedy}"
    what = f"video {one.spec.uri} appears twice"
    return f"{source} {lines}{what}; remove one, or give each a stream_id of its own"


def _nothing_to_track(source: str, jobs: list[VideoJob]) -> str:
    stem = os.path.splitext(jobs[0].spec.uri.rstrip("/").rpartition("/")[2])[0]
    videos = "the video" if len(jobs) == 1 else f"any of the {len(jobs)} videos"
    return (
        f"{source}: nothing to track in {videos}: put {stem}.prompts.json or {stem}.masks.png beside the "
        f"video, or give --prompts FILE or --detect NAME"
    )
