"""Track one object through a video file, query its rows and draw an overlay.

    python examples/track_file.py match.mp4 --box 412,230,64,170:7:player

Run it again and it goes on where it stopped; finished, it changes nothing.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pipeline import gather_prompts, query, render, track


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("video", help="path or fsspec URI of a video or a folder of images")
    parser.add_argument("--box", action="append", required=True, help="x,y,w,h[:id[:category]] on frame 0")
    parser.add_argument("--out", default="tracks", help="output folder (default: tracks)")
    parser.add_argument("--overlay", help="overlay video (default: overlay.mp4 in the output folder)")
    parser.add_argument("--model", default="xmem-lite")
    options = parser.parse_args(arguments)

    # The box becomes a mask on the first frame; the tracker follows the mask.
    prompts = gather_prompts(boxes=options.box)
    summary = track(options.video, options.out, prompts, stream_id="example", model=options.model)
    print(f"{summary.stream_id}: {summary.frames} frames, {summary.rows} rows in {options.out}")

    # One row per object and frame. area = 0: the object is out of sight on that frame.
    rows = query(
        options.out,
        """
        SELECT object_id, any_value(category) AS category, count(*) AS frames_in_sight,
               round(avg(area)) AS mean_area, round(avg(score), 2) AS mean_score
        FROM tracks WHERE stream_id = 'example' AND area > 0
        GROUP BY object_id ORDER BY object_id
        """,
    )
    for row in rows.to_pylist():
        print(row)

    overlay = options.overlay or str(Path(options.out) / "overlay.mp4")
    written = render(options.video, options.out, overlay, stream_id="example")
    print(f"{written} frames drawn to {overlay}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
