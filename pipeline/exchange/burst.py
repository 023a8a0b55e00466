"""Export to BURST (Athar et al., WACV 2023): masks of tracks by frame, in one JSON file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.exchange.exported import Categories, Count, Stream, one_size, visible

_DATASET = "xmem"
_SPLIT = "tracks"


def write_burst(streams: Iterator[Stream], path: Path, count: Count) -> None:
    """Write a sequence per stream. Every frame is annotated, and scores make it a prediction as well."""
    categories = Categories()
    with path.open("w", encoding="utf-8") as file:
        file.write(f'{{"split": "{_SPLIT}",\n"sequences": [')
        for number, stream in enumerate(streams, 1):
            file.write(("," if number > 1 else "") + "\n")
            json.dump(_sequence(number, stream, categories, count), file, ensure_ascii=False)
        named = [{"id": n, "name": name} for name, n in categories.numbers.items()]
        file.write('],\n"categories": ' + json.dumps(named, ensure_ascii=False) + "}\n")


def _sequence(number: int, stream: Stream, categories: Categories, count: Count) -> dict[str, Any]:
    kinds: dict[str, int] = {}
    segmentations: list[dict[str, Any]] = [{} for _ in range(stream.reader.next_frame)]
    size: tuple[int, int] | None = None
    for frame, rows in stream.reader.frames():
        count.frames += 1
        for r in visible(rows):
            count.rows += 1
            size = size or (r.frame_height, r.frame_width)
            one_size("burst", stream, r, size)
            kinds[str(r.object_id)] = categories.number(r.category)
            segmentations[frame][str(r.object_id)] = {"rle": r.mask_rle, "is_gt": False, "score": r.score}
    height, width = size or (stream.height, stream.width)
    images = [f"{frame:08d}.jpg" for frame in range(stream.reader.next_frame)]
    return {
        "id": number,
        "dataset": _DATASET,
        "seq_name": stream.stream_id,
        "width": width,
        "height": height,
        "fps": stream.rate,
        "all_image_paths": images,
        "annotated_image_paths": images,
        "neg_category_ids": [],
        "not_exhaustive_category_ids": [],
        "track_category_ids": kinds,
        "segmentations": segmentations,
    }
