"""Import of tracks in the formats of other tools into an output folder.

    coco     a JSON file; `track_id` makes tracks, `stream_id` and `frame_index` of images say where they are;
             without `track_id`, a category that no image has twice is one track, and other masks are one each
    mots     a file `<stream>.txt`, or a folder of them (perhaps below `instances_txt`)
    davis    a folder of index PNGs, or a folder of such folders (perhaps below `Annotations`)

Each stream is written once, whole, in chunks; a stream that is there already is an error. Objects have a row
on each frame from their first to their last, out of sight where the format has nothing.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco

from pipeline.base.errors import UsageError
from pipeline.base.records import Event, MaskRecord, events_table, tracks_table
from pipeline.base.stream_ids import is_stream_id, named_stream_id
from pipeline.exchange.exported import NO_CATEGORY, Exported
from pipeline.prompts.index_png import decode_index_png
from pipeline.tracks.masks import MAX_OBJECT_ID, mask_to_rle, record_of_mask
from pipeline.tracks.store import StreamStore

FORMATS = ("coco", "mots", "davis")
_CHUNK_FRAMES = 500
_MOTS_IGNORED = 10  # the class of regions that MOTS does not judge


@dataclass(frozen=True)
class ImportedStream:
    """A stream of another tool: rows by frame, and how many frames it has at least.

    Args:
        numbered: object ids that the tool did not give, but this import.
        unjudged: by frame, masks of regions that are not to be judged: objects there need not be marked.
    """

    stream_id: str
    rows: Mapping[int, list[MaskRecord]]
    frames: int
    times: Mapping[int, tuple[float | None, datetime | None]]
    numbered: frozenset[int] = frozenset()
    unjudged: Mapping[int, list[MaskRecord]] = field(default_factory=dict)


def import_tracks(
    path: str | os.PathLike[str],
    fmt: str,
    out: str | os.PathLike[str],
    *,
    frame_rate: float | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Exported:
    """Write tracks in another format into an output folder.

    Args:
        path: file or folder on this machine.
        fmt: one of `FORMATS`.
        out: output folder, a path or fsspec URI; made if it is not there.
        frame_rate: frames per second, for the times of frames where the format has none.

    Raises:
        UsageError: the format is unknown, a file is not in it, or a stream is there already. StoreError: the
            output folder cannot be read or written.
    """
    if frame_rate is not None and not 0 < frame_rate <= 10_000:
        raise UsageError(f"frame rate {frame_rate} is not allowed: above 0 and at most 10000")
    streams = frames = rows = 0
    for found in read_streams(path, fmt):
        written = _write(found, Path(path), out, frame_rate, storage_options)
        streams, frames, rows = streams + 1, frames + found.frames, rows + written
    if not streams:
        raise UsageError(f"{path} holds no tracks in the format {fmt}")
    return Exported(streams, frames, rows)


def read_streams(path: str | os.PathLike[str], fmt: str) -> Iterator[ImportedStream]:
    """Read a file or folder in one of `FORMATS`; UsageError as `import_tracks`."""
    readers = {"coco": _coco, "mots": _mots, "davis": _davis}
    if fmt not in readers:
        raise UsageError(f"format {fmt!r} is not known: use {', '.join(FORMATS)}")
    source = Path(path)
    if not source.exists():
        raise UsageError(f"{source}: there is no such file or folder")
    return readers[fmt](source)


def _write(
    found: ImportedStream,
    source: Path,
    out: str | os.PathLike[str],
    frame_rate: float | None,
    options: Mapping[str, Any] | None,
) -> int:
    store = StreamStore(out, found.stream_id, options)
    store.prepare()
    if store.committed(newest_only=True).files:
        raise UsageError(
            f"{store.root} has a stream {found.stream_id} already: remove it, or use another folder"
        )
    rows, events = _whole(found, frame_rate)
    sizes = [(r.frame_width, r.frame_height) for frame in found.rows.values() for r in frame[:1]]
    width, height = sizes[0] if sizes else (0, 0)
    record = {"source": str(source), "width": width, "height": height, "rate": frame_rate, "imported": True}
    store.write_record({**record, "state": "running"})
    count = 0
    for first in range(0, found.frames, _CHUNK_FRAMES):
        last = min(found.frames, first + _CHUNK_FRAMES) - 1
        chunk = [r for frame in range(first, last + 1) for r in rows.get(frame, ())]
        table = events_table(e for e in events if first <= e.frame_index <= last)
        store.commit(first, last, tracks_table(chunk), table)
        count += len(chunk)
    store.write_record({**record, "state": "finished", "frames": found.frames, "rows": count})
    return count


def _whole(
    found: ImportedStream, frame_rate: float | None
) -> tuple[dict[int, list[MaskRecord]], list[Event]]:
    """Rows with those out of sight and with times, and the events of objects."""
    spans: dict[int, tuple[int, int]] = {}
    latest: dict[int, MaskRecord] = {}
    for frame in sorted(found.rows):
        for r in found.rows[frame]:
            first, _ = spans.get(r.object_id, (frame, frame))
            spans[r.object_id] = first, frame

    def times(frame: int) -> tuple[float | None, datetime | None]:
        known = found.times.get(frame)
        if known is not None and known != (None, None):
            return known
        return (None if frame_rate is None else frame / frame_rate), None

    begins: dict[int, list[int]] = {}
    for object_id, (first, _) in spans.items():
        begins.setdefault(first, []).append(object_id)
    rows: dict[int, list[MaskRecord]] = {}
    events: list[Event] = []
    alive: set[int] = set()
    for frame in range(found.frames):
        pts, wall = times(frame)
        seen = {r.object_id: r for r in found.rows.get(frame, ())}
        for object_id in begins.get(frame, ()):
            alive.add(object_id)
            detail = {"category": seen[object_id].category}
            events.append(Event(frame, "object_added", "import", 1, pts, wall, object_id, detail))
        for object_id in sorted(i for i in alive if spans[i][1] < frame):
            alive.discard(object_id)
            events.append(Event(frame, "object_removed", "import", 1, pts, wall, object_id))
        for object_id in sorted(alive):
            shown = seen.get(object_id)
            if shown is None:
                before = latest[object_id]
                r = replace(
                    before, frame_index=frame, area=0, score=0.0, bbox=None, centroid=None, mask_rle=None,
                    presence=None if before.presence is None else 0.0,
                )  # fmt: skip
            else:
                latest[object_id] = r = shown
            rows.setdefault(frame, []).append(replace(r, pts_seconds=pts, wall_time=wall))
    return rows, events


# --- coco ----------------------------------------------------------------------------------------


def _coco(path: Path) -> Iterator[ImportedStream]:
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} is no COCO file: {' '.join(str(error).split())}") from error
    if not isinstance(document, dict) or not isinstance(document.get("images"), list):
        raise UsageError(f"{path} is no COCO file: it needs images, annotations and categories")
    try:
        yield from coco_streams(path, document)
    except (LookupError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} is no COCO file: {type(error).__name__}: {error}") from error


def coco_streams(path: Path, document: Mapping[str, Any]) -> Iterator[ImportedStream]:
    """The streams of a COCO document; `path` is for messages and names a stream without a name.

    Raises:
        UsageError, LookupError, TypeError, AttributeError: it is damaged.
    """
    names = {entry["id"]: entry["name"] for entry in document.get("categories", [])}
    videos = {entry["id"]: str(entry.get("name") or entry["id"]) for entry in document.get("videos", [])}
    images = sorted(document["images"], key=lambda image: (str(image.get("file_name")), image["id"]))
    where: dict[Any, tuple[str, int, Mapping[str, Any]]] = {}
    times: dict[str, dict[int, tuple[float | None, datetime | None]]] = {}
    for image in images:
        name = image.get("stream_id") or videos.get(image.get("video_id")) or path.stem
        stream_id = _stream_id(str(name))
        known = times.setdefault(stream_id, {})
        frame = next((image[k] for k in ("frame_index", "frame_id") if isinstance(image.get(k), int)), None)
        frame = len(known) if frame is None else frame
        if frame in known or frame < 0:
            raise UsageError(f"{path}: two images are frame {frame} of stream {stream_id}")
        wall = image.get("wall_time")
        known[frame] = image.get("pts_seconds"), datetime.fromisoformat(wall) if wall else None
        where[image["id"]] = stream_id, frame, image
    rows: dict[str, dict[int, list[MaskRecord]]] = {stream_id: {} for stream_id in times}
    annotations = document.get("annotations", [])
    tracks, numbered = _track_ids(annotations, where)
    for position, (annotation, track) in enumerate(zip(annotations, tracks, strict=True), 1):
        stream_id, frame, image = where[annotation["image_id"]]
        height, width = int(image["height"]), int(image["width"])
        named = f"{path}: annotation {annotation.get('id', position)}"
        counts = _coco_counts(annotation.get("segmentation"), height, width, named)
        category = names.get(annotation.get("category_id"))
        made = _record(
            frame,
            track,
            (height, width),
            counts,
            named,
            score=annotation.get("score", 1.0),
            presence=annotation.get("presence"),
            category=None if category == NO_CATEGORY else category,
        )
        if made is not None:
            others = rows[stream_id].setdefault(frame, [])
            if any(other.object_id == made.object_id for other in others):
                raise UsageError(f"{named}: object {made.object_id} is on frame {frame} twice")
            others.append(made)
    for stream_id, found in rows.items():
        yield ImportedStream(
            stream_id, found, max(times[stream_id]) + 1, times[stream_id], frozenset(numbered[stream_id])
        )


def _track_ids(
    annotations: Sequence[Mapping[str, Any]], where: Mapping[Any, tuple[str, int, Mapping[str, Any]]]
) -> tuple[list[Any], dict[str, set[int]]]:
    """The object id of each annotation, and by stream those that are made here.

    An annotation's own id says nothing about which object it is. Without `track_id`, a category that no image
    of the stream has twice is one object; of others, each annotation is one. Their ids are above the known.
    """
    tracks: list[Any] = []
    places = [
        (where[annotation["image_id"]][:2], annotation.get("category_id")) for annotation in annotations
    ]
    highest: dict[str, int] = {}
    for annotation, ((stream_id, _), _) in zip(annotations, places, strict=True):
        track = annotation.get("track_id")
        track = (annotation.get("attributes") or {}).get("track_id") if track is None else track
        tracks.append(track)
        highest[stream_id] = max(highest.get(stream_id, 0), track if isinstance(track, int) else 0)
    unknown = [place for place, track in zip(places, tracks, strict=True) if track is None]
    several = {(at[0], category) for (at, category), count in Counter(unknown).items() if count > 1}
    made: dict[Any, int] = {}
    numbered: dict[str, set[int]] = {stream_id: set() for stream_id, _, _ in where.values()}
    # In the order of frames, so that ids ascend with them.
    for i in sorted((i for i, track in enumerate(tracks) if track is None), key=lambda i: places[i][0]):
        (stream_id, _), category = places[i]
        kind = (stream_id, category)
        key = (*kind, i) if kind in several else kind
        if key not in made:
            made[key] = highest[stream_id] = highest[stream_id] + 1
            numbered[stream_id].add(made[key])
        tracks[i] = made[key]
    return tracks, numbered


def _coco_counts(segmentation: Any, height: int, width: int, named: str) -> Any:
    if isinstance(segmentation, Mapping):
        if list(segmentation.get("size", ())) != [height, width]:
            raise UsageError(f"{named}: its mask is {segmentation.get('size')}, its image {[height, width]}")
        return segmentation["counts"]
    if isinstance(segmentation, list) and segmentation and all(isinstance(p, list) for p in segmentation):
        merged = coco.merge(coco.frPyObjects(segmentation, height, width))
        return str(merged["counts"], "ascii")
    raise UsageError(f"{named} has no mask: boxes alone are not imported")


# --- mots ----------------------------------------------------------------------------------------


def _mots(path: Path) -> Iterator[ImportedStream]:
    folder = path / "instances_txt" if (path / "instances_txt").is_dir() else path
    texts = [folder] if folder.is_file() else sorted(folder.glob("*.txt"))
    texts = [text for text in texts if text.name != "labels.txt"]
    named = next((p for p in (path / "labels.txt", path.parent / "labels.txt") if p.is_file()), None)
    labels = named.read_text(encoding="utf-8").splitlines() if named is not None else []
    for text in texts:
        rows: dict[int, list[MaskRecord]] = {}
        unjudged: dict[int, list[MaskRecord]] = {}
        for number, line in enumerate(text.read_text(encoding="ascii", errors="replace").splitlines(), 1):
            where = f"{text}, line {number}"
            words = line.split()
            if not words:
                continue
            if len(words) != 6 or not all(re.fullmatch(r"\d{1,9}", word) for word in words[:5]):
                raise UsageError(f"{where}: it needs frame, id, class, height, width and run lengths")
            frame, track, kind, height, width = map(int, words[:5])
            if frame < 1:
                raise UsageError(f"{where}: frames count from 1")
            label = labels[kind - 1] if 0 < kind <= len(labels) else str(kind)
            category = None if label == NO_CATEGORY else label
            made = _record(frame - 1, track, (height, width), words[5], where, category=category)
            if made is not None:
                there = unjudged if kind == _MOTS_IGNORED and not labels else rows
                there.setdefault(frame - 1, []).append(made)
        last = max(rows, default=0)
        yield ImportedStream(_stream_id(text.stem), rows, last + 1, {}, unjudged=unjudged)


# --- davis ---------------------------------------------------------------------------------------


def _davis(path: Path) -> Iterator[ImportedStream]:
    folder = path / "Annotations" if (path / "Annotations").is_dir() else path
    folders = [folder] if any(folder.glob("*.png")) else sorted(p for p in folder.rglob("*") if p.is_dir())
    for clip in folders:
        pictures = sorted(clip.glob("*.png"))
        if not pictures:
            continue
        rows: dict[int, list[MaskRecord]] = {}
        last = 0
        for position, picture in enumerate(pictures):
            frame = int(picture.stem) if re.fullmatch(r"\d{1,9}", picture.stem) else position
            last = max(last, frame)
            index = decode_index_png(picture.read_bytes(), str(picture))
            for value in (int(v) for v in np.unique(index) if v):
                made = _record(frame, value, index.shape, mask_to_rle(index == value), str(picture))
                if made is not None:
                    rows.setdefault(frame, []).append(made)
        yield ImportedStream(_stream_id(clip.name), rows, last + 1, {})


def _record(
    frame: int,
    track: Any,
    size: tuple[int, ...],
    counts: Any,
    named: str,
    *,
    score: float = 1.0,
    presence: float | None = None,
    category: str | None = None,
) -> MaskRecord | None:
    """A record of a mask; None for one without a pixel."""
    if isinstance(track, bool) or not isinstance(track, int) or not 0 < track <= MAX_OBJECT_ID:
        raise UsageError(f"{named}: object id {track!r} is not allowed: 1 to {MAX_OBJECT_ID}")
    try:
        found = record_of_mask(counts, size[0], size[1], frame_index=frame, object_id=track)
    except ValueError as error:
        raise UsageError(f"{named}: {error}") from error
    if found.area == 0:
        return None
    return replace(
        found,
        score=float(np.float32(score)),
        presence=None if presence is None else float(np.float32(presence)),
        category=category,
    )


def _stream_id(name: str) -> str:
    return name if is_stream_id(name) else named_stream_id(name)
