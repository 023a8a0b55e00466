"""Export to the annotation tools CVAT and Label Studio."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape, quoteattr

import numpy as np

from pipeline.base.records import MaskRecord
from pipeline.exchange.exported import NO_CATEGORY, Count, Stream, mask_in_box, visible
from pipeline.tracks.masks import MAX_OBJECT_ID

# CVAT has no tracks of masks: the object id is an attribute of each mask.
_TRACK_ATTRIBUTE = (
    "<attribute><name>track_id</name><mutable>True</mutable><input_type>number</input_type>"
    f"<default_value>0</default_value><values>0\n{MAX_OBJECT_ID}\n1</values></attribute>"
)


def write_cvat(streams: Iterator[Stream], path: Path, count: Count) -> None:
    """Write a file "CVAT for images 1.1" per stream: an image per frame, a mask per visible object."""
    path.mkdir()
    for stream in streams:
        labels: dict[str, None] = {}
        body = path / f"{stream.stream_id}.images"
        with body.open("w", encoding="utf-8") as file:
            frames = iter(stream.reader.frames())
            following = next(frames, None)
            size = stream.height, stream.width
            for frame in range(stream.reader.next_frame):
                rows: list[MaskRecord] = []
                if following is not None and following[0] == frame:
                    rows = visible(following[1])
                    size = following[1][0].frame_height, following[1][0].frame_width
                    count.frames += 1
                    following = next(frames, None)
                count.rows += len(rows)
                name = quoteattr(f"{stream.stream_id}/{frame:08d}.jpg")
                file.write(
                    f'  <image id="{frame}" name={name} width="{size[1]}" height="{size[0]}">\n'
                    + "".join(_cvat_mask(stream, r) for r in rows)
                    + "  </image>\n"
                )
                labels.update(dict.fromkeys(r.category or NO_CATEGORY for r in rows))
        _cvat_file(path / f"{stream.stream_id}.xml", body, stream, labels)


def _cvat_file(path: Path, body: Path, stream: Stream, labels: Iterable[str]) -> None:
    with path.open("w", encoding="utf-8") as file, body.open(encoding="utf-8") as images:
        file.write(
            '<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n  <version>1.1</version>\n'
            "  <meta>\n    <task>\n"
            f"      <name>{escape(stream.stream_id)}</name>\n      <size>{stream.reader.next_frame}</size>\n"
            "      <mode>annotation</mode>\n      <labels>\n"
        )
        for label in labels:
            file.write(
                f"        <label><name>{escape(label)}</name><type>mask</type>"
                f"<attributes>{_TRACK_ATTRIBUTE}</attributes></label>\n"
            )
        file.write("      </labels>\n    </task>\n  </meta>\n")
        for line in images:
            file.write(line)
        file.write("</annotations>\n")
    body.unlink()


def _cvat_mask(stream: Stream, r: MaskRecord) -> str:
    """A mask: run lengths over the rows of its box, background first."""
    assert r.bbox is not None
    left, top, width, height = r.bbox
    flat = mask_in_box(stream, r).ravel()
    changes = np.flatnonzero(np.diff(flat, prepend=False))
    runs = np.diff(changes, prepend=0, append=len(flat)).tolist()
    return (
        f'    <mask label={quoteattr(r.category or NO_CATEGORY)} source="auto" occluded="0" '
        f'rle="{", ".join(map(str, runs))}" left="{left}" top="{top}" width="{width}" height="{height}" '
        f'z_order="0">\n      <attribute name="track_id">{r.object_id}</attribute>\n    </mask>\n'
    )


def write_label_studio(streams: Iterator[Stream], path: Path, count: Count) -> None:
    """Write a task per stream with a prediction: a `videorectangle` per object, a keyframe per box.

    `data.video` is the stream's source. The labelling interface needs `<Video name="video" .../>` and
    `<VideoRectangle name="box" toName="video"/>` with `<Labels name="label" toName="video">`.
    """
    with path.open("w", encoding="utf-8") as file:
        for number, stream in enumerate(streams):
            file.write(",\n" if number else "[\n")
            json.dump(_label_studio_task(stream, count), file, ensure_ascii=False)
        file.write("]\n")


def _label_studio_task(stream: Stream, count: Count) -> dict[str, Any]:
    length = stream.reader.next_frame
    objects: dict[int, list[MaskRecord]] = {}
    for _, rows in stream.reader.frames():
        count.frames += 1
        for r in visible(rows):
            count.rows += 1
            objects.setdefault(r.object_id, []).append(r)
    results: list[dict[str, Any]] = []
    for object_id, seen in sorted(objects.items()):
        following = [r.frame_index for r in seen[1:]] + [-1]
        value = {
            "framesCount": length,
            # Label Studio draws a box on to the next keyframe, unless it is not `enabled`.
            "sequence": [
                _keyframe(r, stream, enabled=r.frame_index + 1 == after)
                for r, after in zip(seen, following, strict=True)
            ],
            "labels": [seen[0].category or NO_CATEGORY],
        }
        if stream.rate:
            value["duration"] = length / stream.rate
        results.append(
            {
                "id": f"{stream.stream_id}-{object_id}",
                "type": "videorectangle",
                "from_name": "box",
                "to_name": "video",
                "score": float(np.mean([r.score for r in seen])),
                "meta": {"track_id": object_id},
                "value": value,
            }
        )
    return {
        "data": {"video": stream.source or stream.stream_id, "stream_id": stream.stream_id},
        "predictions": [{"model_version": "xmem", "result": results}],
    }


def _keyframe(r: MaskRecord, stream: Stream, *, enabled: bool) -> dict[str, Any]:
    """A box in per cent of the frame; frames count from 1."""
    assert r.bbox is not None
    x, y, width, height = r.bbox
    at = r.frame_index / stream.rate if stream.rate else r.pts_seconds
    return {
        "frame": r.frame_index + 1,
        "enabled": enabled,
        "rotation": 0,
        "x": 100 * x / r.frame_width,
        "y": 100 * y / r.frame_height,
        "width": 100 * width / r.frame_width,
        "height": 100 * height / r.frame_height,
        **({} if at is None else {"time": at}),
    }
