"""Give masks from Python as prompts, correct an object later, and read the tracks back as masks.

    python examples/masks.py match.mp4 --color 230,20,20 --correct-at 40

The masks here are the largest region of a colour, which stands for a segmentation model of your own: anything
that returns an H x W bool array at the video's size will do.
"""

from __future__ import annotations

import argparse
import sys

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline import PromptSet, open_source, open_tracks, track
from pipeline.tracks.masks import rle_to_mask

OBJECT_ID = 7


def largest_region(
    image: NDArray[np.uint8], color: tuple[int, ...], tolerance: int = 60
) -> NDArray[np.bool_]:
    """H x W bool mask of the largest connected region close to an RGB colour; image: H x W x 3 uint8 RGB."""
    close = (np.abs(image.astype(int) - color).max(axis=2) <= tolerance).astype(np.uint8)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(close)
    if count < 2:  # the background only
        return np.zeros(image.shape[:2], bool)
    return np.asarray(labels == 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax()))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("video", help="path or fsspec URI of a video or a folder of images")
    parser.add_argument("--color", required=True, help="R,G,B of the object, 0 to 255 each")
    parser.add_argument("--correct-at", type=int, help="frame on which the object is given again")
    parser.add_argument("--out", default="tracks", help="output folder (default: tracks)")
    parser.add_argument("--model", default="xmem-lite")
    options = parser.parse_args(arguments)
    color = tuple(int(part) for part in options.color.split(","))

    # Frame index -> object id -> mask. An id that is known already corrects that object from there on.
    masks: dict[int, dict[int, NDArray[np.bool_]]] = {}
    with open_source(options.video) as source:
        for frame in source.frames():
            if frame.frame_index in (0, options.correct_at):
                masks[frame.frame_index] = {OBJECT_ID: largest_region(frame.image, color)}
            if frame.frame_index >= (options.correct_at or 0):
                break
    prompts = PromptSet.from_masks(masks, categories={OBJECT_ID: "colored"})
    track(options.video, options.out, prompts, stream_id="masks", model=options.model)

    # `frames()` reads one chunk's file at a time, so that a video of any length can be walked through.
    reader = open_tracks(options.video, options.out, "masks")
    for frame_index, records in reader.frames():
        for record in records:
            if record.mask_rle is None:  # out of sight
                continue
            mask = rle_to_mask(record.mask_rle, record.frame_height, record.frame_width)  # H x W bool
            if frame_index % 10 == 0:
                print(
                    f"frame {frame_index}: object {record.object_id} covers {np.count_nonzero(mask)} pixels"
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
