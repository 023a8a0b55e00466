"""Export of an output folder's tracks to the formats of other tools.

    coco          one JSON file; an image per frame, an annotation with `track_id` per visible object
    youtube-vis   one JSON file; a video per stream, an annotation with a mask per frame for each object
    mot           a folder per stream with `gt/gt.txt` and `seqinfo.ini` (MOT16 and later)
    mots          `instances_txt/<stream>.txt` with run lengths (KITTI MOTS, MOTSChallenge)
    davis         `Annotations/<stream>/<frame>.png`, palette PNGs whose values are object ids
    workspace     `<stream>/masks/<frame>.png`, the same as a workspace of the published XMem demo
    burst         one JSON file; a sequence per stream, masks by frame and track (BURST, TAO)
    cvat          `<stream>.xml`, "CVAT for images 1.1", masks with an attribute `track_id`
    labelstudio   one JSON file; a task per stream, a `videorectangle` with boxes per object
    supervision   `<stream>.csv` with the columns of `supervision.CSVSink`, and masks
    geojson       one FeatureCollection; a polygon along the edges of pixels per object and frame

What a format cannot hold is left out: rows of objects out of sight everywhere, masks in mot and labelstudio,
scores and categories in davis and workspace.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Any

import numpy as np

from pipeline.base.errors import StoreError, UsageError
from pipeline.exchange.annotation_tools import write_cvat, write_label_studio
from pipeline.exchange.burst import write_burst
from pipeline.exchange.exported import Categories, Count, Exported, Stream, one_size, visible
from pipeline.exchange.geojson import write_geojson
from pipeline.exchange.palette_png import MAX_VALUE, palette_png
from pipeline.exchange.supervision import write_supervision
from pipeline.storage.opening import open_files
from pipeline.tracks.layout import load_record
from pipeline.tracks.masks import label_map_from_rles
from pipeline.tracks.reader import TrackReader, stream_ids

logger = logging.getLogger(__name__)


def export(
    root: str | os.PathLike[str],
    fmt: str,
    output: str | os.PathLike[str],
    *,
    streams: Sequence[str] = (),
    storage_options: Mapping[str, Any] | None = None,
) -> Exported:
    """Write the tracks of an output folder in another format.

    Args:
        fmt: one of `FORMATS`.
        output: the file (coco, youtube-vis, burst, labelstudio, geojson) or folder (the others) to write;
            must not exist.
        streams: ids or patterns of the streams; none: all.
        storage_options: of the output folder `root`.

    Raises:
        UsageError: the format or a stream is unknown, `output` exists, or the format cannot hold the tracks.
        StoreError: rows cannot be read, or the output not be written; nothing is left of it then.
    """
    if fmt not in _WRITERS:
        raise UsageError(f"format {fmt!r} is not known: use {', '.join(FORMATS)}")
    target = Path(output)
    if target.exists():
        raise UsageError(f"{target} exists: give a name that is free")
    chosen = list(_streams(root, streams, storage_options))
    partial = target.with_name(f".{target.name}.partial")
    count = Count(streams=len(chosen))
    try:
        _remove(partial)
        target.parent.mkdir(parents=True, exist_ok=True)
        _WRITERS[fmt](iter(chosen), partial, count)
        os.replace(partial, target)
    except OSError as error:
        raise StoreError(f"{target} cannot be written: {error.strerror or error}") from error
    finally:
        _remove(partial)
    return Exported(count.streams, count.frames, count.rows)


def _streams(
    root: str | os.PathLike[str], patterns: Sequence[str], options: Mapping[str, Any] | None
) -> Iterator[Stream]:
    files = open_files(root, options)
    ids = stream_ids(files)
    if not ids:
        raise UsageError(f"{files.root} is no output folder of xmem: nothing in it under tracks/")
    for pattern in patterns:
        if not any(fnmatchcase(stream_id, pattern) for stream_id in ids):
            there = ", ".join(ids[:5]) + (", ..." if len(ids) > 5 else "")
            raise UsageError(f"stream {pattern!r} matches no stream in {files.root}: it has {there}")
    for stream_id in ids:
        if patterns and not any(fnmatchcase(stream_id, pattern) for pattern in patterns):
            continue
        reader = TrackReader(root, stream_id, options)
        try:
            record = load_record(files, stream_id) or {}
        except StoreError:
            record = {}
        width, height = record.get("width"), record.get("height")
        if not (isinstance(width, int) and isinstance(height, int) and width > 0 and height > 0):
            first = next((r for _, rows in reader.frames() for r in rows), None)
            width, height = (first.frame_width, first.frame_height) if first else (0, 0)
        rate = record.get("rate")
        source = record.get("source")
        yield Stream(
            stream_id,
            reader,
            width,
            height,
            float(rate) if isinstance(rate, int | float) else None,
            source if isinstance(source, str) else None,
        )


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        for entry in path.iterdir():
            _remove(entry)
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


# --- coco ----------------------------------------------------------------------------------------


def _coco(streams: Iterator[Stream], path: Path, count: Count) -> None:
    categories = Categories()
    with path.open("w", encoding="utf-8") as file:
        file.write('{"info": {"description": "tracks of xmem"},\n"images": [')
        spilled = path.with_name(path.name + ".annotations")
        try:
            with spilled.open("w+", encoding="utf-8") as aside:
                _coco_rows(streams, file, aside, categories, count)
                file.write('],\n"annotations": [')
                aside.seek(0)
                for line in aside:
                    file.write(line)
        finally:
            spilled.unlink(missing_ok=True)
        named = [{"id": n, "name": name, "supercategory": ""} for name, n in categories.numbers.items()]
        file.write('],\n"categories": ' + json.dumps(named, ensure_ascii=False) + "}\n")


def _coco_rows(
    streams: Iterator[Stream], images: IO[str], annotations: IO[str], categories: Categories, count: Count
) -> None:
    for stream in streams:
        for frame, rows in stream.reader.frames():
            count.frames += 1
            first = rows[0]
            image = {
                "id": count.frames,
                "file_name": f"{stream.stream_id}/{frame:08d}.jpg",
                "width": first.frame_width,
                "height": first.frame_height,
                "stream_id": stream.stream_id,
                "frame_index": frame,
                "pts_seconds": first.pts_seconds,
                "wall_time": None if first.wall_time is None else first.wall_time.isoformat(),
            }
            images.write((",\n" if count.frames > 1 else "\n") + json.dumps(image))
            for r in visible(rows):
                count.rows += 1
                annotation = {
                    "id": count.rows,
                    "image_id": count.frames,
                    "category_id": categories.number(r.category),
                    "segmentation": {"size": [r.frame_height, r.frame_width], "counts": r.mask_rle},
                    "area": r.area,
                    "bbox": list(r.bbox or ()),
                    "iscrowd": 0,
                    "track_id": r.object_id,
                    "score": r.score,
                    **({} if r.presence is None else {"presence": r.presence}),
                }
                annotations.write((",\n" if count.rows > 1 else "\n") + json.dumps(annotation))


# --- youtube-vis ---------------------------------------------------------------------------------


def _youtube_vis(streams: Iterator[Stream], path: Path, count: Count) -> None:
    categories = Categories()
    videos: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, stream in enumerate(streams, 1):
        length = stream.reader.next_frame
        objects: dict[int, dict[str, Any]] = {}
        scores: dict[int, list[float]] = {}
        for frame, rows in stream.reader.frames():
            count.frames += 1
            for r in visible(rows):
                count.rows += 1
                entry = objects.get(r.object_id)
                if entry is None:
                    entry = objects[r.object_id] = {
                        "id": 0,
                        "video_id": number,
                        "category_id": categories.number(r.category),
                        "iscrowd": 0,
                        "track_id": r.object_id,
                        "height": r.frame_height,
                        "width": r.frame_width,
                        "segmentations": [None] * length,
                        "bboxes": [None] * length,
                        "areas": [None] * length,
                    }
                one_size("youtube-vis", stream, r, (entry["height"], entry["width"]))
                size = [r.frame_height, r.frame_width]
                entry["segmentations"][frame] = {"size": size, "counts": r.mask_rle}
                entry["bboxes"][frame] = list(r.bbox or ())
                entry["areas"][frame] = r.area
                scores.setdefault(r.object_id, []).append(r.score)
        videos.append(
            {
                "id": number,
                "name": stream.stream_id,
                "width": stream.width,
                "height": stream.height,
                "length": length,
                "file_names": [f"{stream.stream_id}/{frame:05d}.jpg" for frame in range(length)],
            }
        )
        for object_id, entry in sorted(objects.items()):
            entry["id"] = len(annotations) + 1
            entry["score"] = float(np.mean(scores[object_id]))
            annotations.append(entry)
    document = {
        "info": {"description": "tracks of xmem"},
        "videos": videos,
        "annotations": annotations,
        "categories": [{"id": n, "name": name} for name, n in categories.numbers.items()],
    }
    path.write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")


# --- mot and mots --------------------------------------------------------------------------------


def _mot(streams: Iterator[Stream], path: Path, count: Count) -> None:
    categories = Categories()
    path.mkdir()
    for stream in streams:
        folder = path / stream.stream_id / "gt"
        folder.mkdir(parents=True)
        with (folder / "gt.txt").open("w", encoding="ascii") as file:
            for frame, rows in stream.reader.frames():
                count.frames += 1
                for r in visible(rows):
                    count.rows += 1
                    box = ",".join(map(str, r.bbox or ()))
                    file.write(f"{frame + 1},{r.object_id},{box},1,{categories.number(r.category)},1\n")
        rate = 0 if stream.rate is None else round(stream.rate, 3)
        (path / stream.stream_id / "seqinfo.ini").write_text(
            f"[Sequence]\nname={stream.stream_id}\nimDir=img1\nframeRate={rate:g}\n"
            f"seqLength={stream.reader.next_frame}\nimWidth={stream.width}\nimHeight={stream.height}\n"
            "imExt=.jpg\n",
            encoding="utf-8",
        )
    _write_labels(path, categories)


def _mots(streams: Iterator[Stream], path: Path, count: Count) -> None:
    categories = Categories()
    folder = path / "instances_txt"
    folder.mkdir(parents=True)
    for stream in streams:
        with (folder / f"{stream.stream_id}.txt").open("w", encoding="ascii") as file:
            for frame, rows in stream.reader.frames():
                count.frames += 1
                for r in visible(rows):
                    count.rows += 1
                    number = categories.number(r.category)
                    size = f"{r.frame_height} {r.frame_width}"
                    file.write(f"{frame + 1} {r.object_id} {number} {size} {r.mask_rle}\n")
    _write_labels(path, categories)


def _write_labels(path: Path, categories: Categories) -> None:
    """Names of the class numbers, one a line from 1 on."""
    (path / "labels.txt").write_text("".join(f"{name}\n" for name in categories.numbers), encoding="utf-8")


# --- davis ---------------------------------------------------------------------------------------


def _davis(streams: Iterator[Stream], path: Path, count: Count) -> None:
    path.mkdir()
    for stream in streams:
        _palette_pngs(stream, path / "Annotations" / stream.stream_id, 5, count)


def _workspace(streams: Iterator[Stream], path: Path, count: Count) -> None:
    path.mkdir()
    for stream in streams:
        _palette_pngs(stream, path / stream.stream_id / "masks", 7, count)


def _palette_pngs(stream: Stream, folder: Path, digits: int, count: Count) -> None:
    """Write a palette PNG of each frame, named by its number."""
    folder.mkdir(parents=True)
    size = stream.height, stream.width
    found = iter(stream.reader.frames())
    following = next(found, None)
    covered, covering = 0, set[int]()
    for frame in range(stream.reader.next_frame):
        rles: dict[int, str] = {}
        pixels = 0
        if following is not None and following[0] == frame:
            rows = visible(following[1])
            size = following[1][0].frame_height, following[1][0].frame_width
            rles = {r.object_id: str(r.mask_rle) for r in rows}
            pixels = sum(r.area for r in rows)
            following = next(found, None)
        large = [object_id for object_id in rles if object_id > MAX_VALUE]
        if large:
            raise UsageError(
                f"stream {stream.stream_id} has an object {large[0]}: palette PNGs hold ids up to "
                f"{MAX_VALUE}, use mots or coco"
            )
        count.frames += 1
        count.rows += len(rles)
        try:
            labels = label_map_from_rles(rles, *size)
            picture = palette_png(labels)
        except ValueError as error:
            raise StoreError(f"stream {stream.stream_id}, frame {frame}: {error}") from error
        if (lost := pixels - int(np.count_nonzero(labels))) > 0:
            covered += lost
            covering.add(frame)
        (folder / f"{frame:0{digits}d}.png").write_bytes(picture)
    if covered:
        logger.warning(
            "stream %s: masks overlap on %d frames (first %d), and palette PNGs have one object per pixel: "
            "%d pixels went to the object with the higher id; coco and mots keep both",
            stream.stream_id, len(covering), min(covering), covered,
        )  # fmt: skip


_WRITERS: dict[str, Callable[[Iterator[Stream], Path, Count], None]] = {
    "coco": _coco,
    "youtube-vis": _youtube_vis,
    "mot": _mot,
    "mots": _mots,
    "davis": _davis,
    "workspace": _workspace,
    "burst": write_burst,
    "cvat": write_cvat,
    "labelstudio": write_label_studio,
    "supervision": write_supervision,
    "geojson": write_geojson,
}
FORMATS = tuple(_WRITERS)
