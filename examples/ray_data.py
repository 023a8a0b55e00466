"""Videos tracked by a Ray Data pipeline: python ray_data.py MANIFEST --out FOLDER

MANIFEST is a Parquet, CSV or JSONL file with the columns uri and, as you like, stream_id, prompts and others
of your own. Tracks go to FOLDER; what became of each video is printed, and written as Parquet to --results.
Needs Ray Data: pip install 'xmem-pipeline[data]'. Runs on this machine, or on the cluster of RAY_ADDRESS,
whose machines have both installed too.

    python examples/ray_data.py videos.jsonl --out s3://bucket/tracks --device cuda --workers 8
    xmem query s3://bucket/tracks "select stream_id, count(*) from tracks group by stream_id"
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

import ray.data

from jobs.cluster.connection import connected
from pipeline import TrackVideos

READERS = {"parquet": ray.data.read_parquet, "csv": ray.data.read_csv, "jsonl": ray.data.read_json}


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0 if every video is finished."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("manifest")
    parser.add_argument("--out", required=True)
    parser.add_argument("--results", help="folder for a line per video, as Parquet")
    parser.add_argument("--prompts", help="for videos that have none of their own")
    parser.add_argument("--model", default="xmem-lite")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=1, help="processes, each with a model of its own")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each")
    options = parser.parse_args(arguments)

    suffix = options.manifest.rpartition(".")[2].lower()
    if suffix not in READERS:
        parser.error(f"{options.manifest}: must end in {', '.join(READERS)}")
    # A Ray of this machine's own is reached from nowhere else, and asks for a token.
    gpus = options.device == "cuda"
    with connected(os.environ.get("RAY_ADDRESS"), gpus=gpus, debug=True):  # with what its workers print
        videos = READERS[suffix](options.manifest)
        settings: dict[str, Any] = {name: getattr(options, name) for name in ("model", "device", "threads")}
        results = videos.map_batches(
            TrackVideos,
            fn_constructor_kwargs={"out": options.out, "prompts": options.prompts, **settings},
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=options.workers),
            num_cpus=options.threads,
            num_gpus=1 if options.device == "cuda" else 0,
            batch_size=1,
        ).materialize()  # tracked once, though asked twice
        if options.results:
            results.write_parquet(options.results)
        failed = 0
        for row in results.iter_rows():
            failed += row["state"] != "finished"
            told = row["cause"] or f"{row['frames']} frames, {row['rows']} rows in {row['seconds']:.1f} s"
            sys.stdout.write(f"{row['stream_id']}: {row['state']}: {told}\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
