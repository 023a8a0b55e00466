"""Masks of other tools as prompts: what they hold on a frame is given to the tracker there."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.base.errors import UsageError
from pipeline.exchange.importing import ImportedStream, coco_streams, read_streams
from pipeline.prompts.files import PromptObject, PromptSet, load_mask_png


class MaskPrompts(NamedTuple):
    """Prompts made of masks.

    Args:
        prompts: the prompts.
        numbered: ids in them that the file did not give: of COCO annotations without `track_id`.
    """

    prompts: PromptSet
    numbered: frozenset[int] = frozenset()


def read_masks_as_prompts(
    path: str | os.PathLike[str], *, frame: int = 0, stream_id: str | None = None
) -> MaskPrompts:
    """Read masks as prompts.

    Args:
        path: an index or palette PNG; a folder of them, named by their frames (as DAVIS or the published XMem
            demo saves them); a COCO file; or a prompts file.
        frame: the frame of a single PNG whose name is no number, and of a COCO file's only image if neither
            `frame_index` nor a number at the end of its name says which frame it is.
        stream_id: the stream to take if there are several.

    Raises:
        UsageError, PromptError: the file is none of these, holds no mask, or holds several streams.
    """
    source = Path(path)
    if source.suffix.lower() == ".png" and source.is_file():
        stem = source.stem
        at = int(stem) if stem.isascii() and stem.isdigit() else frame
        return MaskPrompts(load_mask_png(str(source), at))
    if source.is_dir():
        return _of_stream(list(read_streams(source, "davis")), source, stream_id)
    document = _json(source)
    if isinstance(document, dict) and "version" in document and "images" not in document:
        return MaskPrompts(PromptSet.from_record(document, str(source)))
    return _of_stream(_coco(source, document, frame), source, stream_id)


def _coco(source: Path, document: Any, frame: int) -> list[ImportedStream]:
    try:
        images = document["images"]
        for image in images:
            if any(isinstance(image.get(known), int) for known in ("frame_index", "frame_id")):
                continue
            # As annotation tools name the pictures of a video: frame_000020.png.
            number = re.search(r"(\d{1,9})$", Path(str(image.get("file_name", ""))).stem, re.ASCII)
            if number is not None or len(images) == 1:
                image["frame_index"] = frame if number is None else int(number[1])
        return list(coco_streams(source, document))
    except (LookupError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{source} is no COCO file, which has images, annotations and categories: "
            f"{type(error).__name__}: {error}"
        ) from error


def _of_stream(streams: list[ImportedStream], source: Path, stream_id: str | None) -> MaskPrompts:
    streams = [stream for stream in streams if stream.rows]
    named = [stream for stream in streams if stream.stream_id == stream_id]
    if not streams:
        raise UsageError(f"{source} holds no masks: give PNGs with one value per object, or a COCO file")
    if len(streams) > 1 and not named:
        there = ", ".join(stream.stream_id for stream in streams[:5])
        raise UsageError(f"{source} holds masks of {there}: give those of one video")
    chosen = (named or streams)[0]
    prompts = PromptSet(
        {
            frame: tuple(
                PromptObject(r.object_id, r.category, rle=(r.frame_height, r.frame_width, str(r.mask_rle)))
                for r in sorted(chosen.rows[frame], key=lambda r: r.object_id)
            )
            for frame in sorted(chosen.rows)
        }
    )
    return MaskPrompts(prompts, chosen.numbered)


def _json(source: Path) -> Any:
    try:
        return json.loads(source.read_bytes())
    except OSError as error:
        raise UsageError(f"{source} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError):
        raise UsageError(
            f"{source} is neither JSON nor a PNG: give palette PNGs, a COCO file or a prompts file"
        ) from None
