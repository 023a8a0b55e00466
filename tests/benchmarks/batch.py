"""Overhead of a batch beyond tracking, and the effect of bad files on the others. Part of `make bench`.

Overhead: steady-state frames/s of `xmem batch` on one video (decoding, rows, Parquet, snapshots, Ray), over
the bare loop of `VideoSegmenter.step` on frames decoded beforehand, equal threads, taking turns on the same
machine. The rate of the batch is read off the times at which its files were committed.

Bad files: 60 files of which 3 are none, against the 57 good ones alone; frames/s of the good ones.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import xmem_core  # noqa: F401  before torch, as in every command: see xmem_core.openmp

# isort: split

import torch
from support.videos import make_video, truncate

from pipeline.prompts.box_segmenters import GrabCut
from pipeline.prompts.resolving import PromptSet, resolve
from pipeline.video.sources import open_source
from xmem_core import Prompt, VideoSegmenter, load_model

CHUNK = 25
WARM = 50


def boxes(count: int) -> dict[str, Any]:
    """A prompts file of `count` boxes side by side on frame 0."""
    return {
        "version": 1,
        "objects": [{"id": i + 1, "box": [20 + 180 * i, 150, 140, 200]} for i in range(count)],
    }


def bare(video: Path, objects: int, threads: int) -> float:
    """Frames/s of the bare loop after the first WARM frames; results are not fetched."""
    torch.set_num_threads(threads)
    with open_source(str(video)) as source:
        images = [f.image for f in source.frames()]
        prompts = PromptSet.from_record(boxes(objects)).at(0)
    with open_source(str(video)) as source:
        masks = resolve(prompts, next(source.frames()), GrabCut()).masks
    model = load_model("xmem-lite")
    segmenter = VideoSegmenter(model, size=model.config.default_size)
    state = segmenter.new_state()
    for i, image in enumerate(images):
        if i == WARM:
            started = time.perf_counter()
        segmenter.step(state, image, Prompt(masks) if i == 0 else None)
    return (len(images) - WARM) / (time.perf_counter() - started)


def xmem_batch(videos: Path, out: Path, prompts: Path, *options: str, expected: int = 0) -> float:
    """Run the command and return the seconds it took."""
    command = [sys.executable, "-m", "jobs.cli", "batch", str(videos), "--out", str(out)]
    started = time.perf_counter()
    done = subprocess.run(
        [*command, "--prompts", str(prompts), *options], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    if done.returncode != expected:
        raise RuntimeError(done.stderr.decode()[-2000:])
    return time.perf_counter() - started


def batch_rate(video: Path, prompts: Path, threads: int) -> float:
    """Frames/s of a batch of one video, between the commits of frame WARM and of the last full chunk."""
    with tempfile.TemporaryDirectory() as folder:
        options = ("--threads", str(threads), "--chunk-frames", str(CHUNK))
        xmem_batch(video, Path(folder), prompts, *options)
        at = [p.stat().st_mtime_ns for p in sorted(Path(folder).glob("tracks/*/frames-*.parquet"))]
    first = WARM // CHUNK - 1
    # The last chunk is committed by the end of the video, not by the frame after it.
    return (len(at) - 2 - first) * CHUNK / ((at[-2] - at[first]) / 1e9)


def overhead(frames: int, objects: int, threads: int, rounds: int) -> dict[str, float]:
    """Rates of both and their ratio, as medians of `rounds` alternating runs."""
    with tempfile.TemporaryDirectory() as folder:
        video = make_video(Path(folder) / "clip.mp4", frames, width=768, height=576)
        prompts = Path(folder) / "prompts.json"
        prompts.write_text(json.dumps(boxes(objects)))
        alone, whole = [], []
        for _ in range(rounds):
            inside = [sys.executable, __file__, "--bare", str(video)]
            inside += ["--objects", str(objects), "--threads", str(threads)]
            alone.append(float(subprocess.run(inside, check=True, capture_output=True, text=True).stdout))
            whole.append(batch_rate(video, prompts, threads))
    ratios = [w / a for w, a in zip(whole, alone, strict=True)]
    return {
        "bare_fps": round(statistics.median(alone), 2),
        "batch_fps": round(statistics.median(whole), 2),
        "ratio": round(statistics.median(ratios), 3),
        "worst_ratio": round(min(ratios), 3),
    }


def bad_files(frames: int, rounds: int) -> dict[str, float]:
    """Frames/s of 57 good videos alone, and among 60 files of which 3 are bad."""
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        clean, mixed = folder / "clean", folder / "mixed"
        clean.mkdir()
        mixed.mkdir()
        for i in range(57):
            video = make_video(clean / f"v{i:02d}.mp4", frames, width=160, height=120, start_pts=i)
            (mixed / video.name).hardlink_to(video)
        (mixed / "empty.mp4").touch()
        (mixed / "a-text.mp4").write_text("not a video\n" * 100)
        truncate(clean / "v00.mp4", mixed / "truncated.mp4", 0.5)
        prompts = folder / "prompts.json"
        objects = [{"id": 1, "polygons": [[20, 20, 80, 20, 80, 90, 20, 90]]}]
        prompts.write_text(json.dumps({"version": 1, "objects": objects}))
        rates: dict[str, list[float]] = {"clean": [], "mixed": []}
        for i in range(rounds):
            for name, expected in (("clean", 0), ("mixed", 1)):
                seconds = xmem_batch(folder / name, folder / f"{name}-{i}", prompts, expected=expected)
                done = len(list((folder / f"{name}-{i}" / "tracks").iterdir()))
                if done != 57:
                    raise RuntimeError(f"{done} of 57 good videos have rows")
                rates[name].append(57 * frames / seconds)
    ratios = [m / c for m, c in zip(rates["mixed"], rates["clean"], strict=True)]
    return {
        "clean_fps": round(statistics.median(rates["clean"]), 1),
        "mixed_fps": round(statistics.median(rates["mixed"]), 1),
        "ratio": round(statistics.median(ratios), 3),
        "worst_ratio": round(min(ratios), 3),
    }


def main() -> None:
    """Print the results as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=300)
    parser.add_argument("--objects", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=["overhead", "bad"])
    parser.add_argument("--bare", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare:
        sys.stdout.write(f"{bare(options.bare, options.objects, options.threads)}\n")
        return
    found: dict[str, Any] = {}
    if options.only != "bad":
        found["overhead"] = overhead(options.frames, options.objects, options.threads, options.rounds)
    if options.only != "overhead":
        found["bad_files"] = bad_files(100, options.rounds)
    sys.stdout.write(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
