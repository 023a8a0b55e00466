"""CPU time of a frame near frame 10,000 over one near frame 2,500, by `xmem-lite`, in some minutes.

Long-term memory is full from about frame 2,000 on; from then on nothing may get slower. The state at a
quarter of the video is kept as bytes and restored at its end, and both states then track the same frames in
turns, so that what else the machine does disturbs both alike. One thread; the frames are made up, and small.
"""

from __future__ import annotations

import argparse
import statistics
import time

import xmem_core  # noqa: F401  before torch, as in every command: see xmem_core.openmp

# isort: split

import torch
from rich.console import Console
from support.moving_discs import clip

from xmem_core import TrackerState, VideoSegmenter, load_model

COMPARED = 300


def measure(frames: int) -> tuple[list[float], list[float]]:
    """CPU seconds of steps of the state at a quarter and of that near the end, on the same frames."""
    torch.set_num_threads(1)
    segmenter = VideoSegmenter(load_model("xmem-lite"), size=None)
    images, prompt = clip(60, 1, 112, 160)
    images += images[-2:0:-1]  # there and back
    state, kept = segmenter.new_state(), b""
    for t in range(frames - COMPARED):
        segmenter.step(state, images[t % len(images)], None if t else prompt)
        if t == frames // 4:
            kept = state.to_bytes()
    early = TrackerState.from_bytes(kept)
    spent: tuple[list[float], list[float]] = [], []
    for t in range(frames - COMPARED, frames):
        pairs = list(zip((early, state), spent, strict=True))
        for own, times in pairs if t % 2 else pairs[::-1]:
            started = time.thread_time()
            segmenter.step(own, images[t % len(images)])
            times.append(time.thread_time() - started)
    return spent


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=10_000, help=f"at least {4 * COMPARED}")
    options = parser.parse_args()
    if options.frames < 4 * COMPARED:
        parser.error(f"--frames {options.frames}: at least {4 * COMPARED}, or the two parts would overlap")
    early, late = measure(options.frames)
    part = COMPARED // 5
    ratios = [
        statistics.mean(late[i : i + part]) / statistics.mean(early[i : i + part])
        for i in range(0, COMPARED, part)
    ]
    Console(width=160).print(
        f"state of frame {options.frames // 4}: {1e3 * statistics.mean(early):.2f} ms a frame, "
        f"of frame {options.frames - COMPARED}: {1e3 * statistics.mean(late):.2f}; "
        f"{statistics.mean(late) / statistics.mean(early):.3f} times "
        f"({min(ratios):.3f} to {max(ratios):.3f} in fifths)"
    )


if __name__ == "__main__":
    main()
