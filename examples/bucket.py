"""Track the videos of a bucket, with the prompts that lie beside them.

    python examples/bucket.py "s3://archive/2026/*.mp4" --out s3://results/tracks

For `a.mp4` the prompts are in `a.prompts.json` (`xmem schema` prints its JSON Schema). Credentials and the
endpoint come from the environment, as botocore reads it (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ...). Run it
again and it tracks what is unfinished. `xmem batch` does the same on all cores or on a cluster.
"""

from __future__ import annotations

import argparse
import sys

import fsspec

from pipeline import XmemError, load_prompts, query, track


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0 if every video is finished."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("videos", help="glob of videos: a path or any fsspec URI")
    parser.add_argument("--out", required=True, help="output folder: a path or any fsspec URI")
    parser.add_argument("--model", default="xmem-lite")
    options = parser.parse_args(arguments)

    filesystem, pattern = fsspec.core.url_to_fs(options.videos)
    videos = [filesystem.unstrip_protocol(path) for path in sorted(filesystem.glob(pattern))]
    failed = 0
    for video in videos:
        try:
            prompts = load_prompts(f"{video.rpartition('.')[0]}.prompts.json")
            summary = track(video, options.out, prompts, model=options.model)
        except XmemError as error:  # one line that names the file and the cause; the others go on
            failed += 1
            print(f"{video}: {error}")
        else:
            print(f"{video}: {summary.frames} frames, {summary.rows} rows as {summary.stream_id}")

    if len(videos) > failed:
        totals = query(options.out, "SELECT count(DISTINCT stream_id) AS streams, count(*) AS n FROM tracks")
        print("the output folder holds {streams} streams with {n} rows".format(**totals.to_pylist()[0]))
    return 1 if failed or not videos else 0


if __name__ == "__main__":
    sys.exit(main())
