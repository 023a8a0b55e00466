"""`make bench`: frames per second of decoding, of the bare tracking loop, and of `track` as a whole.

And of the command `xmem track` with its defaults on a real video (`--video`, by default the fixed camera with
people of `../shared/data`, where that is): as it reports them, GrabCut included, and by the clock on the wall
from its start to its end. With `--busy 10` once more beside ten processes that compute without end: the ratio
is to what the command does alone, divided by the share of the CPUs that its threads then get.

Figures of one run may be compared with each other, not with those of another machine or hour.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import xmem_core  # noqa: F401  before torch, as in every command: see xmem_core.openmp

# isort: split

import torch
from rich.console import Console
from rich.table import Table
from support.videos import make_video

from pipeline.prompts.box_segmenters import GrabCut
from pipeline.prompts.resolving import PromptSet, resolve
from pipeline.tracking.files.track import track
from pipeline.video.sources import open_source
from xmem_core import Prompt, VideoSegmenter, load_model

WIDTH, HEIGHT = 768, 576
VIDEO = Path(__file__).parents[3] / "shared/data/video/vtest.avi"
PEOPLE = ("252,218,32,92", "499,156,32,78", "638,238,49,85")  # on its first frame


def boxes(count: int) -> PromptSet:
    """`count` boxes side by side on frame 0."""
    objects = [{"id": i + 1, "box": [20 + 180 * i, 150, 140, 200]} for i in range(count)]
    return PromptSet.from_record({"version": 1, "objects": objects})


def decode(video: Path, threads: int) -> float:
    """Frames per second of decoding alone."""
    started = time.perf_counter()
    with open_source(str(video), threads=threads) as source:
        count = sum(1 for _ in source.frames())
    return count / (time.perf_counter() - started)


def bare(video: Path, frames: int, objects: int, warm: int) -> float:
    """Frames per second of `VideoSegmenter.step` on frames decoded beforehand, label maps computed."""
    with open_source(str(video)) as source:
        decoded = [f for f, _ in zip(source.frames(), range(frames), strict=False)]
    model = load_model("xmem-lite")
    segmenter = VideoSegmenter(model, size=model.config.default_size)
    state = segmenter.new_state()
    masks = resolve(boxes(objects).at(0), decoded[0], GrabCut()).masks
    for i, frame in enumerate(decoded):
        if i == warm:
            started = time.perf_counter()
        result = segmenter.step(state, frame.image, Prompt(masks) if i == 0 else None)
        result.label_map  # noqa: B018 - computed when read
    return (frames - warm) / (time.perf_counter() - started)


def whole(video: Path, frames: int, objects: int, warm: int, threads: int) -> float:
    """Frames per second of `track`: decoding, rows, Parquet and snapshots included."""
    at: list[float] = []
    with tempfile.TemporaryDirectory() as out:
        track(
            video,
            out,
            boxes(objects),
            max_frames=frames,
            threads=threads,
            on_frame=lambda _: at.append(time.perf_counter()),
        )
    return (len(at) - warm) / (at[-1] - at[warm - 1])


def command(
    video: Path, boxes: Sequence[str], threads: int, frames: int | None, size: int | None
) -> tuple[float, float]:
    """Frames per second of `xmem track`, as it reports and by the clock."""
    with tempfile.TemporaryDirectory() as out:
        arguments = [sys.executable, "-m", "jobs.cli", "track", str(video), "--out", out]
        arguments += [part for box in boxes for part in ("--box", box)]
        arguments += ["--threads", str(threads), *(["--max-frames", str(frames)] if frames else [])]
        arguments += ["--size", str(size)] if size else []
        started = time.perf_counter()
        said = subprocess.run(arguments, check=True, capture_output=True, text=True).stderr
        seconds = time.perf_counter() - started
    found = re.search(r"(\d+) frames tracked in [\d.]+ s \(([\d.]+) frames/s\)", said)
    if found is None:
        raise RuntimeError(f"xmem track did not say how fast it was: {said!r}")
    return float(found[2]), int(found[1]) / seconds


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Beside so many processes that compute without end."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def fair_share(threads: int, others: int, cores: int) -> float:
    """Share of a core that each of `threads` gets beside `others` busy threads, over that alone, 0 to 1."""
    return min(1.0, cores / (threads + others)) / min(1.0, cores / threads)


def main() -> None:
    """Run the benchmarks and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=120)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--video", type=Path, default=VIDEO)
    parser.add_argument("--box", action="append", help="x,y,w,h on its first frame; repeatable")
    parser.add_argument("--max-frames", type=int, help="of the video; default: all")
    parser.add_argument("--size", type=int, help="of the command; default: its own")
    parser.add_argument("--busy", type=int, default=0, help="processes that compute beside the command")
    parser.add_argument("--only-command", action="store_true", help="nothing but `xmem track` on the video")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warm = 20
    machine = platform.processor() or platform.machine()
    table = Table(title=f"{WIDTH}x{HEIGHT} H.264, {options.threads} threads, {machine}")
    for name in ("what", "frames/s", "ratio"):
        table.add_column(name, justify="left" if name == "what" else "right")
    if not options.only_command:
        with tempfile.TemporaryDirectory() as folder:
            video = make_video(Path(folder) / "clip.mp4", options.frames, width=WIDTH, height=HEIGHT)
            for threads in (1, options.threads):
                table.add_row(f"decode, {threads} threads", f"{decode(video, threads):.0f}", "")
            for objects in (1, 3):
                alone = bare(video, options.frames, objects, warm)
                table.add_row(f"step, {objects} objects", f"{alone:.1f}", "1.00")
                full = whole(video, options.frames, objects, warm, options.threads)
                table.add_row(f"track, {objects} objects", f"{full:.1f}", f"{full / alone:.2f}")
    if options.video.exists():
        given = options.box or PEOPLE
        said, clock = command(options.video, given, options.threads, options.max_frames, options.size)
        table.add_row(f"xmem track {options.video.name}, {len(given)} objects", f"{said:.1f}", "")
        table.add_row("the same from start to end of the process", f"{clock:.1f}", f"{clock / said:.2f}")
        if options.busy:
            with busy(options.busy):
                beside, _ = command(options.video, given, options.threads, options.max_frames, options.size)
            alone = said * fair_share(options.threads, options.busy, os.cpu_count() or 1)
            name = f"the same beside {options.busy} busy processes, over its share"
            table.add_row(name, f"{beside:.1f}", f"{beside / alone:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
